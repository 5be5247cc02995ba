"""Words and n-grams as numbers: vocabularies made of the training texts alone, kept as bytes."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxnets import errors
from jaxnets.data.tokenizer_library import library

PAD, UNKNOWN = "<pad>", "<unk>"
# Words with their apostrophes, and each sign by itself.
_WORD = r"\w+(?:'\w+)*|[^\w\s]"


class Words:
    """The most frequent words of some texts, in lower case; 0 is for padding and 1 for all others.

    Args:
        tokenizer: of the library `tokenizers`; see `of_texts` and `from_bytes`.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # "<pad>" written in a text is a word like others; the library doesn't keep this.
        tokenizer.encode_special_tokens = True

    @classmethod
    def of_texts(cls, texts: Sequence[str], size: int) -> "Words":
        """The words of texts, the most frequent first, equals in the order of their letters.

        Args:
            texts: to learn them from.
            size: V, of the vocabulary with its two special tokens, at least 3.

        Raises:
            ConfigError: if the size is less, or `tokenizers` isn't installed.
        """
        if size < 3:
            raise errors.ConfigError(f"a vocabulary has at least 3 entries, not {size}")
        tokenizers = library()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.Replace(tokenizers.Regex(r"<br\s*/?>"), " "),
                tokenizers.normalizers.NFKC(),
                tokenizers.normalizers.Lowercase(),
            ]
        )
        pattern = tokenizers.Regex(_WORD)
        # The words are what lies between what isn't one.
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "removed", invert=True)
        trainer = tokenizers.trainers.WordLevelTrainer(
            vocab_size=size, special_tokens=[PAD, UNKNOWN], show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer, length=len(texts))
        return cls(tokenizer)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Words":
        """What `to_bytes` gave.

        Raises:
            ConfigError: if it isn't that.
        """
        tokenizers = library()
        try:
            return cls(tokenizers.Tokenizer.from_str(content.decode()))
        except Exception as error:  # of the library, which knows only this one
            reason = errors.first_line(error)
            raise errors.ConfigError(f"the vocabulary can't be read: {reason}") from error

    def to_bytes(self) -> bytes:
        """All of it, in the library's own JSON."""
        return self._tokenizer.to_str(pretty=True).encode()

    def __len__(self) -> int:
        """V."""
        return self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's words, int32 `[T]`."""
        encoded = self._tokenizer.encode_batch_fast(list(texts))
        return [np.array(found.ids, np.int32) for found in encoded]

    def words(self, numbers: Sequence[int]) -> list[str]:
        """The words of numbers."""
        return [self._tokenizer.id_to_token(int(number)) or UNKNOWN for number in numbers]


class NGrams:
    """The most frequent runs of 1 to n words, numbered from 1; 0 is for padding.

    Args:
        keys: int64 `[V - 1]`, sorted: a run as digits in base `base`, each the word's number.
        order: n.
        base: above the greatest number of a word.
    """

    def __init__(self, keys: np.ndarray, order: int, base: int):
        self._keys, self._order, self._base = keys, order, base

    @classmethod
    def of_encoded(cls, texts: Sequence[np.ndarray], size: int, order: int, base: int) -> "NGrams":
        """Those that most texts have, of equals those of fewer and more frequent words first.

        Args:
            texts: words as numbers, int `[T]` each.
            size: V, at most.
            order: n.
            base: above the greatest number of a word.

        Raises:
            ConfigError: if so many numbers don't fit 63 bits.
        """
        if size < 2:
            raise errors.ConfigError(f"a vocabulary of runs has at least 2 entries, not {size}")
        if order < 1 or base**order >= 2**63:
            raise errors.ConfigError(f"runs of 1 to {order} of {base:,} words have too many numbers")
        keys, owners = _runs(texts, order, base)
        found, numbers = np.unique(keys, return_inverse=True)
        counts = np.bincount(_once(owners, numbers, len(found))[1], minlength=len(found))
        chosen = np.argsort(-counts, kind="stable")[: size - 1]
        return cls(np.sort(found[chosen]), order, base)

    @classmethod
    def from_bytes(cls, content: bytes) -> "NGrams":
        """What `to_bytes` gave.

        Raises:
            ConfigError: if it isn't that.
        """
        try:
            head, _, rest = content.partition(b"\n")
            fields = json.loads(head)
            keys = np.load(io.BytesIO(rest), allow_pickle=False)
            return cls(keys, int(fields["order"]), int(fields["base"]))
        except (ValueError, KeyError, EOFError) as error:
            raise errors.ConfigError(f"the n-grams can't be read: {errors.first_line(error)}") from None

    def to_bytes(self) -> bytes:
        """All of it: a line of JSON, and the keys in NumPy's format."""
        content = io.BytesIO()
        np.save(content, self._keys, allow_pickle=False)
        head = json.dumps({"order": self._order, "base": self._base})
        return head.encode() + b"\n" + content.getvalue()

    def __len__(self) -> int:
        """V."""
        return len(self._keys) + 1

    def encode(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each text's known runs, each once, int32 `[T]`, in the order of their numbers."""
        keys, owners = _runs(texts, self._order, self._base)
        places = np.searchsorted(self._keys, keys)
        is_known = np.append(self._keys, -1)[places] == keys
        owners, numbers = _once(owners[is_known], places[is_known] + 1, len(self))
        ends = np.searchsorted(owners, np.arange(1, len(texts)))
        return np.split(numbers.astype(np.int32), ends)


def _runs(texts: Sequence[np.ndarray], order: int, base: int) -> tuple[np.ndarray, np.ndarray]:
    """The runs of known words in texts, as numbers, and the text that each is in."""
    words = np.concatenate([np.zeros(0, np.int64), *texts]).astype(np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    is_run, key, keys, owners = words > 1, words, [], []
    for n in range(order):
        if n:  # each run that goes on with a known word of the same text
            goes_on = (words[n:] > 1) & (owner[n:] == owner[: len(owner) - n])
            key = key[:-1] * base + words[n:]
            is_run = is_run[:-1] & goes_on
        keys.append(key[is_run])
        owners.append(owner[: len(key)][is_run])
        if len(key) < 2:
            break
    return np.concatenate(keys), np.concatenate(owners)


def _once(owners: np.ndarray, numbers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, in order; numbers are below size."""
    pairs = owners.astype(np.int64) * size + numbers
    pairs.sort()  # of millions several times as fast as np.unique, which hashes them
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)]]
    return pairs // size, pairs % size


def pad(
    texts: Sequence[np.ndarray] | Sequence[Sequence[int]], length: int, *, keep: str = "last"
) -> tuple[np.ndarray, np.ndarray]:
    """Texts in the rows of an array, padded behind; of longer ones a part.

    Args:
        texts: numbers `[T]` each.
        length: of the rows.
        keep: "first" or "last", which part of a longer one.

    Returns:
        int32 `[N, length]`, and the lengths, int32 `[N]`.
    """
    rows = np.zeros((len(texts), length), np.int32)
    sizes = np.array([min(len(text), length) for text in texts], np.int32)
    for row, text, size in zip(rows, texts, sizes, strict=True):
        row[:size] = text[:size] if keep == "first" else text[len(text) - size :]
    return rows, sizes
