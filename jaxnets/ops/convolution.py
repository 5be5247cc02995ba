"""Two-dimensional convolution, in the form that is fast where it runs.

XLA on a CPU is weak at convolutions of few channels, worst at their gradients: it has no kernel for
the gradient of the weights, and a convolution inside a loop falls to a plain loop nest. A matrix
product runs near the processor's ceiling. So there a convolution of few input channels becomes one:
the image is cut into tiles, a row of the left matrix holds all pixels that one tile of the output
depends on, and the right matrix is the kernel spread to every place in the tile, zero elsewhere.
That takes more arithmetic and long rows on both sides, and wins. Autodiff turns it into two more
such products.

A convolution of more channels goes to oneDNN in float32, where jaxlib has it (`jaxnets.ops.onednn`).

Products are also what becomes of kernels of one pixel, of those that tile the image (the patches of a
vision transformer), of convolutions of an image that is smaller than the kernel both ways, as 2x2 under
3x3 at the end of a network, of a few pixels of one image, and of all in float64, for which XLA has no
convolution library on a CPU.

Groups are worse still: XLA computes the gradient of their weights a hundred times slower than need
be. They are cut apart, or where there are many, bundled under a kernel that is zero between them. A
depthwise convolution is a sum of shifted images, each times one number a channel.
"""

from collections.abc import Sequence
from functools import partial, reduce
from math import prod

import jax.numpy as jnp
from jax import lax

from jaxnets.ops import onednn
from jaxnets.ops.forms import is_for_cpu
from jaxnets.typing import Array

# Measured, see docs/performance.md.
_FEW = 8  # input channels from which XLA's own convolution is faster
_FEW_PIXELS = 32  # of all outputs together, up to which the kernel is read fastest by a plain product
_PART_CHANNELS, _MOST_PARTS = 16, 32  # of a grouped convolution's parts: the fewest, and how many

Pads = Sequence[tuple[int, int]]


def convolve(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    pads: Pads,
    *,
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Array:
    """Cross-correlate images with a kernel.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[height, width, C / groups, O]`.
        strides: steps between outputs, in pixels.
        pads: zeros below and above in H and in W, in pixels.
        dilation: steps between the kernel's places, in pixels.
        groups: parts of C and of O; each part of O depends on its part of C.

    Returns:
        `[B, H', W', O]`.
    """
    window = kernel.shape[:2]
    own = partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=pads,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    if not is_for_cpu() or 0 in x.shape:
        return own(x, kernel)
    if groups > 1:
        if kernel.shape[2] == 1:
            return _depthwise(x, kernel, strides, pads, dilation)
        return _grouped(x, kernel, strides, pads, dilation, groups)
    if window == (1, 1) and not any(map(any, pads)):
        return _rows(x[:, :: strides[0], :: strides[1]], kernel)
    if tuple(strides) == window and tuple(dilation) == (1, 1):
        return _rows(_patches(x, window, pads), kernel)
    reach = reach_of(window, dilation)
    is_few = tuple(strides) == (1, 1) and x.shape[3] < _FEW
    is_small = all(n < k for n, k in zip(x.shape[1:3], reach, strict=True))
    if is_few and tuple(dilation) == (1, 1):
        return convolve_tiles(x, kernel, pads, _tile(window))
    sides = zip(x.shape[1:3], pads, reach, strides, strict=True)
    out = [(n + sum(p) - r) // s + 1 for n, p, r, s in sides]
    if not all(isinstance(n, int) for n in (*x.shape, *out)) or min(out) < 1:
        return own(x, kernel)  # an export for any batch, or nothing is left
    num_outputs = x.shape[0] * prod(out)
    if is_few or is_small or num_outputs <= _FEW_PIXELS or x.dtype == jnp.float64:
        views = _views(x, window, strides, pads, dilation)
        return _rows(jnp.concatenate(views, axis=-1), kernel)
    is_for_onednn = tuple(dilation) == (1, 1) and onednn.pays(num_outputs, kernel)
    if is_for_onednn and onednn.is_known() and onednn.fits(x, kernel, pads):
        return onednn.convolve(x, kernel, strides, pads)
    return own(x, kernel)


def reach_of(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Pixels from a kernel's first place to its last, both counted."""
    return [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]


def _rows(rows: Array, kernel: Array) -> Array:
    """The product of `[B, H', W', height * width * C]` and the kernel; two axes, or XLA transposes."""
    flat = rows.reshape(-1, rows.shape[3]) @ kernel.reshape(-1, kernel.shape[3])
    return flat.reshape(*rows.shape[:3], kernel.shape[3])


def _views(
    x: Array, window: Sequence[int], strides: Sequence[int], pads: Pads, dilation: Sequence[int]
) -> list[Array]:
    """What lies under each place of the kernel, `[B, H', W', C]`, in row-major order."""
    batch, *padded, channels = (
        n + sum(p) for n, p in zip(x.shape, ((0, 0), *pads, (0, 0)), strict=True)
    )
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    reach = reach_of(window, dilation)
    # From a place's first pixel to its last, both counted.
    span = [(n - r) // s * s + 1 for n, r, s in zip(padded, reach, strides, strict=True)]
    return [
        lax.slice(x, (0, i, j, 0), (batch, i + span[0], j + span[1], channels), (1, *strides, 1))
        for i in range(0, reach[0], dilation[0])
        for j in range(0, reach[1], dilation[1])
    ]


def _patches(x: Array, window: Sequence[int], pads: Pads) -> Array:
    """The image cut into tiles of the kernel's size, `[B, H', W', height * width * C]`."""
    (height, width), (batch, _, _, channels) = window, x.shape
    counts = [(n + sum(p)) // k for n, p, k in zip(x.shape[1:3], pads, window, strict=True)]
    fill = [  # the last pixels may be left over, for which a negative number stands
        (low, count * k - n - low)
        for (low, _), count, k, n in zip(pads, counts, window, x.shape[1:3], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((a, b, 0) for a, b in fill), (0, 0, 0)))
    x = x.reshape(batch, counts[0], height, counts[1], width, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *counts, height * width * channels)


def _depthwise(
    x: Array, kernel: Array, strides: Sequence[int], pads: Pads, dilation: Sequence[int]
) -> Array:
    """Each channel with its own kernels: `[height, width, 1, O]`, O a multiple of C."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # of the sums, and of their gradients
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[3]).astype(dtype)
    x = jnp.repeat(x, kernel.shape[3] // x.shape[3], axis=3)
    views = _views(x, kernel.shape[:2], strides, pads, dilation)
    products = [view.astype(dtype) * weight for view, weight in zip(views, weights, strict=True)]
    return reduce(jnp.add, products).astype(x.dtype)


def _grouped(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int],
    groups: int,
) -> Array:
    """Convolutions of their own for the groups, or for bundles of them.

    In a bundle a NaN reaches the other groups' outputs as well, which zeros keep nothing else from.
    """
    most = min(_MOST_PARTS, max(1, x.shape[3] // _PART_CHANNELS))
    bundle = -(-groups // most)
    channels, features = x.shape[3] // groups, kernel.shape[3] // groups
    outputs = []
    for begin in range(0, groups, bundle):
        end = min(begin + bundle, groups)
        image = x[..., begin * channels : end * channels]
        weights = _block_diagonal(kernel[..., begin * features : end * features], end - begin)
        outputs.append(convolve(image, weights, strides, pads, dilation=dilation))
    return jnp.concatenate(outputs, axis=3)


def _block_diagonal(kernel: Array, groups: int) -> Array:
    """A kernel over all channels `[height, width, groups * C, O]`, zero outside of its group's."""
    if groups == 1:
        return kernel
    height, width, channels, features = kernel.shape
    each = kernel.reshape(height, width, 1, channels, groups, features // groups)
    is_own = jnp.eye(groups, dtype=bool)[None, None, :, None, :, None]
    return jnp.where(is_own, each, 0).reshape(height, width, groups * channels, features)


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
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *blocks, tile[0] * tile[1] * channels)
    views = [x[:, i : i + tiles[0], j : j + tiles[1]] for i in range(reach[0]) for j in range(reach[1])]
    rows = jnp.concatenate(views, axis=-1)
    y = rows.reshape(batch * tiles[0] * tiles[1], rows.shape[-1]) @ _spread(kernel, tile, reach)
    y = y.reshape(batch, *tiles, *tile, features).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, tiles[0] * tile[0], tiles[1] * tile[1], features)
    return y[:, : out[0], : out[1]]


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
