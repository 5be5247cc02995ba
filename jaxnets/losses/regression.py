"""Losses of regression, one number for each element."""

import chex
import jax.numpy as jnp

from jaxnets.typing import Array


def squared_error(predictions: Array, targets: Array) -> Array:
    """`(predictions - targets)**2`.

    Args:
        predictions: `[...]`.
        targets: `[...]`.

    Returns:
        `[...]`, in at least float32.
    """
    error = _error(predictions, targets)
    return error * error


def huber(predictions: Array, targets: Array, *, delta: float = 1.0) -> Array:
    """Squared near the target and linear beyond `delta` (Huber 1964).

    `0.5 e**2` for `|e| <= delta`, else `delta (|e| - 0.5 delta)`.

    Args:
        predictions: `[...]`.
        targets: `[...]`.
        delta: where the two parts meet, above 0.

    Returns:
        `[...]`, in at least float32.

    Raises:
        ValueError: if delta isn't above 0.
    """
    if delta <= 0:
        raise ValueError(f"delta must be above 0; this one is {delta}")
    error = jnp.abs(_error(predictions, targets))
    near = jnp.minimum(error, delta)
    return near * (error - 0.5 * near)


def _error(predictions: Array, targets: Array) -> Array:
    chex.assert_equal_shape([predictions, targets])
    dtype = jnp.promote_types(jnp.result_type(predictions, targets), jnp.float32)
    return predictions.astype(dtype) - targets.astype(dtype)
