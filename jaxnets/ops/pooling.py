"""Pooling in plain primitives.

`lax.reduce_window` has a gradient that XLA runs as a scatter, one element at a time on a CPU. Here a
window is folded over its shifted, strided views instead: comparisons and selects, which fuse, and a
gradient of padded adds. A maximum that occurs more than once in a window sends its gradient to the
first in row-major order, and a NaN in a window comes through, both as in PyTorch.
"""

from collections.abc import Callable
from functools import reduce

import jax.numpy as jnp
from jax import lax

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
    return _fold(x, window, strides, lambda best, view: jnp.where(_beats(view, best), view, best))


def avg_pool(x: Array, window: tuple[int, int], strides: tuple[int, int] | None = None) -> Array:
    """The mean over windows that lie within the image; shapes and errors as in `max_pool`.

    It is added up in at least float32 and given back in x's dtype (in floating point for integers).
    """
    total = _fold(x.astype(jnp.promote_types(x.dtype, jnp.float32)), window, strides, jnp.add)
    mean = total / (window[0] * window[1])
    return mean.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else mean


def _beats(view: Array, best: Array) -> Array:
    beats = view > best
    if jnp.issubdtype(view.dtype, jnp.floating):
        beats |= jnp.isnan(view)
    return beats


def _fold(
    x: Array,
    window: tuple[int, int],
    strides: tuple[int, int] | None,
    combine: Callable[[Array, Array], Array],
) -> Array:
    strides = strides or window
    if x.ndim != 4:
        raise ValueError(f"pooling takes [B, H, W, C], not {x.shape}")
    if min(*window, *strides) < 1:
        raise ValueError(f"window and strides are at least 1, not {window} and {strides}")
    size = [(n - w) // s + 1 for n, w, s in zip(x.shape[1:3], window, strides, strict=True)]
    if min(size) < 1:
        raise ValueError(f"a {window} window leaves nothing of an image of shape {x.shape[1:3]}")

    def view(row: int, column: int) -> Array:
        stop = (row + (size[0] - 1) * strides[0] + 1, column + (size[1] - 1) * strides[1] + 1)
        return lax.slice(
            x,
            (0, row, column, 0),
            (x.shape[0], stop[0], stop[1], x.shape[3]),
            (1, strides[0], strides[1], 1),
        )

    return reduce(combine, (view(i, j) for i in range(window[0]) for j in range(window[1])))
