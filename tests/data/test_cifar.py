import hashlib
import io
import tarfile
import warnings

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.data import cifar
from jaxnets.data.cifar import load_cifar10

FOLDER = "cifar-10-batches-bin"


@pytest.fixture
def small(tmp_path, write_cifar_folder, monkeypatch):
    """A folder with four records a file, which is what the loader is told to expect."""
    monkeypatch.setattr(cifar, "_NUM_RECORDS", 4)
    folder = tmp_path / "cifar10" / FOLDER
    return folder, write_cifar_folder(folder, num_records=4)


def make_official(monkeypatch, arrays):
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    monkeypatch.setattr(cifar, "_OFFICIAL", digests)


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_reads_every_pixel_where_it_belongs(tmp_path, small, monkeypatch):
    folder, arrays = small
    make_official(monkeypatch, arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_cifar10(data_dir=tmp_path, verify="strict")
    assert dataset.name == "cifar10"
    assert dataset.source == f"{folder} (official files, SHA-256 verified)"
    assert dataset.num_classes == 10
    assert dataset.class_names[0] == "airplane"
    assert dataset.class_names[9] == "truck"
    for part, names in (
        (dataset.train, [f"data_batch_{i}.bin" for i in range(1, 6)]),
        (dataset.test, ["test_batch.bin"]),
    ):
        records = np.concatenate([arrays[name] for name in names])
        assert part["image"].shape == (len(records), 32, 32, 3)
        assert part["image"].dtype == np.uint8
        assert part["label"].dtype == np.int32
        assert part["label"].tolist() == records[:, 0].tolist()
        # Byte by byte: record n, channel c, row h, column w is at 1 + 1024 c + 32 h + w.
        for n, h, w, c in np.random.default_rng(0).integers(0, [len(records), 32, 32, 3], (200, 4)):
            assert part["image"][n, h, w, c] == records[n, 1 + 1024 * c + 32 * h + w]


def test_files_that_are_not_official(tmp_path, small, monkeypatch):
    folder, arrays = small
    make_official(monkeypatch, arrays)
    changed = arrays["data_batch_3.bin"].copy()
    changed[2, 77] ^= 1  # one bit of one pixel
    (folder / "data_batch_3.bin").write_bytes(changed.tobytes())
    with pytest.warns(UserWarning, match="1 of 6 files") as caught:
        dataset = load_cifar10(data_dir=tmp_path)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "\n" not in text
    assert "(data_batch_3.bin)" in text
    assert "NOT verified: 1 of 6" in dataset.source
    with pytest.raises(errors.DataError, match=r"data_batch_3\.bin.*remove the folder") as error:
        load_cifar10(data_dir=tmp_path, verify="strict")
    message(error)


@pytest.mark.parametrize("change", ["empty", "cut", "longer", "a record less"])
def test_a_file_of_another_size(tmp_path, small, change):
    path = small[0] / "data_batch_2.bin"
    content = path.read_bytes()
    changed = {
        "empty": b"",
        "cut": content[:-1],
        "longer": content + b"x",
        "a record less": content[3073:],
    }[change]
    path.write_bytes(changed)
    pattern = rf"data_batch_2\.bin: has {len(changed):,} bytes, expected 12,292 \(4 records"
    with pytest.raises(errors.DataError, match=pattern) as error:
        load_cifar10(data_dir=tmp_path)
    message(error)


def test_the_public_loader_insists_on_ten_thousand_records(tmp_path, write_cifar_folder):
    write_cifar_folder(tmp_path / "cifar10" / FOLDER, num_records=4)
    with pytest.raises(errors.DataError, match=r"expected 30,730,000 \(10,000 records of 3,073\)"):
        load_cifar10(data_dir=tmp_path)


def test_a_label_out_of_range(tmp_path, small):
    folder, arrays = small
    records = arrays["test_batch.bin"].copy()
    records[2, 0] = 10
    (folder / "test_batch.bin").write_bytes(records.tobytes())
    with pytest.raises(errors.DataError, match=r"test_batch\.bin: record 2 has the label 10"):
        load_cifar10(data_dir=tmp_path)


@pytest.mark.parametrize("missing", ["data_batch_4.bin", "test_batch.bin", "batches.meta.txt"])
def test_a_missing_file_is_named(tmp_path, small, missing):
    (small[0] / missing).unlink()
    with pytest.raises(errors.DataError, match=f"lacks {missing}: remove") as error:
        load_cifar10(data_dir=tmp_path)
    message(error)


@pytest.mark.parametrize("text", ["", "airplane\nautomobile\n", "x\n" * 11])
def test_a_wrong_list_of_classes(tmp_path, small, text):
    (small[0] / "batches.meta.txt").write_text(text)
    with pytest.raises(errors.DataError, match="class names, expected 10"):
        load_cifar10(data_dir=tmp_path)


def test_an_unknown_mode_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(errors.ConfigError, match="verify mode 'sometimes'"):
        load_cifar10(data_dir=tmp_path / "nothing", verify="sometimes")


@pytest.fixture
def archive(tmp_path, small, serve, monkeypatch):
    """The archive of the small set on a local server, in place of the official one."""
    folder, arrays = small
    make_official(monkeypatch, arrays)
    packed = io.BytesIO()
    (folder / "readme.html").write_text("<html></html>")
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(folder, arcname=FOLDER)
    content = packed.getvalue()
    server = serve(content)
    monkeypatch.setattr(cifar, "_URL", f"{server.url}/good")
    monkeypatch.setattr(cifar, "_ARCHIVE_SIZE", len(content))
    monkeypatch.setattr(cifar, "_ARCHIVE_SHA256", server.sha256)
    return server


def test_downloads_and_unpacks_once(tmp_path, archive):
    data_dir = tmp_path / "elsewhere"
    dataset = load_cifar10(data_dir=data_dir, verify="strict", progress=False)
    assert len(dataset.train["label"]) == 20
    load_cifar10(data_dir=data_dir, verify="strict", progress=False)
    assert len(archive.requests) == 1
    left = [path.name for path in (data_dir / "cifar10").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == [FOLDER]


def test_an_archive_put_there_by_hand_is_used_and_kept(tmp_path, archive):
    by_hand = tmp_path / "elsewhere" / "cifar10" / "cifar-10-binary.tar.gz"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(archive.content)
    load_cifar10(data_dir=tmp_path / "elsewhere", verify="strict", progress=False)
    assert archive.requests == []
    assert by_hand.exists()


def test_a_wrong_archive_is_not_unpacked(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(cifar, "_URL", f"{archive.url}/wrong")
    with pytest.raises(errors.DataError, match="SHA-256"):
        load_cifar10(data_dir=tmp_path / "elsewhere", progress=False)
    left = [path.name for path in (tmp_path / "elsewhere" / "cifar10").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []


def test_a_broken_folder_is_not_downloaded_over(tmp_path, archive):
    folder = tmp_path / "elsewhere" / "cifar10" / FOLDER
    folder.mkdir(parents=True)
    with pytest.raises(errors.DataError, match=r"lacks data_batch_1\.bin, data_batch_2\.bin"):
        load_cifar10(data_dir=tmp_path / "elsewhere", progress=False)
    assert archive.requests == []
