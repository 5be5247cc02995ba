"""From bytes to numbers, on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxnets.typing import Array


def normalize_images(
    image: Array, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> Array:
    """`(image / 255 - mean) / std`, by channel.

    Args:
        image: uint8 `[..., C]`.
        mean: of each channel, on the scale from 0 to 1; one number stands for all channels.
        std: of each channel, on the same scale.

    Returns:
        `[..., C]`, float32 (float64 where JAX has 64 bits enabled).

    Raises:
        ValueError: if the image isn't uint8, so that nothing is divided by 255 twice.
    """
    if image.dtype != jnp.uint8:
        raise ValueError(f"normalize_images takes uint8, not {image.dtype}")
    dtype = jnp.result_type(float)
    leading = (1,) * (image.ndim - 1)
    scaled = image.astype(dtype) / 255
    return (scaled - jnp.asarray(mean, dtype).reshape(*leading, -1)) / jnp.asarray(std, dtype).reshape(
        *leading, -1
    )


def resize_images(x: Array, size: tuple[int, int]) -> Array:
    """Bring images to a size, each pixel the mean of what it covers, weighted by its distance.

    Args:
        x: `[B, H, W, C]`, floating.
        size: height and width, in pixels, at least 1 each.

    Returns:
        `[B, *size, C]`; x itself if that is its size.
    """
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear", antialias=True)
