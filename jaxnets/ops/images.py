"""From bytes to numbers, on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxnets.typing import Array

NUM_VIEWS = (1, 2, 6)
"""How many views `image_views` can make."""


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


def image_views(x: Array, num_views: int) -> list[tuple[float, Array]]:
    """Views of each image, over whose predictions evaluation takes the mean.

    For photographs, whose mirror image is of the same class; a digit's isn't. The six are those of
    Jordan (2024, arXiv 2404.00498): what is moved has half of the weight, and every view is there as its
    mirror image too.

    Args:
        x: `[B, H, W, C]`, H and W at least 2 where images are moved.
        num_views: 1, the image; 2, and its mirror image; or 6, and both moved by a pixel up and left,
            and by one down and right, the border reflected.

    Returns:
        the weight, of a sum of 1, and the images `[B, H, W, C]` of each view.

    Raises:
        ValueError: for another number, or another rank.
    """
    if num_views not in NUM_VIEWS:
        raise ValueError(f"there are 1, 2 or 6 views of an image, not {num_views}")
    if x.ndim != 4:
        raise ValueError(f"images are [B, H, W, C], not of the shape {x.shape}")
    height, width = x.shape[1:3]
    views = [(1.0, x)]
    if num_views == 6:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        moved = [padded[:, low : low + height, low : low + width] for low in (2, 0)]
        views = [(0.5, x), *((0.25, y) for y in moved)]
    if num_views > 1:
        views = [(weight / 2, y) for weight, x in views for y in (x, x[:, :, ::-1])]
    return views
