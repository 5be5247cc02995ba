import hashlib

import pytest

from jaxnets import errors
from jaxnets.data import load_text, text_file

TEXT = "Thou éwe,\nthou lamb.\n" * 20


def test_the_sonnets_need_nothing(tmp_path):
    text = load_text("sonnets", data_dir=tmp_path / "nothing")
    assert text.text.count("\n\n") == 11
    assert "twelve of Shakespeare's sonnets" in text.source
    train, validation = text.split()
    assert train + validation == text.text
    assert len(train) == int(0.9 * len(text.text))


@pytest.mark.parametrize("place", ["mine", "mine.txt", "mine/input.txt"])
def test_any_file_in_the_data_folder(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    text = load_text("mine", data_dir=tmp_path)
    assert (text.text, text.source) == (TEXT, str(path))


def test_a_text_that_is_not_there_names_the_places(tmp_path):
    with pytest.raises(errors.DataError, match=r"no text 'mine': .*mine nor .*mine\.txt nor .*put\.txt"):
        load_text("mine", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["../etc", "a/b", ".hidden", ""])
def test_a_name_leads_nowhere_else(tmp_path, name):
    with pytest.raises(errors.ConfigError, match="is no name of a text"):
        load_text(name, data_dir=tmp_path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_broken_utf8_names_file_and_line(tmp_path, mark):
    (tmp_path / "mine").write_bytes(mark + "né\nzwei\n".encode() + b"dr\xffei\n")
    with pytest.raises(errors.DataError, match=r"mine, line 3: byte 0xff isn't UTF-8") as error:
        load_text("mine", data_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_text(tmp_path, content):
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(errors.DataError, match="mine: holds no text"):
        load_text("mine", data_dir=tmp_path)


def test_a_text_of_one_character_does_not_split(tmp_path):
    (tmp_path / "mine").write_text("a")
    with pytest.raises(errors.DataError, match="1 characters are too few"):
        load_text("mine", data_dir=tmp_path).split()


@pytest.fixture
def official(monkeypatch, serve):
    """A small text on a local server in place of tinyshakespeare."""
    content = TEXT.encode()
    server = serve(content)
    monkeypatch.setattr(text_file, "_URL", f"{server.url}/good")
    monkeypatch.setattr(text_file, "_SIZE", len(content))
    monkeypatch.setattr(text_file, "_SHA256", hashlib.sha256(content).hexdigest())
    return server


def test_tinyshakespeare_is_downloaded_once(tmp_path, official):
    for _ in range(2):
        text = load_text("tinyshakespeare", data_dir=tmp_path, verify="strict", progress=False)
        assert text.text == TEXT
        assert text.source.endswith("(official files, SHA-256 verified)")
    assert len(official.requests) == 1
    assert (tmp_path / "tinyshakespeare" / "input.txt").read_bytes() == TEXT.encode()


def test_a_download_of_other_bytes_is_refused(tmp_path, official, monkeypatch):
    monkeypatch.setattr(text_file, "_URL", f"{official.url}/wrong")
    with pytest.raises(errors.DataError, match="SHA-256"):
        load_text("tinyshakespeare", data_dir=tmp_path, progress=False)
    assert not (tmp_path / "tinyshakespeare" / "input.txt").exists()


def test_another_edition_of_it(tmp_path, official):
    path = tmp_path / "tinyshakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_text(TEXT + "More.")
    with pytest.warns(UserWarning, match="not the official SHA-256"):
        assert load_text("tinyshakespeare", data_dir=tmp_path).text.endswith("More.")
    with pytest.raises(errors.DataError, match="remove it and it is downloaded again"):
        load_text("tinyshakespeare", data_dir=tmp_path, verify="strict")


def test_the_official_digest():
    """Of the file that char-rnn has had since 2015."""
    assert text_file._SIZE == 1_115_394
    assert text_file._SHA256.startswith("86c4e6aa9db7c042ec79f339dcb96d42")
