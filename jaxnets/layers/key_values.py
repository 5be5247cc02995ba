"""Keys and values that attention has computed, kept for the places that come after."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxnets.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """A cache of one layer; rows may be filled to different places.

    Attributes:
        key: `[B, S, N, K]`.
        value: `[B, S, N, K]`.
    """

    key: Array
    value: Array

    @classmethod
    def empty(
        cls,
        batch_size: int,
        length: int,
        num_heads: int,
        head_width: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "KeyValues":
        """Room for `length` places."""
        zeros = jnp.zeros((batch_size, length, num_heads, head_width), dtype)
        return cls(zeros, zeros)

    def add(self, key: Array, value: Array, places: Array) -> "KeyValues":
        """Put keys and values where they belong; what stood there is replaced.

        Args:
            key: `[B, T, N, K]`.
            value: `[B, T, N, K]`.
            places: integers `[B, T]`; those outside of the cache are left out.
        """
        chex.assert_equal_shape_prefix([key, value, places], 2)
        rows = jnp.arange(len(places))[:, None]

        def put(cache: Array, new: Array) -> Array:
            # A negative place would count from the end.
            at = jnp.where(places < 0, cache.shape[1], places)
            return cache.at[rows, at].set(new.astype(cache.dtype), mode="drop")

        return KeyValues(put(self.key, key), put(self.value, value))

    def seen_from(self, places: Array) -> Array:
        """What each place sees: all up to itself.

        Args:
            places: integers `[B, T]`.

        Returns:
            boolean `[B, T, S]`.
        """
        return jnp.arange(self.key.shape[1])[None, None] <= places[..., None]
