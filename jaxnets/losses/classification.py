"""Losses of classification, one number for each example."""

import chex
import jax
import jax.numpy as jnp
from jax import lax

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
    # In int32: bytes would count 300 classes as 0 to 255, 0 to 43.
    index = labels.astype(jnp.int32)[..., None]
    is_class = (index == labels[..., None]) & (index >= 0) & (index < logits.shape[-1])
    label = jnp.take_along_axis(logits, jnp.where(is_class, index, 0), axis=-1) - greatest
    loss = log_sum - label[..., 0]
    if label_smoothing:
        uniform = log_sum - jnp.mean(shifted, axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return jnp.where(is_class[..., 0], loss, jnp.nan)


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
