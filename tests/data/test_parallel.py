"""Parallel corpora: two text files, the official ones of Multi30k, and what is made here."""

import gzip
import hashlib
import warnings

import pytest

from jaxnets import errors
from jaxnets.data import multi30k, phrases
from jaxnets.data.parallel import load_parallel, read_pairs, read_sentences

GERMAN, ENGLISH = ["Ein Hund.", "Zwei Kätzchen schlafen."], ["A dog.", "Two kittens sleep."]


def write(folder, part, sides, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines in sides.items():
        content = "".join(f"{line}\n" for line in lines).encode()
        name = f"{part}.{language}"
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture
def corpus(tmp_path):
    for part, zipped in (("train", True), ("val", False), ("test", True)):
        write(tmp_path / "mine", part, {"de": GERMAN, "en": ENGLISH}, zipped)
    return tmp_path / "mine"


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_two_text_files_plain_or_packed(corpus):
    found = load_parallel("mine", source="de", target="en", data_dir=corpus.parent)
    assert list(found.parts) == ["train", "val", "test"]
    for pairs in found.parts.values():
        assert list(pairs.source) == GERMAN
        assert list(pairs.target) == ENGLISH
    assert found.parts["val"].places == (str(corpus / "val.de"), str(corpus / "val.en"))
    other = load_parallel("mine", source="en", target="de", data_dir=corpus.parent)
    assert list(other.parts["test"].source) == ENGLISH


def test_a_last_line_without_an_end_counts_and_blanks_do_not(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"  eins \r\nzwei")
    assert read_sentences(path) == ["eins", "zwei"]


def test_unequal_numbers_of_lines(corpus):
    write(corpus, "val", {"en": [*ENGLISH, "A third."]})
    with pytest.raises(errors.DataError) as error:
        load_parallel("mine", source="de", target="en", data_dir=corpus.parent)
    text = message(error)
    assert f"{corpus / 'val.de'} has 2 lines and {corpus / 'val.en'} has 3" in text
    assert "from line 3 on" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"gut\n\xfckatze\n", r"text, line 2: not UTF-8 \(byte 0xfc at 0\)"),
        (b"gut\n \t\nbesser\n", "text, line 2: empty"),
        (b"gut\n\n", "text, line 2: empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, expected):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(errors.DataError, match=expected) as error:
        read_sentences(path)
    message(error)


def test_damaged_missing_and_empty_files(tmp_path, corpus):
    path = corpus / "train.de.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(errors.DataError, match=r"train\.de\.gz can't be read"):
        load_parallel("mine", source="de", target="en", data_dir=corpus.parent)
    path.unlink()
    with pytest.raises(errors.DataError, match=r"has neither train\.de nor train\.de\.gz"):
        load_parallel("mine", source="de", target="en", data_dir=corpus.parent)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(errors.DataError, match="no sentences"):
        read_pairs(tmp_path / "a", tmp_path / "b")


def test_names(tmp_path):
    with pytest.raises(errors.ConfigError, match="did you mean 'phrases'"):
        load_parallel("phrase", source="de", target="en", data_dir=tmp_path)
    with pytest.raises(errors.ConfigError, match="no name of a folder"):
        load_parallel("../mine", source="de", target="en", data_dir=tmp_path)
    with pytest.raises(errors.ConfigError, match="both 'de'"):
        load_parallel("phrases", source="de", target="de")
    for name in ("phrases", "multi30k"):
        with pytest.raises(errors.ConfigError, match="language of"):
            load_parallel(name, source="dr", target="en", data_dir=tmp_path)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Multi30k of two pairs, which are made the official ones."""
    folder, official = tmp_path / "multi30k", {}
    for stem in ("train", "val", "test_2016_flickr"):
        write(folder, stem, {"de": GERMAN, "en": ENGLISH}, zipped=True)
    for path in folder.iterdir():
        content = path.read_bytes()
        digests = [hashlib.sha256(x).hexdigest() for x in (content, gzip.decompress(content))]
        official[path.name] = (len(content), *digests)
    monkeypatch.setattr(multi30k, "_OFFICIAL", official)
    monkeypatch.setattr(multi30k, "_COUNTS", {"train": 2, "val": 2, "test": 2})
    return folder


def test_multi30k(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_parallel(
            "multi30k", source="de", target="en", data_dir=small.parent, verify="strict"
        )
    assert found.source == f"{small} (official files, SHA-256 verified)"
    assert list(found.parts["test"].target) == ENGLISH


def test_multi30k_of_other_bytes_or_lines(small, monkeypatch):
    write(small, "val", {"de": GERMAN[::-1]}, zipped=True)
    load = {"source": "de", "target": "en", "data_dir": small.parent}
    with pytest.warns(UserWarning, match=r"not the official SHA-256 for 1 of 6 files .*val\.de\.gz"):
        load_parallel("multi30k", **load)
    with pytest.raises(errors.DataError, match="not the official SHA-256"):
        load_parallel("multi30k", verify="strict", **load)
    monkeypatch.setattr(multi30k, "_COUNTS", {"train": 2, "val": 3, "test": 2})
    with pytest.raises(errors.DataError, match="has 2 lines, expected 3"):
        load_parallel("multi30k", **load)


def test_multi30k_unpacked(small):
    """A plain file is read in place of the packed one, so it is the one that is verified."""
    load = {"source": "de", "target": "en", "data_dir": small.parent, "verify": "strict"}
    write(small, "test_2016_flickr", {"en": ENGLISH})
    assert load_parallel("multi30k", **load).source.endswith("SHA-256 verified)")
    write(small, "test_2016_flickr", {"en": ["Tampered.", *ENGLISH[1:]]})
    with pytest.raises(errors.DataError, match=r"1 of 6 files .*test_2016_flickr\.en\.gz"):
        load_parallel("multi30k", **load)


def test_multi30k_is_downloaded(small, monkeypatch, tmp_path):
    there = {path.name: path.read_bytes() for path in small.iterdir()}
    asked = []

    def download(url, target, *, size, sha256, progress):
        asked.append((url, size, sha256))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(there[target.name])

    monkeypatch.setattr(multi30k, "download", download)
    found = load_parallel(
        "multi30k", source="de", target="en", data_dir=tmp_path / "new", progress=False
    )
    assert list(found.parts["train"].source) == GERMAN
    assert len(asked) == 6
    assert asked[0][0].startswith(
        "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
    )
    assert asked[0][1:] == multi30k._OFFICIAL["train.de.gz"][:2]


def test_phrases_are_the_same_everywhere_and_in_one_part_only():
    parts = phrases.load_phrases().parts
    assert {name: len(pairs) for name, pairs in parts.items()} == {
        "train": 4000,
        "val": 200,
        "test": 200,
    }
    everything = [s for pairs in parts.values() for s in pairs.source]
    assert len(set(everything)) == len(everything)
    lines = "".join(
        f"{a}\t{b}\n" for p in parts.values() for a, b in zip(p.source, p.target, strict=True)
    )
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "965b06089245c5b9"
    turned = phrases.load_phrases(source="en", target="de").parts["val"]
    assert list(turned.source) == list(parts["val"].target)
