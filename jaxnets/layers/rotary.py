"""Rotary positions (Su et al. 2021, arXiv 2104.09864)."""

import chex
import jax.numpy as jnp

from jaxnets.typing import Array


def rotate(x: Array, places: Array | None = None, *, base: float = 10_000.0) -> Array:
    """Turn pairs of numbers by angles that grow with the place.

    Product of a query and a key so turned depends on how far apart they are, and not on where. Number i
    makes a pair with number i + K / 2 (the convention of GPT-NeoX and Llama), turned by
    `place * base ** (-2 i / K)`.

    Args:
        x: `[B, T, N, K]`, queries or keys.
        places: integers `[B, T]`; 0, 1, ... by default.
        base: of the angles.

    Returns:
        `[B, T, N, K]`, of x's dtype; computed in at least float32.

    Raises:
        ValueError: if K is odd.

    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> [round(y, 4) for y in rotate(x, jnp.array([[1]])).ravel().tolist()]  # cosine and sine of 1
        [0.5403, 0.8415]
    """
    batch, length, _, width = x.shape
    if width % 2:
        raise ValueError(f"rotary positions take heads of even width, not {width}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if places is None:
        places = jnp.arange(length)[None]
    else:
        chex.assert_shape(places, (batch, length))
    speed_K = jnp.asarray(base, dtype) ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angle_BTNK = places[..., None, None].astype(dtype) * speed_K[None, None, None]
    cos, sin = jnp.cos(angle_BTNK), jnp.sin(angle_BTNK)
    left, right = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)
