"""A mean kept as its two sums, so that parts of a batch or of a data set merge exactly."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from jaxnets.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """Sum of values and their count; adding two of them, leaf by leaf, merges them.

    Attributes:
        total: sum of the values that count. Of true-or-false values it is an exact integer.
        count: how many they are.
    """

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> "Mean":
        """Sum up values.

        Args:
            values: `[B, ...]`, numbers or booleans.
            mask: boolean `[B, ...]` of the same shape, or of a leading part of it; false for values
                that don't count.

        Returns:
            The sums; masked values don't enter, not even as NaN.

        Example:
            >>> float(Mean.of(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])).compute())
            1.5
        """
        if mask is None:
            mask = jnp.ones(values.shape, bool)
        chex.assert_equal_shape_prefix([values, mask], mask.ndim)
        keep = mask.astype(bool).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
        keep = jnp.broadcast_to(keep, values.shape)
        is_exact = values.dtype == jnp.bool_  # of other integers an int32 might overflow
        dtype = jnp.int32 if is_exact else jnp.promote_types(values.dtype, jnp.float32)
        total = jnp.sum(jnp.where(keep, values.astype(dtype), 0), dtype=dtype)
        return cls(total, jnp.sum(keep, dtype=jnp.int32))

    def compute(self) -> Array:
        """The mean; 0 where nothing counted."""
        return self.total / (self.count + (self.count == 0))
