"""Text as tokens and back: its characters, or byte pairs (Sennrich et al. 2016, arXiv 1508.07909).

A vocabulary becomes bytes that `read_tokenizer` reads again, to be kept with the model.
"""

import codecs
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from jaxnets import errors
from jaxnets.data.tokenizer_library import learn_byte_pairs, library

TOKENS = ("characters", "bpe")
_MAX_TOKENS = 2**16  # so that tokens take two bytes at most


class Tokenizer(Protocol):
    """Both kinds."""

    @property
    def size(self) -> int:
        """V, how many tokens there are."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, uint8 or uint16 `[N]`."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, in UTF-8; a part of a character, perhaps."""
        ...

    def to_bytes(self) -> bytes:
        """The vocabulary, for `read_tokenizer`."""
        ...


@dataclasses.dataclass(frozen=True)
class Characters:
    """One token for each character.

    Args:
        characters: of the vocabulary; a character's place is its token.

    Raises:
        DataError: if there are none, one comes twice, or they are too many for two bytes.

    Example:
        >>> tokenizer = Characters("abc")
        >>> tokenizer.encode("cab").tolist(), decode(tokenizer, [2, 0])
        ([2, 0, 1], 'ca')
    """

    characters: str

    def __post_init__(self) -> None:
        if not 0 < len(self.characters) <= _MAX_TOKENS or len(self._places) != len(self.characters):
            raise errors.DataError(
                f"a vocabulary has 1 to {_MAX_TOKENS:,} different characters, not {len(self.characters)}"
            )

    @classmethod
    def of(cls, text: str) -> "Characters":
        """All that the text has, sorted."""
        return cls("".join(sorted(set(text))))

    @property
    def size(self) -> int:
        """V."""
        return len(self.characters)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, `[N]`.

        Raises:
            DataError: if it has a character that isn't in the vocabulary.
        """
        try:
            tokens = [self._places[character] for character in text]
        except KeyError as error:
            place = text.index(error.args[0])
            line = text.count("\n", 0, place) + 1
            raise errors.DataError(
                f"line {line}: {error.args[0]!r} is none of the vocabulary's {self.size} characters"
            ) from None
        return np.array(tokens, _dtype(self.size))

    def token_bytes(self, token: int) -> bytes:
        """The character, in UTF-8."""
        return self.characters[token].encode()

    def to_bytes(self) -> bytes:
        """The vocabulary as JSON."""
        return json.dumps({"characters": self.characters}).encode()


class BytePairs:
    """Bytes, and pairs of tokens that were frequent where it was trained; it can write any text.

    Args:
        vocabulary: as `to_bytes` gives it.

    Raises:
        ConfigError: if the library `tokenizers` isn't installed.
        DataError: if it can't read the vocabulary.
    """

    def __init__(self, vocabulary: bytes):
        tokenizers = library()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(vocabulary.decode())
        except Exception as error:  # the library has no type of its own
            raise errors.DataError(f"no vocabulary of byte pairs: {errors.first_line(error)}") from None

    @classmethod
    def of(cls, text: str, size: int) -> "BytePairs":
        """Train one.

        Args:
            text: to count pairs in.
            size: V, at most; at least 256, the bytes.

        Raises:
            ConfigError: if the size is out of range, or the library `tokenizers` isn't installed.
        """
        if not 256 <= size <= _MAX_TOKENS:
            raise errors.ConfigError(f"byte pairs take 256 to {_MAX_TOKENS:,} tokens, not {size}")
        # By lines, as the tokenizer cuts at spaces anyway.
        return cls(learn_byte_pairs(text.splitlines(keepends=True), size, add_prefix_space=False))

    @property
    def size(self) -> int:
        """V."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, `[N]`."""
        return np.array(self._tokenizer.encode(text).ids, _dtype(self.size))

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes."""
        return bytes(_BYTES[letter] for letter in self._tokenizer.id_to_token(token))

    def to_bytes(self) -> bytes:
        """The vocabulary as JSON, in the form of the library."""
        return self._tokenizer.to_str().encode()


def make_tokenizer(kind: str, text: str, *, train: str, size: int) -> Tokenizer:
    """A vocabulary for a text.

    Args:
        kind: "characters" or "bpe".
        text: all of it, whose characters there must be tokens for.
        train: the part that byte pairs are counted in.
        size: V of byte pairs, at most.

    Raises:
        ConfigError: if there is no such kind, the size is out of range, or a library is missing.
        DataError: if the text has too many characters.
    """
    if kind not in TOKENS:
        raise errors.unknown("kind of token", kind, TOKENS)
    return Characters.of(text) if kind == "characters" else BytePairs.of(train, size)


def read_tokenizer(vocabulary: bytes) -> Tokenizer:
    """The tokenizer that `to_bytes` wrote.

    Raises:
        DataError: if these are no such bytes.
    """
    try:
        found = json.loads(vocabulary)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise errors.DataError("the vocabulary isn't one: no JSON object")
    if isinstance(found.get("characters"), str):
        return Characters(found["characters"])
    return BytePairs(vocabulary)


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of tokens; bytes that are no character become U+FFFD."""
    return "".join(decode_stream(tokenizer, tokens))


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come: of each as many characters as are whole by then.

    Example:
        >>> tokenizer = Characters("aé")
        >>> list(decode_stream(tokenizer, [1, 0]))
        ['é', 'a', '']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.token_bytes(int(token)))
    yield decoder.decode(b"", final=True)


def _dtype(size: int) -> type[np.generic]:
    return np.uint8 if size <= 2**8 else np.uint16


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in GPT-2's vocabulary (Radford et al. 2019).

    So the library has it, too. Printable characters stand for themselves, the others for those
    from 256 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_letters()
