"""Random changes of images, on the device.

What happens to an example follows from a key and its position in the stream of the run alone: not
from the device, the micro-batch or the step at which a run was resumed. Take the key from the run's
seed and the positions from `batch["position"]`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops.hash import row_bits
from jaxnets.typing import Array


def random_crop(x: Array, pixels: int, *, key: Array, position: Array) -> Array:
    """Move every image by up to so many pixels both ways; its border is reflected.

    Args:
        x: `[B, H, W, C]`.
        pixels: 0 to less than H and W.
        key: a PRNG key.
        position: integers `[B]`.

    Returns:
        `[B, H, W, C]`.

    Raises:
        ValueError: if pixels is out of range.
    """
    if not 0 <= pixels < min(x.shape[1:3]):
        raise ValueError(f"an image of shape {x.shape[1:3]} can't be moved by {pixels} pixels")
    if pixels == 0:
        return x
    low_B2 = _integers(key, position, 2, 2 * pixels + 1)
    padded = jnp.pad(x, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    return _windows(padded, low_B2, x.shape[1:3])


def random_window(x: Array, side: int, *, key: Array, position: Array) -> Array:
    """Cut a square from every image.

    Args:
        x: `[B, H, W, C]`.
        side: of the square in pixels, 1 to the smaller of H and W.
        key: a PRNG key.
        position: integers `[B]`.

    Returns:
        `[B, side, side, C]`.

    Raises:
        ValueError: if the side is out of range.
    """
    if not 1 <= side <= min(x.shape[1:3]):
        raise ValueError(f"no window of {side} pixels a side fits into an image of {x.shape[1:3]}")
    low = [_integers(key, position, 1, n - side + 1, salt=axis) for axis, n in enumerate(x.shape[1:3])]
    return _windows(x, jnp.concatenate(low, axis=1), (side, side))


def random_flip(x: Array, *, key: Array, position: Array) -> Array:
    """Mirror half of the images left to right.

    Args:
        x: `[B, H, W, C]`.
        key: a PRNG key.
        position: integers `[B]`.

    Returns:
        `[B, H, W, C]`.
    """
    return _flip(x, _integers(key, position, 1, 2)[:, 0] == 1)


def alternating_flip(x: Array, *, key: Array, index: Array, position: Array, num_examples: int) -> Array:
    """Mirror half of the images in the first epoch, and the other half in the next.

    So that any two epochs show every example both ways (Jordan 2024, arXiv 2404.00498, section 3.6).

    Args:
        x: `[B, H, W, C]`.
        key: a PRNG key.
        index: integers `[B]`, which examples they are.
        position: integers `[B]`.
        num_examples: N, from which the epoch of a position follows.

    Returns:
        `[B, H, W, C]`.
    """
    epoch = position.astype(jnp.uint32) // jnp.uint32(num_examples)
    first = _integers(key, index, 1, 2)[:, 0]
    return _flip(x, (first.astype(jnp.uint32) + epoch) % 2 == 1)


def cutout(x: Array, side: int, *, key: Array, position: Array) -> Array:
    """Blank a square in every image (DeVries & Taylor 2017, arXiv 1708.04552).

    Args:
        x: `[B, H, W, C]`; what is blanked becomes 0, the mean of normalised images.
        side: of the square in pixels; its middle is any pixel, so parts of it may lie outside.
        key: a PRNG key.
        position: integers `[B]`.

    Returns:
        `[B, H, W, C]`.
    """
    if side < 0:
        raise ValueError(f"the side of a square is at least 0 pixels, not {side}")
    inside = jnp.ones((x.shape[0], 1, 1, 1), bool)
    for axis, size in ((1, x.shape[1]), (2, x.shape[2])):
        low = _integers(key, position, 1, size, salt=axis)[:, :, None, None] - side // 2
        place = lax.broadcasted_iota(jnp.int32, (1, *x.shape[1:3], 1), axis)
        inside &= (place >= low) & (place < low + side)
    return jnp.where(inside, jnp.zeros((), x.dtype), x)


def mixup_weights(alpha: float, *, key: Array, position: Array) -> Array:
    """The share of each example that stays when it is mixed with a partner.

    Mix as `w * x + (1 - w) * partner`, images and losses alike (Zhang et al. 2018, arXiv 1710.09412);
    `batch["partner"]` holds the partners where `Batches` draws them.

    Args:
        alpha: of the distribution Beta(alpha, alpha), above 0.
        key: a PRNG key.
        position: integers `[B]`.

    Returns:
        float32 `[B]` in [0, 1].
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")
    keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(position)
    return jax.vmap(lambda k: jax.random.beta(k, alpha, alpha, dtype=jnp.float32))(keys)


def _windows(x: Array, low_B2: Array, size: Sequence[int]) -> Array:
    def cut(image: Array, low: Array) -> Array:
        return lax.dynamic_slice(image, (low[0], low[1], 0), (*size, x.shape[3]))

    return jax.vmap(cut)(x, low_B2)


def _flip(x: Array, is_flipped: Array) -> Array:
    return jnp.where(is_flipped[:, None, None, None], x[:, :, ::-1], x)


def _integers(key: Array, rows: Array, count: int, below: int, *, salt: int = 0) -> Array:
    """int32 `[B, count]` in [0, below), from the upper bits."""
    bits = row_bits(jax.random.fold_in(key, salt) if salt else key, rows, (count,))
    # below is at most 2**16 here, so the product of 16 bits with it fits.
    return ((bits >> 16) * jnp.uint32(below) >> 16).astype(jnp.int32)
