"""Errors of predicted numbers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from jaxnets.metrics.mean import Mean
from jaxnets.typing import Array


def absolute_error(predictions: Array, targets: Array) -> Array:
    """`|predictions - targets|`, whose mean is the MAE.

    Args:
        predictions: `[...]`.
        targets: `[...]`.

    Returns:
        `[...]`, in at least float32.
    """
    chex.assert_equal_shape([predictions, targets])
    dtype = jnp.promote_types(jnp.result_type(predictions, targets), jnp.float32)
    return jnp.abs(predictions.astype(dtype) - targets.astype(dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RootMeanSquare:
    """The RMSE, kept as sum of squares and count; adding two of them, leaf by leaf, merges them.

    Attributes:
        squares: their mean.
    """

    squares: Mean

    @classmethod
    def of(cls, predictions: Array, targets: Array, mask: Array | None = None) -> "RootMeanSquare":
        """Sum up squared errors.

        Args:
            predictions: `[B, ...]`.
            targets: `[B, ...]`.
            mask: boolean, as of `Mean.of`.

        Example:
            >>> float(RootMeanSquare.of(jnp.array([1.0, 5.0]), jnp.array([4.0, 1.0])).compute() ** 2)
            12.5
        """
        error = absolute_error(predictions, targets)
        return cls(Mean.of(error * error, mask))

    def compute(self) -> Array:
        """The root of the mean; 0 where nothing counted."""
        return jnp.sqrt(self.squares.compute())
