"""The library `tokenizers`, which the extra `text` installs, and byte pairs learnt by it."""

from collections.abc import Iterable
from typing import Any

from jaxnets import errors


def library() -> Any:
    """The library with the parts that are used here.

    Raises:
        ConfigError: if it isn't installed.
    """
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise errors.ConfigError(
            "words, subwords and byte pairs need the library tokenizers, which isn't installed: "
            "pip install 'jaxnets[text]'"
        ) from None
    return tokenizers


def learn_byte_pairs(
    texts: Iterable[str], size: int, *, add_prefix_space: bool, normalizer: Any = None
) -> bytes:
    """Bytes, and the commonest pairs of tokens, merged until there are so many.

    Args:
        texts: to learn from.
        size: of the vocabulary, at least 256; there may be fewer for a small text.
        add_prefix_space: whether a text begins as if there were a blank before it.
        normalizer: of the library, for all texts; none by default.

    Returns:
        the tokenizer in the library's JSON.
    """
    tokenizers = library()
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=sorted(level.alphabet())
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()
