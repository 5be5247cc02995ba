"""Two-dimensional convolution, in the form that is fast where it runs.

XLA on a CPU is weak at convolutions of few channels, worst at their gradients: it has no kernel for
the gradient of the weights, and a convolution inside a loop falls to a plain loop nest. A matrix
product runs near the processor's ceiling. So there a convolution of few input channels becomes one:
the image is cut into tiles, a row of the left matrix holds all pixels that one tile of the output
depends on, and the right matrix is the kernel spread to every place in the tile, zero elsewhere.
That takes more arithmetic and long rows on both sides, and wins. Autodiff turns it into two more
such products.

Unstrided convolutions take this form too where the image is smaller than the kernel both ways, as
2x2 under 3x3 at the end of a network (XLA's is ten times slower and more), and in float64, for which
XLA has no convolution library on a CPU.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from jaxnets.ops.forms import is_for_cpu
from jaxnets.typing import Array

_FEW = 8  # input channels from which XLA's own convolution is faster; measured, see docs/performance.md


def convolve(
    x: Array, kernel: Array, strides: tuple[int, int], pads: Sequence[tuple[int, int]]
) -> Array:
    """Cross-correlate images with a kernel.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[height, width, C, O]`.
        strides: steps between outputs, in pixels.
        pads: zeros below and above in H and in W, in pixels.

    Returns:
        `[B, H', W', O]`.
    """
    is_few = x.shape[3] < _FEW
    is_small = all(n < k for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    is_slow = is_few or is_small or x.dtype == jnp.float64
    if is_for_cpu() and tuple(strides) == (1, 1) and is_slow:
        return convolve_tiles(x, kernel, pads, _tile(kernel.shape[:2]) if is_few else (1, 1))
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _tile(window: Sequence[int]) -> tuple[int, int]:
    """The tile that was fastest for a kernel of that size and few channels."""
    if min(window) >= 5:
        return 2, 2
    return (1, 2) if window[1] >= 3 else (1, 1)


def convolve_tiles(
    x: Array, kernel: Array, pads: Sequence[tuple[int, int]], tile: tuple[int, int]
) -> Array:
    """`convolve` without strides as one matrix product over tiles of the output.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[height, width, C, O]`.
        pads: zeros below and above in H and in W, in pixels.
        tile: height and width of a tile, in pixels; (1, 1) is the usual rearrangement of an image
            into a matrix.

    Returns:
        `[B, H', W', O]`.
    """
    batch, channels, features = x.shape[0], x.shape[3], kernel.shape[3]
    out = [n + sum(p) - k + 1 for n, p, k in zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)]
    tiles = [-(-n // t) for n, t in zip(out, tile, strict=True)]
    # The pixels that a tile depends on, in whole blocks of the tile's size.
    reach = [-(-(t + k - 1) // t) for t, k in zip(tile, kernel.shape[:2], strict=True)]
    blocks = [n + r - 1 for n, r in zip(tiles, reach, strict=True)]
    fill = [
        (low, b * t - n - low)
        for (low, _), b, t, n in zip(pads, blocks, tile, x.shape[1:3], strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *fill, (0, 0)))
    x = x.reshape(batch, blocks[0], tile[0], blocks[1], tile[1], channels)
    # Without the barriers XLA computes what x and the result are made of once for every shifted view.
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *blocks, tile[0] * tile[1] * channels)
    x = lax.optimization_barrier(x)
    views = [x[:, i : i + tiles[0], j : j + tiles[1]] for i in range(reach[0]) for j in range(reach[1])]
    rows = jnp.concatenate(views, axis=-1)
    y = rows.reshape(batch * tiles[0] * tiles[1], rows.shape[-1]) @ _spread(kernel, tile, reach)
    y = y.reshape(batch, *tiles, *tile, features).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, tiles[0] * tile[0], tiles[1] * tile[1], features)
    return lax.optimization_barrier(y[:, : out[0], : out[1]])


def _spread(kernel: Array, tile: tuple[int, int], reach: Sequence[int]) -> Array:
    """The kernel at every place in a tile, `[reach * tile * C, tile * O]`, in the order of the rows."""
    height, width, channels, features = kernel.shape
    size = [r * t for r, t in zip(reach, tile, strict=True)]
    places = [
        jnp.pad(kernel, ((i, size[0] - height - i), (j, size[1] - width - j), (0, 0), (0, 0)))
        for i in range(tile[0])
        for j in range(tile[1])
    ]
    spread = jnp.stack(places, axis=3)
    spread = spread.reshape(reach[0], tile[0], reach[1], tile[1], channels, -1)
    return spread.transpose(0, 2, 1, 3, 4, 5).reshape(-1, len(places) * features)
