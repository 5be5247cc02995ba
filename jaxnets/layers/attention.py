"""Attention by scaled products (Vaswani et al. 2017, arXiv 1706.03762)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers.dropout import Dropout
from jaxnets.layers.key_values import KeyValues
from jaxnets.layers.linear import Linear
from jaxnets.layers.rotary import rotate
from jaxnets.ops.forms import is_for_cpu
from jaxnets.ops.hash import pair_places
from jaxnets.ops.partition import constrain, is_on_one_device
from jaxnets.typing import Array

_glorot = nn.initializers.variance_scaling
_into_heads = _glorot(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
_out_of_heads = _glorot(1.0, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2)
_IN_CACHE = 2**20  # weights of attention that a CPU computes at once, where that makes two rows or more
_BLOCK, _MOST_BLOCKS = 64, 8  # queries at a time of causal attention on a CPU, and how many times


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
        mask: boolean `[B, S]`, false for keys that no query sees, or `[B, T, S]`, for those that
            this query doesn't see.
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
    check_shapes(query, key, value, is_causal=is_causal, mask=mask)
    rows = _rows_at_once(query, key) if dropout_fn is None else query.shape[0]
    if rows == query.shape[0]:
        return _attention(query, key, value, mask, is_causal, dropout_fn)

    @jax.checkpoint
    def of_some(arrays: tuple[Array, Array, Array, Array | None]) -> Array:
        return _attention(*arrays, is_causal, None)

    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (query, key, value, mask))
    return jax.lax.map(of_some, parts).reshape(*query.shape[:3], value.shape[3])


def _rows_at_once(query: Array, key: Array) -> int:
    """How many rows of the batch: all, or on a CPU some whose weights stay in its cache."""
    (batch, num_queries, num_heads, _), num_keys = query.shape, key.shape[1]
    if not is_for_cpu() or not is_on_one_device():
        return batch
    most = _IN_CACHE // max(1, num_heads * num_queries * num_keys)
    if most >= batch:
        return batch
    return max((rows for rows in range(2, most + 1) if batch % rows == 0), default=batch)


def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    is_causal: bool,
    dropout_fn: Callable[[Array], Array] | None,
) -> Array:
    num_queries, num_keys = query.shape[1], key.shape[1]
    # Heads before places: XLA is faster on a CPU at products whose batch axes come first.
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
    size = max(1, num_queries)
    if is_causal and dropout_fn is None and is_for_cpu():
        size = max(
            _BLOCK, -(-num_queries // _MOST_BLOCKS)
        )  # the keys that none of these sees aren't used
    parts = []
    for start in range(0, max(1, num_queries), size):
        queries = slice(start, start + size)
        keys = slice(0, min(start + size, num_keys) if is_causal else num_keys)
        is_seen = None
        if is_causal:
            is_seen = jnp.tri(num_queries, num_keys, dtype=bool)[None, None, queries, keys]
        if mask is not None:
            is_unmasked = mask[:, None, None, keys] if mask.ndim == 2 else mask[:, None, queries, keys]
            is_seen = is_unmasked if is_seen is None else is_seen & is_unmasked
        part = attend(
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            is_seen,
            dropout_fn,
            mask is not None,
        )
        parts.append(part)
    return jnp.moveaxis(jnp.concatenate(parts, axis=2), 1, 2)


def check_shapes(query: Array, key: Array, value: Array, *, is_causal: bool, mask: Array | None) -> None:
    """Refuse what doesn't fit together.

    Raises:
        ValueError: if is_causal and there are other numbers of keys and queries.
        AssertionError: if other shapes don't fit.
    """
    batch, num_queries, num_heads, head_width = query.shape
    num_keys = key.shape[1]
    chex.assert_shape([key, value], (batch, num_keys, num_heads, head_width))
    if is_causal and num_queries != num_keys:
        raise ValueError(
            f"causal attention has as many keys as queries, not {num_keys} and {num_queries}"
        )
    if mask is not None:
        of_keys, of_pairs = (batch, num_keys), (batch, num_queries, num_keys)
        chex.assert_shape(mask, of_keys if mask.ndim == 2 else of_pairs)


def attend(
    query: Array,
    key: Array,
    value: Array,
    is_seen: Array | None,
    dropout_fn: Callable[[Array], Array] | None = None,
    may_see_none: bool = True,
) -> Array:
    """`attention` with heads before places and a mask that broadcasts to `[B, N, T, S]`.

    Args:
        query: `[B, N, T, K]`.
        key: `[B, N, S, K]`.
        value: `[B, N, S, K]`.
        is_seen: the mask.
        dropout_fn: as of `attention`.
        may_see_none: whether there may be a query that sees no key.

    Returns:
        `[B, N, T, K]`.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores_BNTS = jnp.einsum("BNTK,BNSK->BNTS", query, key, preferred_element_type=dtype)
    scores_BNTS = scores_BNTS * jnp.asarray(query.shape[-1] ** -0.5, dtype)
    if is_seen is not None:
        # The least number and not -inf: of a query that sees nothing, that would make NaN.
        scores_BNTS = jnp.where(is_seen, scores_BNTS, jnp.finfo(dtype).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS)
    if is_seen is not None and may_see_none:
        weights_BNTS = jnp.where(is_seen, weights_BNTS, 0)
    if dropout_fn is not None:
        weights_BNTS = dropout_fn(weights_BNTS)
    return jnp.einsum("BNTS,BNSK->BNTK", weights_BNTS.astype(value.dtype), value)


def chunked_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    chunk: int,
    is_causal: bool = False,
    mask: Array | None = None,
    dropout_fn: Callable[..., Array] | None = None,
) -> Array:
    """`attention` in memory that grows with the length and not with its square.

    The weights of `chunk` queries at a time are computed, and again for the gradient; what is kept is
    queries, keys and values (after Rabe & Staats 2021, arXiv 2112.05682). Beside the order of sums it is
    the same computation.

    Args:
        query: `[B, T, N, K]`.
        key: `[B, S, N, K]`.
        value: `[B, S, N, K]`.
        chunk: how many queries, at least 1.
        is_causal: as in `attention`.
        mask: as in `attention`.
        dropout_fn: `dropout_fn(weights, first)` changes the weights `[B, N, chunk, S]` of the chunk
            whose first query is that number, in training.

    Returns:
        `[B, T, N, K]`, of value's dtype.

    Raises:
        ValueError: if chunk is below 1, or is_causal and S isn't T.
    """
    check_shapes(query, key, value, is_causal=is_causal, mask=mask)
    if chunk < 1:
        raise ValueError(f"a chunk has at least 1 query, not {chunk}")
    num_queries, num_keys = query.shape[1], key.shape[1]
    chunk = min(chunk, max(1, num_queries))
    num_chunks = -(-num_queries // chunk)

    def cut(x: Array) -> Array:
        """`[B, T, ...]` to `[num_chunks, B, chunk, ...]`, filled up."""
        missing = num_chunks * chunk - num_queries
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)

    # Unrolled, XLA would compute all chunks before it needs the first.
    @jax.checkpoint
    def part(i: Array, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
        is_seen = None
        if is_causal:
            places = i * chunk + jnp.arange(chunk)
            is_seen = (places[:, None] >= jnp.arange(num_keys)[None])[None, None]
        if mask is not None:
            is_unmasked = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
            is_seen = is_unmasked if is_seen is None else is_seen & is_unmasked
        drop = None if dropout_fn is None else partial(dropout_fn, first=i * chunk)
        return jnp.moveaxis(attend(jnp.moveaxis(query, 2, 1), key, value, is_seen, drop), 1, 2)

    key, value = (jnp.moveaxis(x, 2, 1) for x in (key, value))
    pairs = cut(mask) if mask is not None and mask.ndim == 3 else None
    parts = jax.lax.map(
        lambda x: part(x[0], x[1], key, value, mask if pairs is None else x[2]),
        (jnp.arange(num_chunks), cut(query), pairs),
    )
    out_BTNK = jnp.moveaxis(parts, 0, 1).reshape(query.shape[0], num_chunks * chunk, *query.shape[2:])
    return out_BTNK[:, :num_queries]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with several heads.

    Attributes:
        num_heads: N; the width is a multiple of it.
        is_causal: whether a place sees itself and those before it alone.
        is_rotary: whether queries and keys are turned by their places (`layers.rotate`).
        use_bias: whether biases are learnt.
        chunk: of how many queries at a time the weights are computed, and again for the gradient, so
            that memory grows with the length and not its square; None for all at once.
        dropout_rate: probability of dropping a weight.
        dtype: of the computation; that of input and parameters by default.
        kernel_init: of the kernels of queries, keys and values, `[D, N, K]`.
        out_init: of the kernel behind the heads, `[N, K, D]`.
    """

    num_heads: int
    is_causal: bool = False
    is_rotary: bool = False
    use_bias: bool = True
    chunk: int | None = None
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    out_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        *,
        train: bool,
        rows: Array | None = None,
        mask: Array | None = None,
        places: Array | None = None,
        cache: KeyValues | None = None,
    ) -> Any:
        """Attend.

        Args:
            x_BTD: `[B, T, D]`.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout mask belongs.
            mask: boolean `[B, T]`, false for places that nobody sees.
            places: integers `[B, T]`, where in its row each one stands; 0, 1, ... by default.
            cache: keys and values of the places before, which these are added to at their own places. A
                place then sees what is in the cache up to itself.

        Returns:
            `[B, T, D]`; with a cache also the new one.

        Raises:
            ValueError: if the width doesn't split into so many heads, or there is a cache without
                places, beside a mask, or in training with dropout.
        """
        width = x_BTD.shape[2]
        if width % self.num_heads:
            raise ValueError(f"a width of {width} doesn't split into {self.num_heads} heads")
        if cache is not None and (places is None or mask is not None or not self.is_causal):
            raise ValueError("a cache is for causal attention, needs places and takes no mask")
        if cache is not None and train and self.dropout_rate:
            raise ValueError("attention to a cache has no dropout: it is for evaluation")
        heads = (self.num_heads, width // self.num_heads)

        def project(name: str) -> Array:
            x_BTNK = Linear(
                heads,
                use_bias=self.use_bias,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                name=name,
            )(x_BTD)
            return constrain(x_BTNK, "batch", None, "heads", None)

        query, key, value = (project(name) for name in ("query", "key", "value"))
        if self.is_rotary:
            query, key = (rotate(x_BTNK, places) for x_BTNK in (query, key))
        dropout = Dropout(self.dropout_rate, name="dropout")
        if cache is not None:
            assert places is not None
            cache = cache.add(key, value, places)
            kept = (query, cache.key, cache.value)
            seen_BTS = cache.seen_from(places)
            if self.chunk is None or query.shape[1] <= self.chunk:
                y_BTNK = attention(*kept, mask=seen_BTS)
            else:
                y_BTNK = chunked_attention(*kept, chunk=self.chunk, mask=seen_BTS)
        elif self.chunk is None:

            def drop(weights_BNTS: Array) -> Array:
                places = pair_places(weights_BNTS.shape[1:])
                return dropout(weights_BNTS, train=train, rows=rows, places=places)

            y_BTNK = attention(
                query,
                key,
                value,
                is_causal=self.is_causal,
                mask=mask,
                dropout_fn=drop if train and self.dropout_rate else None,
            )
        else:
            y_BTNK = chunked_attention(
                query,
                key,
                value,
                chunk=self.chunk,
                is_causal=self.is_causal,
                mask=mask,
                dropout_fn=dropout.of_parts(train=train, rows=rows, places_of=pair_places),
            )
        y_BTD = Linear(
            (width,),
            num_inputs=2,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.out_init,
            name="out",
        )(constrain(y_BTNK, "batch", None, "heads", None))
        return y_BTD if cache is None else (y_BTD, cache)


class MultiHeadAttention(nn.Module):
    """Attention of one sequence to another, or to itself, with several heads.

    It can be called in two parts, so that the keys and values of a sequence are kept: those of `x` are
    `keys_and_values(x)`, and `attend(y, *keys_and_values(x))` is what a call gives.

    The weights, `[B, N, T, S]` before dropout, are noted as "weights" in the collection "intermediates"
    where that is mutable; otherwise they need not be whole at any time.

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

        def projection() -> Linear:
            return Linear(heads, dtype=self.dtype, kernel_init=self.kernel_init)

        self.query, self.key, self.value = projection(), projection(), projection()
        self.out = Linear((width,), num_inputs=2, dtype=self.dtype, kernel_init=self.out_init)
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
        is_noted = self.is_mutable_collection("intermediates")

        def noted(weights_BNTS: Array) -> Array:
            self.sow("intermediates", "weights", weights_BNTS)
            places = pair_places(weights_BNTS.shape[1:])
            return self.dropout(weights_BNTS, train=train, rows=rows, places=places)

        y_BTNK = attention(
            constrain(self.query(x_BTD), "batch", None, "heads", None),
            key_BSNK,
            value_BSNK,
            is_causal=self.is_causal and not is_step,
            mask=mask,
            dropout_fn=noted if is_noted or (train and self.dropout_rate) else None,
        )
        return self.out(constrain(y_BTNK, "batch", None, "heads", None))
