"""The transformer (Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762).

Layers, encoder, decoder, and the encoder-decoder from tokens to logits. Layers compute what PyTorch's
`TransformerEncoderLayer` and `TransformerDecoderLayer` of `norm_first` do: normalisation after each part
(as published) or before it (Xiong et al. 2020, arXiv 2002.04745), dropout of attention's weights, of the
hidden units, and of what is added. Kernels start uniform after Glorot & Bengio (2010), embeddings normal
with deviation `D ** -0.5` and are multiplied by `D ** 0.5`. What differs from the paper: normalisation
comes before each part by default, which learns without a long warm-up.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxnets import errors, ops
from jaxnets.layers import Dropout, Embedding, LayerNorm, MultiHeadAttention, constrain
from jaxnets.typing import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": ops.gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
POSITIONS = ("sinusoidal", "learned")

_glorot = nn.initializers.glorot_uniform()


@dataclasses.dataclass(frozen=True)
class LayerFields:
    """What the layers of an encoder or a decoder are.

    Attributes:
        width: D, a multiple of the heads.
        num_heads: N.
        hidden: F, the width between the two linear layers.
        dropout_rate: probability of dropping an element, in each of the places.
        norm_first: whether normalisation comes before a part or after what it gave was added.
        activation: one of `ACTIVATIONS`.
        epsilon: of the normalisations.
        dtype: of the computation; that of the parameters by default.
    """

    width: int = 512
    num_heads: int = 8
    hidden: int = 2048
    dropout_rate: float = 0.0
    norm_first: bool = True
    activation: str = "relu"
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None


class _Part(nn.Module):
    """A normalisation and a dropout around a part of a layer, and its addition."""

    fields: LayerFields

    def setup(self) -> None:
        self.norm = LayerNorm(self.fields.epsilon)
        self.dropout = Dropout(self.fields.dropout_rate)

    def __call__(
        self, x_BTD: Array, part: Callable[[Array], Array], train: bool, rows: Array | None
    ) -> Array:
        y_BTD = part(self.norm(x_BTD) if self.fields.norm_first else x_BTD)
        x_BTD = x_BTD + self.dropout(y_BTD, train=train, rows=rows)
        return x_BTD if self.fields.norm_first else self.norm(x_BTD)


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them; `[B, T, D]` to the same."""

    fields: LayerFields

    def setup(self) -> None:
        """Make the parts."""
        fields = self.fields
        if fields.activation not in ACTIVATIONS:
            raise errors.unknown("activation", fields.activation, ACTIVATIONS)
        self.up = nn.Dense(fields.hidden, dtype=fields.dtype, kernel_init=_glorot)
        self.down = nn.Dense(fields.width, dtype=fields.dtype, kernel_init=_glorot)
        self.dropout = Dropout(fields.dropout_rate)

    def __call__(self, x_BTD: Array, *, train: bool = False, rows: Array | None = None) -> Array:
        """Compute."""
        h_BTF = constrain(ACTIVATIONS[self.fields.activation](self.up(x_BTD)), "batch", None, "hidden")
        return self.down(self.dropout(h_BTF, train=train, rows=rows))


def _attention(fields: LayerFields, *, is_causal: bool = False) -> MultiHeadAttention:
    return MultiHeadAttention(
        fields.width, fields.num_heads, is_causal, fields.dropout_rate, fields.dtype
    )


class EncoderLayer(nn.Module):
    """Self-attention and two linear layers."""

    fields: LayerFields

    def setup(self) -> None:
        """Make the parts."""
        self.attention = _attention(self.fields)
        self.mlp = FeedForward(self.fields)
        self.part1, self.part2 = _Part(self.fields), _Part(self.fields)

    def __call__(
        self,
        x_BSD: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """`[B, S, D]` to `[B, S, D]`; the arguments are those of `Encoder`."""

        def attend(y_BSD: Array) -> Array:
            return self.attention(y_BSD, y_BSD, train=train, rows=rows, mask=mask)

        x_BSD = self.part1(x_BSD, attend, train, rows)
        x_BSD = self.part2(x_BSD, lambda y_BSD: self.mlp(y_BSD, train=train, rows=rows), train, rows)
        return constrain(x_BSD, "batch", "time", None)


class DecoderLayer(nn.Module):
    """Self-attention to what came before, attention to the encoder's output, and two linear layers."""

    fields: LayerFields

    def setup(self) -> None:
        """Make the parts."""
        self.attention = _attention(self.fields, is_causal=True)
        self.cross_attention = _attention(self.fields)
        self.mlp = FeedForward(self.fields)
        self.part1, self.part2, self.part3 = (_Part(self.fields) for _ in range(3))

    def __call__(
        self,
        x_BTD: Array,
        memory_BSD: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
        memory_mask: Array | None = None,
    ) -> Array:
        """`[B, T, D]` to `[B, T, D]`; the arguments are those of `Decoder`."""
        same: Any = {"train": train, "rows": rows}
        x_BTD = self.part1(x_BTD, lambda y: self.attention(y, y, mask=mask, **same), train, rows)

        def look(y_BTD: Array) -> Array:
            return self.cross_attention(y_BTD, memory_BSD, mask=memory_mask, **same)

        x_BTD = self.part2(x_BTD, look, train, rows)
        x_BTD = self.part3(x_BTD, lambda y: self.mlp(y, **same), train, rows)
        return constrain(x_BTD, "batch", "time", None)

    def remember(self, memory_BSD: Array) -> tuple[Array, Array]:
        """Keys and values `[B, S, N, K]` of the encoder's output."""
        return self.cross_attention.keys_and_values(memory_BSD)

    def step(
        self,
        x_BWD: Array,
        cache: tuple[Array, Array],
        position: Array,
        memory: tuple[Array, Array],
        memory_mask: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One place of W sequences for each row; cache `[B, W, T, N, K]` holds what came before."""
        batch, num_beams, width = x_BWD.shape
        length = cache[0].shape[2]
        new_cache = cache

        def attend(y_BWD: Array) -> Array:
            nonlocal new_cache
            now = self.attention.keys_and_values(y_BWD)
            new_cache = tuple(
                lax.dynamic_update_index_in_dim(kept, x[:, :, None].astype(kept.dtype), position, 2)
                for kept, x in zip(cache, now, strict=True)
            )
            key, value = (x.reshape(-1, *x.shape[2:]) for x in new_cache)
            is_past = jnp.broadcast_to(jnp.arange(length)[None] <= position, (len(key), length))
            each = y_BWD.reshape(-1, 1, width)
            return self.attention.attend(each, key, value, mask=is_past, is_step=True).reshape(
                batch, num_beams, width
            )

        x_BWD = self.part1(x_BWD, attend, False, None)
        # The sequences of a row look at the same memory, as the places of one sequence do.
        x_BWD = self.part2(
            x_BWD, lambda y: self.cross_attention.attend(y, *memory, mask=memory_mask), False, None
        )
        return self.part3(x_BWD, self.mlp, False, None), new_cache


class Encoder(nn.Module):
    """A stack of layers that see the whole sequence.

    Attributes:
        num_layers: L.
        fields: of the layers.
        use_final_norm: whether a normalisation stands behind them; by default where each has its before.

    Example:
        >>> encoder = Encoder(2, LayerFields(width=8, num_heads=2, hidden=16))
        >>> x_BSD, mask_BS = jnp.ones((1, 3, 8)), jnp.array([[True, True, False]])
        >>> encoder.init_with_output(jax.random.key(0), x_BSD, mask=mask_BS)[0].shape
        (1, 3, 8)
    """

    num_layers: int = 6
    fields: LayerFields = LayerFields()
    use_final_norm: bool | None = None

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Encode.

        Args:
            x_BSD: `[B, S, D]`.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout masks belong.
            mask: boolean `[B, S]`, false for places that no other sees, such as padding; their own
                output means nothing.

        Returns:
            `[B, S, D]`.
        """
        for i in range(1, self.num_layers + 1):
            layer = EncoderLayer(self.fields, name=f"layer{i}")
            x_BSD = layer(x_BSD, train=train, rows=rows, mask=mask)
        return _final_norm(self)(x_BSD)


class Decoder(nn.Module):
    """A stack of layers that see what came before and all of an encoder's output.

    Attributes:
        num_layers: L.
        fields: of the layers.
        use_final_norm: as of `Encoder`.
    """

    num_layers: int = 6
    fields: LayerFields = LayerFields()
    use_final_norm: bool | None = None

    def setup(self) -> None:
        """Make the layers."""
        self.layers = [
            DecoderLayer(self.fields, name=f"layer{i}") for i in range(1, self.num_layers + 1)
        ]
        self.norm = _final_norm(self)

    def __call__(
        self,
        x_BTD: Array,
        memory_BSD: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
        memory_mask: Array | None = None,
    ) -> Array:
        """Decode all places at once.

        Args:
            x_BTD: `[B, T, D]`.
            memory_BSD: `[B, S, D]`, the encoder's output.
            train: whether dropout is on.
            rows: `[B]`, the id of each row.
            mask: boolean `[B, T]`, false for places that no other sees. Padding behind a sequence needs
                none, as no place sees a later one.
            memory_mask: boolean `[B, S]`, the same of the memory.

        Returns:
            `[B, T, D]`.
        """
        for layer in self.layers:
            x_BTD = layer(x_BTD, memory_BSD, train=train, rows=rows, mask=mask, memory_mask=memory_mask)
        return self.norm(x_BTD)

    def remember(self, memory_BSD: Array) -> tuple[tuple[Array, Array], ...]:
        """Each layer's keys and values of the encoder's output."""
        return tuple(layer.remember(memory_BSD) for layer in self.layers)

    def step(self, x_BWD: Array, cache: Any, position: Array, memory: Any, memory_mask: Any):
        """The output of one place, and each layer's cache with it."""
        caches = []
        for layer, kept, known in zip(self.layers, cache, memory, strict=True):
            x_BWD, kept = layer.step(x_BWD, kept, position, known, memory_mask)
            caches.append(kept)
        return self.norm(x_BWD), tuple(caches)


def _final_norm(stack: Encoder | Decoder) -> Callable[[Array], Array]:
    use = stack.fields.norm_first if stack.use_final_norm is None else stack.use_final_norm
    return LayerNorm(stack.fields.epsilon, name="norm") if use else lambda x: x


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
            self.head = nn.Dense(
                self.vocabulary_size, use_bias=False, dtype=self.dtype, kernel_init=_glorot
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
            ValueError: if the tokens aren't such integers, or more than max_length.
        """
        masks: Mapping[str, Array] = mask if isinstance(mask, Mapping) else {}
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
        """
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
        x_BTD = self._scaled(table(tokens)) + self._places(side, jnp.arange(length))[None]
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
        # Of one axis of places: with two XLA's product on a CPU takes twice as long.
        x_PD = x_BTD.reshape(-1, self.width)
        logits_PV = self.embedding.attend(x_PD) if self.tie_embeddings else self.head(x_PD)
        logits_BTV = logits_PV.reshape(*x_BTD.shape[:2], -1)
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
