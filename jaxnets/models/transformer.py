"""The transformer (Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762).

An encoder-decoder from tokens to logits, of the stacks in `transformer_stack`. Embeddings start normal
with deviation `D ** -0.5` and are multiplied by `D ** 0.5`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxnets import errors, ops
from jaxnets.layers import Dropout, Embedding, Linear, constrain
from jaxnets.models.transformer_stack import Decoder, Encoder, LayerFields
from jaxnets.typing import Array

POSITIONS = ("sinusoidal", "learned")

_glorot = nn.initializers.glorot_uniform()


class Transformer(nn.Module):
    """An encoder-decoder from tokens to logits.

    Attributes:
        vocabulary_size: V, of both sides, which share one table; it also gives the logits.
        source_vocabulary_size: of the source, which then has a table of its own; None for sharing.
        max_length: the longest S and T.
        num_layers: L, of the encoder and of the decoder each.
        width: D.
        num_heads: N.
        hidden: F.
        dropout_rate: probability of dropping an element, also of the embeddings.
        norm_first: as of `LayerFields`.
        use_final_norm: as of `Encoder`.
        activation: as of `LayerFields`.
        positions: "sinusoidal", or "learned" tables.
        tie_embeddings: whether the logits come from the target's table or from a kernel of their own.
        dtype: of the computation and the logits; that of the parameters by default.

    Example:
        >>> import jax
        >>> model = Transformer(vocabulary_size=20, num_layers=1, width=8, num_heads=2, hidden=16)
        >>> tokens = {"source": jnp.ones((2, 5), int), "target": jnp.ones((2, 3), int)}
        >>> model.init_with_output(jax.random.key(0), tokens)[0].shape
        (2, 3, 20)
    """

    vocabulary_size: int
    source_vocabulary_size: int | None = None
    max_length: int = 256
    num_layers: int = 6
    width: int = 512
    num_heads: int = 8
    hidden: int = 2048
    dropout_rate: float = 0.0
    norm_first: bool = True
    use_final_norm: bool | None = None
    activation: str = "relu"
    positions: str = "sinusoidal"
    tie_embeddings: bool = True
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Make the parts."""
        if self.positions not in POSITIONS:
            raise errors.unknown("kind of positions", self.positions, POSITIONS)
        names = [field.name for field in dataclasses.fields(LayerFields)]
        fields = LayerFields(**{n: getattr(self, n) for n in names if hasattr(self, n)})

        def table(size: int) -> Embedding:
            init = nn.initializers.normal(self.width**-0.5)
            return Embedding(size, self.width, self.dtype, init, axis="vocabulary")

        self.embedding = table(self.vocabulary_size)
        if self.source_vocabulary_size is not None:
            self.source_embedding = table(self.source_vocabulary_size)
        if self.positions == "learned":
            place = nn.initializers.normal(0.02)
            self.source_positions = Embedding(self.max_length, self.width, self.dtype, place)
            self.target_positions = Embedding(self.max_length, self.width, self.dtype, place)
        self.encoder = Encoder(self.num_layers, fields, self.use_final_norm)
        self.decoder = Decoder(self.num_layers, fields, self.use_final_norm)
        self.source_dropout = Dropout(self.dropout_rate)
        self.target_dropout = Dropout(self.dropout_rate)
        if not self.tie_embeddings:
            self.head = Linear(
                (self.vocabulary_size,), use_bias=False, dtype=self.dtype, kernel_init=_glorot
            )

    def __call__(
        self,
        tokens: Mapping[str, Array],
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Mapping[str, Array] | Array | None = None,
    ) -> Array:
        """Predict the token after each one of the target.

        Args:
            tokens: integers in [0, V): "source" `[B, S]`, and "target" `[B, T]`, which begins with the
                token that begins a sentence. Others make NaN.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout masks belong.
            mask: booleans "source" `[B, S]` and "target" `[B, T]`, each of which may be left out, false
                for padding. A mask `[B]` of rows that only fill up a batch is without effect.

        Returns:
            logits `[B, T, V]`.

        Raises:
            ValueError: if the tokens aren't such integers, or more than max_length, or the mask is
                another.
        """
        masks = masks_of(mask)
        memory_BSD = self.encode(tokens["source"], train=train, rows=rows, mask=masks.get("source"))
        x_BTD = self._embedded(tokens["target"], "target", train, rows)
        x_BTD = self.decoder(
            x_BTD,
            memory_BSD,
            train=train,
            rows=rows,
            mask=masks.get("target"),
            memory_mask=masks.get("source"),
        )
        return self._logits(x_BTD)

    def encode(
        self,
        source: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """The encoder's output `[B, S, D]` of tokens `[B, S]`."""
        return self.encoder(
            self._embedded(source, "source", train, rows), train=train, rows=rows, mask=mask
        )

    def begin(
        self, source: Array, *, mask: Array | None = None, num_beams: int = 1, max_length: int
    ) -> tuple[Any, Any]:
        """What `step` needs: of the source, and of the W sequences that grow, which are empty yet.

        Args:
            source: integers `[B, S]`.
            mask: boolean `[B, S]`.
            num_beams: W, for each row.
            max_length: T, to which they may grow.

        Returns:
            memory, whose arrays begin with B, and the cache, whose arrays begin with `[B, W]`.

        Raises:
            ValueError: if they may grow longer than the model takes.
        """
        if max_length > self.max_length:
            raise ValueError(f"sequences of {max_length}; this model takes at most {self.max_length}")
        memory_BSD = self.encode(source, mask=mask)
        known = self.decoder.remember(memory_BSD)
        heads = (self.num_heads, self.width // self.num_heads)
        empty = jnp.zeros((len(source), num_beams, max_length, *heads), memory_BSD.dtype)
        return (known, mask), ((empty, empty),) * self.num_layers

    def step(self, tokens: Array, position: Array, cache: Any, memory: Any) -> tuple[Array, Any]:
        """The logits after one more token of each sequence.

        Args:
            tokens: integers `[B, W]`.
            position: which place of the sequence they are, from 0, a scalar.
            cache: of the places before.
            memory: of the source.

        Returns:
            logits `[B, W, V]`, and the cache with this place.
        """
        known, mask = memory
        x_BWD = self._scaled(self.embedding(tokens)) + self._places("target", position)[None, None]
        x_BWD, cache = self.decoder.step(x_BWD, cache, position, known, mask)
        return self._logits(x_BWD), cache

    def _embedded(self, tokens: Array, side: str, train: bool, rows: Array | None) -> Array:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"{side} tokens are integers [B, T], not {tokens.dtype} {tokens.shape}")
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"{length} {side} tokens in a row; this model takes at most {self.max_length}"
            )
        has_own = side == "source" and self.source_vocabulary_size is not None
        table = self.source_embedding if has_own else self.embedding
        x_BTD = ops.add_bias(self._scaled(table(tokens)), self._places(side, jnp.arange(length)))
        dropout = self.source_dropout if side == "source" else self.target_dropout
        return constrain(dropout(x_BTD, train=train, rows=rows), "batch", "time", None)

    def _scaled(self, x: Array) -> Array:
        return x * jnp.asarray(self.width**0.5, x.dtype)

    def _places(self, side: str, index: Array) -> Array:
        """`[..., D]` of places `[...]`."""
        if self.positions == "learned":
            return (self.source_positions if side == "source" else self.target_positions)(index)
        table = jnp.asarray(sinusoids(self.max_length, self.width))
        return table[index].astype(self.dtype or self.embedding.embedding.dtype)

    def _logits(self, x_BTD: Array) -> Array:
        logits_BTV = self.embedding.attend(x_BTD) if self.tie_embeddings else self.head(x_BTD)
        return constrain(logits_BTV, "batch", None, "vocabulary")


def sinusoids(length: int, width: int) -> np.ndarray:
    """Places as sines and cosines of wavelengths from 2 pi to 10,000 x 2 pi, in turns.

    `[t, 2 i] = sin(t / 10000 ** (2 i / D))`, and the cosine at 2 i + 1.

    Args:
        length: T.
        width: D.

    Returns:
        float64 `[T, D]`.

    Example:
        >>> sinusoids(2, 2).round(4).tolist()
        [[0.0, 1.0], [0.8415, 0.5403]]
    """
    angle = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, width, 2)[None] / width)
    table = np.stack([np.sin(angle), np.cos(angle)], axis=2).reshape(length, -1)
    return table[:, :width]


def masks_of(mask: Mapping[str, Array] | Array | None) -> Mapping[str, Array]:
    """The masks of source and target that a translation model was given.

    Raises:
        ValueError: if it is neither a mapping of these alone nor a mask `[B]` of rows, which has none.
    """
    if mask is None or (not isinstance(mask, Mapping) and mask.ndim == 1):
        return {}
    if not isinstance(mask, Mapping):
        raise ValueError(
            f'a mask {mask.shape} is of which side? {{"source": ..., "target": ...}} says it'
        )
    if unknown := sorted(set(mask) - {"source", "target"}):
        raise ValueError(f"masks are of source and target, not of {', '.join(unknown)}")
    return mask


def sharding_rules() -> tuple[tuple[str, P], ...]:
    """Where the leaves of a training state lie, on a mesh with the axes "fsdp" and "tensor".

    Heads, hidden units and vocabulary are cut over "tensor" and the width over "fsdp", as in
    `models.gpt.sharding_rules`; each has to divide evenly.

    Returns:
        ordered (pattern, spec) for the paths of `Transformer`, `Encoder`, `Decoder` and `BERT`.
    """
    attention = r"layer\d+/(cross_)?attention"
    parameters = {
        r"(embedding|source_embedding|token_embedding)/embedding": P("tensor", "fsdp"),
        r"(\w+_positions|position_embedding|type_embedding)/embedding": P(None, ("fsdp", "tensor")),
        rf"{attention}/(query|key|value)/kernel": P("fsdp", "tensor"),
        rf"{attention}/(query|key|value)/bias": P("tensor"),
        rf"{attention}/out/kernel": P("tensor", None, "fsdp"),
        r"layer\d+/mlp/up/kernel": P("fsdp", "tensor"),
        r"layer\d+/mlp/up/bias": P("tensor"),
        r"layer\d+/mlp/down/kernel": P("tensor", "fsdp"),
        rf"({attention}/out|layer\d+/mlp/down)/bias": P("fsdp"),
        r"norm/(scale|bias)": P("fsdp"),
        "head/kernel": P("fsdp", "tensor"),
    }
    counters = (r"^(step|key|guard|health/\w+)$|^opt_state/(.+/)?(count|ns_coeffs)$", P())
    return (*((f"(^|/){path}$", spec) for path, spec in parameters.items()), counters)
