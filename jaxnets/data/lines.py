"""The lines of text files."""

import gzip
import zlib
from pathlib import Path

from jaxnets import errors

_MARK = b"\xef\xbb\xbf"  # of the byte order, as some programs put it before UTF-8


def read_lines(path: Path) -> list[str]:
    """The lines of a file in UTF-8; blank ones too, but for the last.

    A line ends at a line feed, with or without a carriage return, and nowhere else.

    Args:
        path: plain, or packed if it ends in .gz.

    Raises:
        DataError: if it can't be read, or a line isn't UTF-8, naming it.
    """
    lines = read_content(path).removeprefix(_MARK).split(b"\n")
    if not lines[-1].strip():
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise errors.DataError(
                f"{path}, line {number:,}: not UTF-8 (byte {line[error.start]:#04x} at {error.start})"
            ) from None
    return texts


def read_content(path: Path) -> bytes:
    """The bytes of a file, unpacked if it ends in .gz.

    Raises:
        DataError: if it can't be read.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise errors.DataError(f"{path} can't be read: {errors.first_line(error)}") from error
