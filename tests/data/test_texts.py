import io
import tarfile

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.data import archive, imdb, texts


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def reviews(tmp_path):
    """A folder of IMDB's form with two reviews of each class in each part."""
    folder = tmp_path / "imdb" / "aclImdb"
    for part in ("train", "test"):
        for name in ("neg", "pos"):
            for i in range(2):
                write(folder / part / name / f"{i}_{i}.txt", f"{part} {name} {i}, café")
    return tmp_path


def test_strict_verification_refuses_what_has_no_digest(reviews):
    with pytest.raises(errors.DataError, match="whose digest alone is known"):
        imdb.load_imdb(data_dir=reviews, num_each=2, verify="strict")


def test_reviews_in_the_layout_of_imdb(reviews):
    found = imdb.load_imdb(data_dir=reviews, num_each=2)
    assert list(found.train) == [f"train {n} {i}, café" for n in ("neg", "pos") for i in (0, 1)]
    assert found.test_label.tolist() == [0, 0, 1, 1]
    assert found.class_names == ("neg", "pos")


def test_a_folder_of_ones_own(reviews):
    found = texts.load_texts("aclImdb", data_dir=reviews / "imdb")
    assert found.class_names == ("neg", "pos")
    assert len(found.train) == 4
    write(reviews / "imdb/aclImdb/train/pos/2.TXT", "another")
    write(reviews / "imdb/aclImdb/train/pos/.2_2.txt", "of an editor")
    found = texts.load_texts("aclImdb", data_dir=reviews / "imdb")
    assert len(found.train) == 5
    assert "another" in found.train
    with pytest.raises(errors.DataError, match="nothing is known to verify it by"):
        texts.load_texts("aclImdb", data_dir=reviews / "imdb", verify="strict")
    with pytest.raises(errors.ConfigError, match="unknown text data set 'aclImbd': did you mean"):
        texts.load_texts("aclImbd", data_dir=reviews / "imdb")


def test_a_review_that_is_missing(reviews):
    (reviews / "imdb/aclImdb/test/pos/1_1.txt").unlink()
    with pytest.raises(errors.DataError, match=r"test/pos: has 1 reviews, expected 2: remove"):
        imdb.load_imdb(data_dir=reviews, num_each=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nnot \xff fine", r"train/neg/0_0\.txt: line 2 is not UTF-8 \(byte 9\)"),
        (b"", r"train/neg/0_0\.txt: there is no text in it"),
        (b" \n", r"train/neg/0_0\.txt: there is no text in it"),
    ],
)
def test_a_file_that_is_no_text(reviews, content, message):
    write(reviews / "imdb/aclImdb/train/neg/0_0.txt", content)
    with pytest.raises(errors.DataError, match=message):
        imdb.load_imdb(data_dir=reviews, num_each=2)


def test_folders_that_hold_nothing(tmp_path):
    (tmp_path / "mine/train/a").mkdir(parents=True)
    with pytest.raises(errors.DataError, match="has 1 class folders, expected two or more"):
        texts.read_text_folders("mine", tmp_path / "mine")
    (tmp_path / "mine/train/b").mkdir()
    with pytest.raises(errors.DataError, match=r"train/a: holds no \.txt files"):
        texts.read_text_folders("mine", tmp_path / "mine")


def test_a_class_that_is_only_tested(tmp_path):
    for place in ("train/a", "train/b", "test/a", "test/b", "test/c"):
        (tmp_path / "mine" / place).mkdir(parents=True)
        (tmp_path / "mine" / place / "1.txt").write_text("text")
    with pytest.raises(errors.DataError, match=r"mine/test: nothing to learn c from in .*mine/train"):
        texts.read_text_folders("mine", tmp_path / "mine")


def test_made_reviews_are_the_same_each_time_and_balanced():
    first, second = (texts.load_made_reviews() for _ in range(2))
    assert first.train == second.train
    assert first.train_label.mean() == 0.5
    assert not set(first.train) & set(first.test)


def test_an_archive_gives_the_files_that_are_wanted(tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("aclImdb/train/pos/0_9.txt", "aclImdb/train/unsup/0_0.txt", "aclImdb/README"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))

    def limit(name):
        return 4 if "/pos/" in name else None

    archive.unpack_tar(path, tmp_path / "aclImdb", members=limit)
    files = list((tmp_path / "aclImdb").rglob("*.txt"))
    assert files == [tmp_path / "aclImdb/train/pos/0_9.txt"]
    with pytest.raises(errors.DataError, match="has 4 bytes, expected at most 3"):
        archive.unpack_tar(path, tmp_path / "b" / "aclImdb", members=lambda name: 3)


def test_labels_that_cannot_be():
    def made(label):
        zero = np.zeros(1, np.int32)
        return texts.Texts("x", ["a"], np.array(label, np.int32), ["b"], zero, ("n", "p"), "")

    with pytest.raises(errors.DataError, match="labels beyond the 2 classes"):
        made([2])
    with pytest.raises(errors.DataError, match="1 texts and labels"):
        made([0, 1])
