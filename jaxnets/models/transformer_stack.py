"""The layers of a transformer, and the stacks of them: encoder and decoder (arXiv 1706.03762).

They compute what PyTorch's `TransformerEncoderLayer` and `TransformerDecoderLayer` of `norm_first` do:
normalisation after each part (as published) or before it (Xiong et al. 2020, arXiv 2002.04745), dropout
of attention's weights, of the hidden units, and of what is added. Kernels start uniform after Glorot &
Bengio (2010). What differs from the paper: normalisation comes before each part by default, which
learns without a long warm-up.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from jaxnets import errors, ops
from jaxnets.layers import Dropout, LayerNorm, Linear, MultiHeadAttention, constrain
from jaxnets.typing import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": ops.gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

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
        self.up = Linear((fields.hidden,), dtype=fields.dtype, kernel_init=_glorot)
        self.down = Linear((fields.width,), dtype=fields.dtype, kernel_init=_glorot)
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
        x_BSD = x_BSD.astype(self.fields.dtype or x_BSD.dtype)
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

    Example:
        >>> decoder = Decoder(1, LayerFields(width=8, num_heads=2, hidden=16))
        >>> x_BTD, memory_BSD = jnp.ones((1, 3, 8)), jnp.ones((1, 5, 8))
        >>> jax.eval_shape(decoder.init_with_output, jax.random.key(0), x_BTD, memory_BSD)[0].shape
        (1, 3, 8)
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
        x_BTD = x_BTD.astype(self.fields.dtype or x_BTD.dtype)
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


def encoder(num_layers: int = 6, *, use_final_norm: bool | None = None, **fields: Any) -> Encoder:
    """An `Encoder` in one call.

    Args:
        num_layers: L.
        use_final_norm: whether a normalisation stands behind them; by default where `norm_first`.
        fields: those of `LayerFields`.

    Example:
        >>> encoder(2, width=8, num_heads=2, hidden=16).fields.width
        8
    """
    return Encoder(num_layers, LayerFields(**fields), use_final_norm)


def decoder(num_layers: int = 6, *, use_final_norm: bool | None = None, **fields: Any) -> Decoder:
    """A `Decoder` in one call; the arguments are those of `encoder`.

    Example:
        >>> decoder(2, width=8, num_heads=2, hidden=16).num_layers
        2
    """
    return Decoder(num_layers, LayerFields(**fields), use_final_norm)


def _final_norm(stack: Encoder | Decoder) -> Callable[[Array], Array]:
    use = stack.fields.norm_first if stack.use_final_norm is None else stack.use_final_norm
    return LayerNorm(stack.fields.epsilon, name="norm") if use else lambda x: x
