"""Losses of classification, one number for each example."""

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops.product import product
from jaxnets.typing import Array


def softmax_cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
    """Negative log-likelihood of the label under a softmax.

    `-sum_v q_v log softmax(logits)_v`, where q is 1 at the label; smoothed, it is
    `1 - label_smoothing` there and `label_smoothing / V` is added everywhere (Szegedy et al. 2016,
    arXiv 1512.00567; the convention of PyTorch).

    Args:
        logits: `[..., V]`.
        labels: integers `[...]` in [0, V). Another label gives NaN, which stops training, where an
            index out of range would train on silently.
        label_smoothing: in [0, 1].

    Returns:
        `[...]`, in at least float32.

    Raises:
        ValueError: if label_smoothing is outside of [0, 1].

    Example:
        >>> loss = softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
        >>> [round(x, 4) for x in loss.tolist()]
        [1.3863, 1.3863]
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing lies in [0, 1]; this one is {label_smoothing}")
    chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
    chex.assert_rank(logits, labels.ndim + 1)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Not by way of log_softmax, an array as large as the logits: their own passes are what a loss over a
    # large vocabulary takes.
    greatest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - greatest
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    # In int32: bytes would count 300 classes as 0 to 255, 0 to 43. Picked by a sum and not by an index,
    # whose gradient is a scatter.
    index = labels.astype(jnp.int32)
    is_class = (index == labels) & (index >= 0) & (index < logits.shape[-1])
    is_label = index[..., None] == lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    loss = log_sum - jnp.sum(jnp.where(is_label, shifted, 0), axis=-1)
    if label_smoothing:
        uniform = log_sum - jnp.mean(shifted, axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return jnp.where(is_class, loss, jnp.nan)


def chunked_cross_entropy(
    hidden: Array, table: Array, labels: Array, *, chunk: int, label_smoothing: float = 0.0
) -> Array:
    """`softmax_cross_entropy` of logits `hidden table^T` that are never there as a whole.

    The logits of `chunk` places at a time are computed, and again for the gradient, so that memory grows
    with the length by `hidden` alone: of a large vocabulary the logits are most of what a language model
    needs.

    Args:
        hidden: `[B, T, D]`, what a model has in place of logits.
        table: `[V, D]`, such as the token embeddings.
        labels: integers `[B, T]` in [0, V); another gives NaN.
        chunk: how many of the T places, at least 1.
        label_smoothing: in [0, 1].

    Returns:
        `[B, T]`, in at least float32.

    Raises:
        ValueError: if chunk is below 1, or label_smoothing outside of [0, 1].
    """
    chex.assert_rank([hidden, table, labels], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, labels], 2)
    if chunk < 1:
        raise ValueError(f"a chunk has at least 1 place, not {chunk}")
    batch, length, _ = hidden.shape
    chunk = min(chunk, max(1, length))
    num_chunks = -(-length // chunk)

    def cut(x: Array) -> Array:
        """`[B, T, ...]` to `[num_chunks, B, chunk, ...]`, filled up."""
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def part(hidden: Array, table: Array, labels: Array) -> Array:
        logits_BTV = product(hidden, table.astype(hidden.dtype).T)
        return softmax_cross_entropy(logits_BTV, labels, label_smoothing=label_smoothing)

    losses = jax.lax.map(lambda x: part(x[0], table, x[1]), (cut(hidden), cut(labels)))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, num_chunks * chunk)[:, :length]


def sigmoid_cross_entropy(logits: Array, labels: Array) -> Array:
    """Negative log-likelihood of independent yes-or-no labels under a sigmoid.

    `max(x, 0) - x y + log(1 + exp(-|x|))`, which neither overflows nor cancels.

    Args:
        logits: `[...]`.
        labels: `[...]`, in [0, 1].

    Returns:
        `[...]`, in at least float32.
    """
    chex.assert_equal_shape([logits, labels])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = labels.astype(logits.dtype)
    # softplus keeps a gradient at 0, where max and abs would lose half of it.
    return jax.nn.softplus(logits) - logits * labels
