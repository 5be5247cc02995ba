import gzip

import pytest

from jaxnets import errors
from jaxnets.data.lines import read_lines


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path, ending, mark):
    lines = ["one \x0c\u2028\u0085 two", "", "drei"]
    path = tmp_path / "lines.txt"
    path.write_bytes((mark + ending.join(lines)).encode())
    assert read_lines(path) == lines
    path.write_bytes((mark + "".join(line + ending for line in lines)).encode())
    assert read_lines(path) == lines


def test_packed_and_empty(tmp_path):
    (tmp_path / "lines.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert read_lines(tmp_path / "lines.gz") == ["one", "two"]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert read_lines(tmp_path / "empty.txt") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt can't be read: .*No such file"),
        ("a.gz", b"no archive", "a.gz can't be read: "),
        ("a.txt", b"fine\nb\xffd\n", r"a.txt, line 2: not UTF-8 \(byte 0xff at 1\)"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.DataError, match=message):
        read_lines(tmp_path / name)
