"""Pooling in plain primitives.

`lax.reduce_window` has a gradient that XLA runs as a scatter, one element at a time on a CPU. Here a
window is folded over its shifted views instead: comparisons and selects, which fuse. Where windows
tile the image the views are parts of a reshaped image, whose gradient is a concatenation; elsewhere
they are strided slices, whose gradients are padded adds. A maximum that occurs more than once in a
window sends its gradient to the first in row-major order, and a NaN in a window comes through, both
as in PyTorch.
"""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.ops.forms import is_plain
from jaxnets.typing import Array


def max_pool(x: Array, window: tuple[int, int], strides: tuple[int, int] | None = None) -> Array:
    """The maximum over windows that lie within the image.

    Args:
        x: `[B, H, W, C]`.
        window: height and width of the window, in pixels.
        strides: steps between windows; the window's size by default.

    Returns:
        `[B, (H - height) // stride + 1, (W - width) // stride + 1, C]`.

    Raises:
        ValueError: if x is not of rank 4, window or strides are below 1, or the output would be
            empty.

    Example:
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, :, :, 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]
    """
    strides = strides or window
    views = _views(x, window, strides)  # which checks the arguments
    if is_plain():
        lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
        start = np.asarray(lowest, x.dtype)
        return lax.reduce_window(x, start, lax.max, (1, *window, 1), (1, *strides, 1), "VALID")
    return _first_max(tuple(views))


def avg_pool(x: Array, window: tuple[int, int], strides: tuple[int, int] | None = None) -> Array:
    """The mean over windows that lie within the image; shapes and errors as in `max_pool`.

    It is added up in at least float32 and given back in x's dtype (in floating point for integers).
    """
    views = _views(x.astype(jnp.promote_types(x.dtype, jnp.float32)), window, strides or window)
    mean = reduce(jnp.add, views) / len(views)
    return mean.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else mean


@jax.custom_jvp
def _first_max(views: tuple[Array, ...]) -> Array:
    """The maximum over arrays of one shape."""
    return reduce(lambda best, view: jnp.where(_beats(view, best), view, best), views)


@_first_max.defjvp
def _first_max_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # Which array the maximum came from is found by comparing with it. Autodiff of the fold would keep
    # or compute again all of its intermediate maxima.
    (views,), (dots,) = primals, tangents
    best = _first_max(views)
    is_taken, terms = jnp.zeros(best.shape, bool), []
    for view, dot in zip(views, dots, strict=True):
        is_best = (view == best) | _is_nan(view)
        terms.append(jnp.where(is_best & ~is_taken, dot, jnp.zeros_like(dot)))
        is_taken |= is_best
    return best, reduce(jnp.add, terms)


def _beats(view: Array, best: Array) -> Array:
    return (view > best) | _is_nan(view)


def _is_nan(x: Array) -> Array:
    return x != x  # also for integers, where jnp.isnan fails


def _views(x: Array, window: tuple[int, int], strides: tuple[int, int]) -> list[Array]:
    """What stands at each place of a window, over all windows, in row-major order."""
    if x.ndim != 4:
        raise ValueError(f"pooling takes [B, H, W, C], not {x.shape}")
    if min(*window, *strides) < 1:
        raise ValueError(f"window and strides are at least 1, not {window} and {strides}")
    rows, columns = ((n - w) // s + 1 for n, w, s in zip(x.shape[1:3], window, strides, strict=True))
    if min(rows, columns) < 1:
        raise ValueError(f"a {window} window leaves nothing of an image of shape {x.shape[1:3]}")
    batch, channels = x.shape[0], x.shape[3]
    height, width = window
    if tuple(strides) == tuple(window):
        tiles = x[:, : rows * height, : columns * width]
        tiles = tiles.reshape(batch, rows, height, columns, width, channels)
        bands = [band[:, :, 0] for band in lax.split(tiles, [1] * height, axis=2)]
        return [part[:, :, :, 0] for band in bands for part in lax.split(band, [1] * width, axis=3)]
    stop = (rows - 1) * strides[0] + 1, (columns - 1) * strides[1] + 1
    return [
        lax.slice(x, (0, i, j, 0), (batch, i + stop[0], j + stop[1], channels), (1, *strides, 1))
        for i in range(height)
        for j in range(width)
    ]
