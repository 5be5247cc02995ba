import hashlib

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.train import files


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 1234])
def test_the_digest_of_a_large_file_is_that_of_its_pieces(tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    path = tmp_path / "x"
    path.write_bytes(content)
    whole = hashlib.sha256(content).hexdigest()
    pieces = b"".join(hashlib.sha256(content[i : i + 100]).digest() for i in range(0, size, 100))
    expected = whole if size <= 100 else f"100:{hashlib.sha256(pieces).hexdigest()}"
    assert files.digest(path, piece=100) == expected
    assert files.digest(path) == files.digest(path, piece=None) == whole
    for digest in (whole, expected):
        path.write_bytes(content)
        assert files.has_digest(path, digest)
        for place in range(0, size, 50):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            assert not files.has_digest(path, digest)
    path.write_bytes(content[100:] + content[:100])
    assert files.has_digest(path, expected) == (size in (0, 1, 99, 100))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.write_atomically(path, "old")

    def broken(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_what_an_error_says_is_one_line(tmp_path):
    assert errors.first_line(OSError(28, "No space left on device", "a")) == "No space left on device"
    assert errors.first_line(ValueError("one\ntwo")) == "one"
    assert errors.first_line(ValueError()) == "ValueError"
    assert errors.named_line(OSError(28, "No space", "a")) == "OSError: [Errno 28] No space: 'a'"
    assert errors.named_line(AssertionError()) == "AssertionError"
    assert files.existing(tmp_path / "a" / "b") == tmp_path
