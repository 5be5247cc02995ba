"""Attention by scaled products (Vaswani et al. 2017, arXiv 1706.03762)."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers.dropout import Dropout
from jaxnets.layers.einsum import Einsum
from jaxnets.ops.partition import constrain
from jaxnets.typing import Array

_glorot = nn.initializers.variance_scaling
_into_heads = _glorot(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
_out_of_heads = _glorot(1.0, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2)


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    is_causal: bool = False,
    mask: Array | None = None,
    dropout_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Means of the values, weighted by how well their keys fit the queries.

    `softmax(query key^T / sqrt(K)) value` for each head, the softmax in at least float32. A query that
    may see no key gets 0. What a masked key and its value hold is without effect, as long as it is
    finite.

    Args:
        query: `[B, T, N, K]`.
        key: `[B, S, N, K]`.
        value: `[B, S, N, K]`.
        is_causal: whether query t sees the keys up to t alone, which takes S = T.
        mask: boolean `[B, S]`, false for keys that no query sees.
        dropout_fn: changes the weights `[B, N, T, S]`, in training.

    Returns:
        `[B, T, N, K]`, of value's dtype.

    Raises:
        ValueError: if is_causal and S isn't T.

    Example:
        >>> q, k = jnp.ones((1, 2, 1, 1)), jnp.zeros((1, 2, 1, 1))
        >>> v = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> attention(q, k, v).ravel().tolist(), attention(q, k, v, is_causal=True).ravel().tolist()
        ([2.0, 2.0], [1.0, 2.0])
    """
    batch, num_queries, num_heads, head_width = query.shape
    num_keys = key.shape[1]
    chex.assert_shape([key, value], (batch, num_keys, num_heads, head_width))
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores_BNTS = jnp.einsum("BTNK,BSNK->BNTS", query, key, preferred_element_type=dtype)
    scores_BNTS = scores_BNTS * jnp.asarray(head_width**-0.5, dtype)
    if is_causal and num_queries != num_keys:
        raise ValueError(
            f"causal attention has as many keys as queries, not {num_keys} and {num_queries}"
        )
    is_seen = jnp.tri(num_queries, num_keys, dtype=bool)[None, None] if is_causal else None
    if mask is not None:
        chex.assert_shape(mask, (batch, num_keys))
        is_unmasked = mask[:, None, None, :]
        is_seen = is_unmasked if is_seen is None else is_seen & is_unmasked
    if is_seen is not None:
        # The least number and not -inf: of a query that sees nothing, that would make NaN.
        scores_BNTS = jnp.where(is_seen, scores_BNTS, jnp.finfo(dtype).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS)
    if is_seen is not None:
        weights_BNTS = jnp.where(is_seen, weights_BNTS, 0)
    if dropout_fn is not None:
        weights_BNTS = dropout_fn(weights_BNTS)
    return jnp.einsum("BNTS,BSNK->BTNK", weights_BNTS.astype(value.dtype), value)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with several heads.

    Attributes:
        num_heads: N; the width is a multiple of it.
        is_causal: whether a place sees itself and those before it alone.
        dropout_rate: probability of dropping a weight.
        dtype: of the computation; that of input and parameters by default.
        kernel_init: of the kernels of queries, keys and values, `[D, N, K]`.
        out_init: of the kernel behind the heads, `[N, K, D]`.
    """

    num_heads: int
    is_causal: bool = False
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    out_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(
        self, x_BTD: Array, *, train: bool, rows: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Attend.

        Args:
            x_BTD: `[B, T, D]`.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout mask belongs.
            mask: boolean `[B, T]`, false for places that nobody sees.

        Returns:
            `[B, T, D]`.

        Raises:
            ValueError: if the width doesn't split into so many heads.
        """
        width = x_BTD.shape[2]
        if width % self.num_heads:
            raise ValueError(f"a width of {width} doesn't split into {self.num_heads} heads")
        heads = (self.num_heads, width // self.num_heads)

        def project(name: str) -> Array:
            x_BTNK = Einsum(
                "BTD,DNK->BTNK",
                (width, *heads),
                bias_shape=heads,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                name=name,
            )(x_BTD)
            return constrain(x_BTNK, "batch", None, "heads", None)

        dropout = Dropout(self.dropout_rate, name="dropout")
        y_BTNK = attention(
            project("query"),
            project("key"),
            project("value"),
            is_causal=self.is_causal,
            mask=mask,
            dropout_fn=lambda weights_BNTS: dropout(weights_BNTS, train=train, rows=rows),
        )
        return Einsum(
            "BTNK,NKD->BTD",
            (*heads, width),
            bias_shape=(width,),
            dtype=self.dtype,
            kernel_init=self.out_init,
            name="out",
        )(constrain(y_BTNK, "batch", None, "heads", None))


class MultiHeadAttention(nn.Module):
    """Attention of one sequence to another, or to itself, with several heads.

    It can be called in two parts, so that the keys and values of a sequence are kept: those of `x` are
    `keys_and_values(x)`, and `attend(y, *keys_and_values(x))` is what a call gives.

    The weights, `[B, N, T, S]` before dropout, are noted as "weights" in the collection "intermediates".

    Attributes:
        width: D, a multiple of the heads.
        num_heads: N.
        is_causal: whether query t sees the keys up to t alone, which takes S = T.
        dropout_rate: probability of dropping a weight.
        dtype: of the computation; that of input and parameters by default.
        kernel_init: of the kernels of queries, keys and values, `[D, N, K]`.
        out_init: of the kernel behind the heads, `[N, K, D]`.

    Example:
        >>> layer = MultiHeadAttention(width=4, num_heads=2)
        >>> x_BTD, y_BSD = jnp.ones((1, 3, 4)), jnp.ones((1, 5, 4))
        >>> layer.init_with_output(jax.random.key(0), x_BTD, y_BSD)[0].shape
        (1, 3, 4)
    """

    width: int
    num_heads: int
    is_causal: bool = False
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = _into_heads
    out_init: nn.initializers.Initializer = _out_of_heads

    def setup(self) -> None:
        """Make the parts."""
        width = self.width
        if width % self.num_heads:
            raise ValueError(f"a width of {width} doesn't split into {self.num_heads} heads")
        heads = (self.num_heads, width // self.num_heads)

        def projection() -> Einsum:
            return Einsum("BTD,DNK->BTNK", (width, *heads), heads, self.dtype, self.kernel_init)

        self.query, self.key, self.value = projection(), projection(), projection()
        self.out = Einsum("BTNK,NKD->BTD", (*heads, width), (width,), self.dtype, self.out_init)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(
        self,
        x_BTD: Array,
        memory_BSD: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Attend.

        Args:
            x_BTD: `[B, T, D]`, what asks.
            memory_BSD: `[B, S, D]`, what is seen; x itself for self-attention.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout mask belongs.
            mask: boolean `[B, S]`, false for places of the memory that nobody sees.

        Returns:
            `[B, T, D]`.

        Raises:
            ValueError: if the width doesn't split into so many heads.
        """
        return self.attend(x_BTD, *self.keys_and_values(memory_BSD), train=train, rows=rows, mask=mask)

    def keys_and_values(self, memory_BSD: Array) -> tuple[Array, Array]:
        """Keys and values `[B, S, N, K]` of a sequence `[B, S, D]`."""
        key_BSNK, value_BSNK = self.key(memory_BSD), self.value(memory_BSD)
        axes = ("batch", None, "heads", None)
        return constrain(key_BSNK, *axes), constrain(value_BSNK, *axes)

    def attend(
        self,
        x_BTD: Array,
        key_BSNK: Array,
        value_BSNK: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
        is_step: bool = False,
    ) -> Array:
        """Attend to keys and values that are known.

        Args:
            x_BTD: `[B, T, D]`.
            key_BSNK: `[B, S, N, K]`.
            value_BSNK: `[B, S, N, K]`.
            train: whether dropout is on.
            rows: `[B]`, the id of each row.
            mask: boolean `[B, S]`, false for keys that nobody sees.
            is_step: whether x is a later place than all that the mask lets it see: then nothing more is
                hidden from it, in a causal layer either.

        Returns:
            `[B, T, D]`.
        """

        def noted(weights_BNTS: Array) -> Array:
            self.sow("intermediates", "weights", weights_BNTS)
            return self.dropout(weights_BNTS, train=train, rows=rows)

        y_BTNK = attention(
            constrain(self.query(x_BTD), "batch", None, "heads", None),
            key_BSNK,
            value_BSNK,
            is_causal=self.is_causal and not is_step,
            mask=mask,
            dropout_fn=noted,
        )
        return self.out(constrain(y_BTNK, "batch", None, "heads", None))
