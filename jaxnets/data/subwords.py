"""Text as subwords: byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909), by `tokenizers`.

It begins with bytes, so there is no unknown word: what was encoded is decoded to the same text, but for
blanks at its ends, Unicode's normal form, and capital letters where they are made small. Tokens 0, 1 and
2 stand for padding and for where a sentence begins and ends; no text is ever encoded to them.
"""

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jaxnets import errors
from jaxnets.data.tokenizer_library import learn_byte_pairs, library

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BEGIN, END = 0, 1, 2
_NUM_SPECIAL = 3
_NUM_BYTES = 256


class Subwords:
    """A vocabulary of subwords.

    Args:
        content: as `to_bytes` gives it.

    Raises:
        ConfigError: if the content isn't that of such a vocabulary.
    """

    def __init__(self, content: bytes):
        tokenizers = library()
        try:
            self._tokenizer: Tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises that very class
            why = errors.first_line(error)
            raise errors.ConfigError(f"this is no vocabulary of subwords: {why}") from None

    @classmethod
    def learn(cls, texts: Iterable[str], size: int, *, lowercase: bool = False) -> "Subwords":
        """Merge the commonest pairs of bytes and subwords until there are so many.

        Args:
            texts: to learn from, such as both sides of the training text.
            size: V, at least 259; there may be fewer for a small text.
            lowercase: whether capital letters become small ones, here and in all that is encoded.

        Raises:
            ConfigError: if the size is too small.

        Example:
            >>> subwords = Subwords.learn(["ein Mann", "ein Mann und ein Hund"], 270)
            >>> subwords.decode(subwords.encode("ein Hund, ein Mann"))
            'ein Hund, ein Mann'
        """
        if size < _NUM_SPECIAL + _NUM_BYTES:
            raise errors.ConfigError(
                f"a vocabulary of subwords has at least {_NUM_SPECIAL + _NUM_BYTES} tokens, not {size}"
            )
        known = library().normalizers
        steps = [known.NFC(), known.Lowercase()] if lowercase else [known.NFC()]
        return cls(
            learn_byte_pairs(
                texts,
                size - _NUM_SPECIAL,
                add_prefix_space=True,
                normalizer=known.Sequence(steps),
            )
        )

    def to_bytes(self) -> bytes:
        """What a file of it holds, JSON of the library `tokenizers`."""
        return self._tokenizer.to_str().encode()

    def __len__(self) -> int:
        """V."""
        return self._tokenizer.get_vocab_size() + _NUM_SPECIAL

    def encode(self, text: str) -> list[int]:
        """A text as tokens, with `END` behind them.

        Raises:
            DataError: if the text is empty.
        """
        if not text.strip():
            raise errors.DataError("an empty text can't be encoded")
        return [i + _NUM_SPECIAL for i in self._tokenizer.encode(text).ids] + [END]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, up to the first `END`; padding and `BEGIN` are without effect."""
        ids = []
        for token in tokens:
            if token == END:
                break
            if token >= _NUM_SPECIAL:
                ids.append(int(token) - _NUM_SPECIAL)
        return self._tokenizer.decode(ids).strip()

    def unlearnt(self, text: str) -> set[str]:
        """The characters of a text, beyond ASCII, that no subword holds whole.

        Example:
            >>> subwords = Subwords.learn(["ein Käse", "ein Käse und ein Käfer"], 280)
            >>> subwords.unlearnt("Käse, мир") == set("мир")
            True
        """
        normal = self._tokenizer.normalizer.normalize_str(text)
        characters = {c for c in normal if not c.isascii() and not c.isspace()}
        level = library().pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return {c for c in characters if level.pre_tokenize_str(c)[0][0] not in self._pieces}

    @functools.cached_property
    def _pieces(self) -> str:
        return "\n".join(self._tokenizer.get_vocab())

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token, for pictures."""
        names = {PAD: "", BEGIN: "<s>", END: "</s>"}
        each = (
            self._tokenizer.decode([int(t) - _NUM_SPECIAL]) if t >= 3 else names[int(t)] for t in tokens
        )
        # A part of a letter is no text.
        return ["".join(c if unicodedata.category(c)[0] != "C" else "?" for c in text) for text in each]


def encode_all(subwords: Subwords, texts: Sequence[str], places: str = "") -> list[list[int]]:
    """Texts as tokens; an error names the line.

    Raises:
        DataError: if a text is empty.
    """
    tokens = []
    for number, text in enumerate(texts, 1):
        try:
            tokens.append(subwords.encode(text))
        except errors.DataError as error:
            raise errors.DataError(f"{places or 'text'}, line {number:,}: {error}") from None
    return tokens
