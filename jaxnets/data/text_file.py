"""Texts to model: a file in the data folder, tinyshakespeare by download, or twelve sonnets without one.

tinyshakespeare is 40,000 lines of Shakespeare's plays (Karpathy 2015, "The Unreasonable Effectiveness of
Recurrent Neural Networks", github.com/karpathy/char-rnn).
"""

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np

from jaxnets import errors
from jaxnets.data.datasets import check_digests, check_verify, data_folder, refuse_unknown
from jaxnets.data.download import download
from jaxnets.data.progress import Progress
from jaxnets.data.sonnets import SONNETS

_TINY = "tinyshakespeare"
_FILE = "input.txt"
_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_SIZE = 1_115_394
_NUM_CHARACTERS = 65
_RANDOM_SIZE = 200_000
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclasses.dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: that it was loaded by.
        text: all of it.
        source: where it came from and whether its bytes were verified, for the log.
    """

    name: str
    text: str
    source: str

    def split(self, share: float = 0.9) -> tuple[str, str]:
        """The part to learn from, and the rest to validate on.

        Args:
            share: of the characters that the first part has, rounded down, as nanoGPT has it.

        Raises:
            DataError: if a part would be empty.
        """
        size = int(len(self.text) * share)
        if not 0 < size < len(self.text):
            raise errors.DataError(
                f"{self.source}: {len(self.text)} characters are too few to split into two parts"
            )
        return self.text[:size], self.text[size:]


def load_text(
    name: str,
    *,
    data_dir: str | Path | None = None,
    verify: str = "warn",
    progress: Progress = True,
) -> Text:
    """Load a text.

    Args:
        name: "sonnets", which are part of the library; "random_text", 200,000 characters drawn from 65,
            for timing; "tinyshakespeare", downloaded (1.1 MB) to
            `data_dir/tinyshakespeare/input.txt` unless it is there; or a file in the data folder, as
            NAME, NAME.txt or NAME/input.txt, in UTF-8.
        data_dir: see `jaxnets.data.load`.
        verify: "warn" or "strict", for a tinyshakespeare that isn't the official one.
        progress: of a download, see `jaxnets.data.load`.

    Raises:
        ConfigError: if the name is none.
        DataError: if there is no such file, it can't be read, isn't UTF-8 or holds no text.

    Example:
        >>> train, validation = load_text("sonnets").split()
        >>> train[:15], len(train) > 8 * len(validation)
        ('From fairest cr', True)
    """
    check_verify(verify)
    if name == "random_text":
        return Text(name, _random_text(), "random characters, for timing")
    if name == "sonnets":
        return Text(name, SONNETS, "twelve of Shakespeare's sonnets, which come with the library")
    # The name becomes a path: one plain component, so that it can't lead out of the data folder.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise errors.ConfigError(
            f"{name!r} is no name of a text: letters, digits, '.', '_' and '-' only; for another folder "
            "say --data-dir"
        )
    folder = data_folder(data_dir, name)
    if name == _TINY:
        path = folder / name / _FILE
        if not path.is_file():
            download(_URL, path, size=_SIZE, sha256=_SHA256, progress=progress)
    else:
        places = [folder / name, folder / f"{name}.txt", folder / name / _FILE]
        found = [place for place in places if place.is_file()]
        if not found:
            raise errors.DataError(
                f"no text {name!r}: {' nor '.join(map(str, places))} is a file; without a download "
                "there are 'sonnets', and with one 'tinyshakespeare'"
            )
        path = found[0]
        refuse_unknown(path, verify)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise errors.DataError(f"{name}: can't read {path}: {error.strerror or error}") from None
    source = str(path)
    if name == _TINY:
        digest = hashlib.sha256(content).hexdigest()
        source = check_digests(
            name,
            str(path),
            {_FILE: digest},
            {_FILE: _SHA256},
            verify=verify,
            mend="remove it and it is downloaded again",
        )
    return Text(name, decode_text(content, str(path)), source)


def _random_text() -> str:
    """As many different characters as tinyshakespeare has."""
    characters = np.array([chr(ord("0") + i) for i in range(_NUM_CHARACTERS)])
    drawn = np.random.default_rng(0).integers(0, _NUM_CHARACTERS, _RANDOM_SIZE)
    return "".join(characters[drawn])


def decode_text(content: bytes, place: str) -> str:
    """The text of a file in UTF-8; its line ends become those of Unix.

    Args:
        content: of the file, perhaps with a byte order mark.
        place: its name, for the message.

    Raises:
        DataError: naming file and line, if it isn't UTF-8 or holds nothing but white space.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Of a byte order mark nothing is counted: `error.object` is what follows it.
        line = error.object[: error.start].count(b"\n") + 1
        raise errors.DataError(
            f"{place}, line {line}: byte 0x{error.object[error.start]:02x} isn't UTF-8: convert the file"
        ) from None
    if not text.strip():
        raise errors.DataError(f"{place}: holds no text")
    return text.replace("\r\n", "\n")
