"""Convolution by oneDNN, which jaxlib carries for x86 and XLA leaves unused.

XLA:CPU has a custom call for oneDNN's forward convolution and, with the options that stock jaxlib is
built with, never emits it. Called directly it runs at 75 to 95 % of the speed of a matrix product, up to
three times as fast as what XLA makes of a convolution. There is no such call for the gradients, so
both are forward convolutions here:

- of the image: the cotangent under the kernel turned around; with strides, one such convolution for
  each of the places that an output step has, and their results interleaved;
- of the kernel: the batch takes the part of the channels and the cotangent that of the kernel. Width and
  channels lie folded in one axis, `[1, H, W * C, B]`, over which the cotangent `[H', W', B, O]` moves in
  steps of one and with holes of C, so that what comes out is `[height, width * C, O]`. (With batch and
  channels merely exchanged the output is three pixels wide, which no library is fast for.)

The three are one trilinear form, each the transpose of the others, and one JAX primitive: jvp, vmap,
scan, remat and gradients of any order follow from that. A program over several devices that XLA
partitions itself, one for another platform, and one that is exported or that JAX's persistent cache
might keep (XLA can't write this call down) get `jax.lax`'s convolution when they are lowered.

The call isn't a public interface of XLA. What it means has changed before, and a call that oneDNN
doesn't understand ends the process; so it is made only under releases of jaxlib on which it was tried.
"""

import contextlib
import contextvars
import dataclasses
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from math import gcd, prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jaxlib.version import __version__ as jaxlib_version

from jaxnets.typing import Array

TRIED = ("0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1")
"""The jaxlib releases whose call is the one that is made here."""

NAME = "onednn_convolution"

# Chosen, not measured.
_LEAST_WORK = 2**22  # multiplications for which a call, and a program that isn't kept, should pay
_MOST_PLACES = 49  # of a kernel that is turned around place by place
# Measured, see docs/performance.md.
_FOLDED_CHANNELS = 64  # of the image in the gradient of the kernel, for each part of its channels
_SHORT, _IN_A_ROW = 6, 16  # rows of how many pixels are short, and of how many images they are joined
_CHUNK, _LEAST_PIXELS = 16, 36  # images that it takes at once, and for outputs of how many pixels


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a convolution has besides its arrays.

    Attributes:
        image: height and width, in pixels.
        window: of the kernel, in pixels.
        strides: steps between outputs, in pixels.
        pads: zeros below and above in H and in W, in pixels; fewer than the window is long.
    """

    image: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]

    @property
    def out(self) -> tuple[int, ...]:
        """Height and width of the output, in pixels."""
        sides = zip(self.image, self.window, self.strides, self.pads, strict=True)
        return tuple((n + sum(p) - k) // s + 1 for n, k, s, p in sides)


def is_known() -> bool:
    """Whether this jaxlib has the call."""
    is_here = sys.platform == "linux" and platform.machine() == "x86_64"
    return is_here and jaxlib_version in TRIED


def pays(num_outputs: int, kernel: Array) -> bool:
    """Whether there is so much to multiply that `convolve` is worth its while.

    Args:
        num_outputs: pixels of all outputs together.
        kernel: `[height, width, C, O]`.
    """
    return num_outputs * prod(kernel.shape) >= _LEAST_WORK


def fits(x: Array, kernel: Array, pads: Sequence[tuple[int, int]]) -> bool:
    """Whether `convolve` takes these: float32, padding below the window's size, and not spread by type.

    Nor images of one channel, with which oneDNN 3.7 leaves out rows where there are strides.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[height, width, C, O]`.
        pads: zeros below and above in H and in W, in pixels.
    """
    is_rank_4 = x.ndim == kernel.ndim == 4 and x.shape[3] == kernel.shape[2] > 1
    is_small = all(0 <= p < k for pair, k in zip(pads, kernel.shape, strict=False) for p in pair)
    is_float32 = x.dtype == kernel.dtype == jnp.float32
    is_spread = _is_spread(x) or _is_spread(kernel)
    return is_rank_4 and is_small and is_float32 and not is_spread and 0 not in (*x.shape, *kernel.shape)


def _is_spread(x: Array) -> bool:
    """Whether the array's type says how it lies over devices, which the primitive's rules don't know."""
    kind = jax.typeof(x)
    return any(axis is not None for axis in kind.sharding.spec) or not kind.manual_axis_type.empty


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

    Raises:
        ValueError: if they aren't what `fits` asks for, or the output would be empty.
    """
    (top, bottom), (left, right) = ((int(a), int(b)) for a, b in pads)
    pads = ((top, bottom), (left, right))
    image, window = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
    geometry = Geometry(image, window, (strides[0], strides[1]), pads)
    if not fits(x, kernel, pads) or min(strides) < 1 or min(geometry.out) < 1:
        raise ValueError(f"oneDNN doesn't take {x.shape} and {kernel.shape}, {strides}, {pads}")
    return _conv_p.bind(x, kernel, gives="output", geometry=geometry)


_conv_p = Primitive(NAME)
_conv_p.def_impl(partial(xla.apply_primitive, _conv_p))

# What is computed of (image, kernel, output): from the other two, in that order.
_FROM = {
    "output": ("image", "kernel"),
    "image": ("output", "kernel"),
    "kernel": ("image", "output"),
}


def _shape(a: Sequence[int], b: Sequence[int], gives: str, geometry: Geometry) -> tuple[int, ...]:
    if gives == "output":
        return (a[0], *geometry.out, b[3])
    if gives == "image":
        return (a[0], *geometry.image, b[2])
    return (*geometry.window, a[3], b[3])


@_conv_p.def_abstract_eval
def _abstract(a: Any, b: Any, *, gives: str, geometry: Geometry) -> Any:
    return ShapedArray(_shape(a.shape, b.shape, gives, geometry), a.dtype)


def _transpose(place: int, cotangent: Array, *arrays: Any, gives: str, geometry: Geometry) -> Array:
    """The cotangent of the argument at a place: the same form, solved for another of the three."""
    wanted = _FROM[gives][place]
    known = {gives: cotangent, _FROM[gives][1 - place]: arrays[1 - place]}
    return _conv_p.bind(*(known[n] for n in _FROM[wanted]), gives=wanted, geometry=geometry)


ad.defbilinear(_conv_p, partial(_transpose, 0), partial(_transpose, 1))


def _batch(
    arrays: Sequence[Array], axes: Sequence[int | None], *, gives: str, geometry: Geometry
) -> tuple[Array, int]:
    x_axis, kernel_axis = axes
    is_of_images = gives != "kernel" and kernel_axis is None
    if is_of_images and x_axis is not None and not _is_spread(arrays[0]):  # more under one kernel
        x = jnp.moveaxis(arrays[0], x_axis, 0)
        y = _conv_p.bind(x.reshape(-1, *x.shape[2:]), arrays[1], gives=gives, geometry=geometry)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    mapped = jax.vmap(partial(_by_lax, gives=gives, geometry=geometry), tuple(axes))
    return mapped(*arrays), 0


batching.primitive_batchers[_conv_p] = _batch


def _by_lax(a: Array, b: Array, *, gives: str, geometry: Geometry) -> Array:
    """As `jax.lax` computes it, for any platform and over any devices."""
    conv = partial(
        lax.conv_general_dilated,
        window_strides=geometry.strides,
        padding=geometry.pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if gives == "output":
        return conv(a, b)
    shape = jax.ShapeDtypeStruct(_shape(a.shape, b.shape, gives, geometry), a.dtype)
    if gives == "image":
        return jax.linear_transpose(lambda x: conv(x, b), shape)(a)[0]
    return jax.linear_transpose(lambda kernel: conv(a, kernel), shape)(b)[0]


def _by_onednn(a: Array, b: Array, *, gives: str, geometry: Geometry) -> Array:
    if 0 in (*a.shape, *b.shape):  # of a vmap over nothing
        return jnp.zeros(_shape(a.shape, b.shape, gives, geometry), a.dtype)
    if gives == "output":
        if geometry.strides == (1, 1):
            return _unstrided(a, b, "HWIO", geometry.pads)
        return _call(a, b, "HWIO", geometry.pads, geometry.strides)
    if gives == "image":
        return _image(a, b, geometry)
    num_images = a.shape[0]
    if prod(geometry.out) < _LEAST_PIXELS or num_images <= _CHUNK:
        return _kernel(a, b, geometry)
    # A loop, in which the images that are copied into the other order stay in the processor's cache.
    # It cuts them out of the whole arrays: of arrays cut up before it XLA computes a second copy.
    count, rest = divmod(num_images, _CHUNK)

    def add(number: Array, total: Array) -> Array:
        cut = partial(lax.dynamic_slice_in_dim, start_index=number * _CHUNK, slice_size=_CHUNK)
        return total + _kernel(cut(a), cut(b), geometry)

    total = _kernel(a[-rest:], b[-rest:], geometry) if rest else 0
    zeros = jnp.zeros(_shape(a.shape, b.shape, gives, geometry), a.dtype)
    return lax.fori_loop(0, count, add, zeros) + total


def _image(y: Array, kernel: Array, geometry: Geometry) -> Array:
    """The image's cotangent `[B, H, W, C]` from the output's `[B, H', W', O]`.

    With strides (s, t) the padded image's pixels (s * q + i, t * r + j) depend for each i < s and j < t
    on the kernel's places (i, j), (i + s, j), ...: a convolution of the cotangent without strides.
    """
    lows = [low for low, _ in geometry.pads]
    firsts = [low // s for low, s in zip(lows, geometry.strides, strict=True)]
    counts = [  # of steps q, r from the one in which the image begins to the one in which it ends
        -(-(n + low) // s) - first
        for n, low, s, first in zip(geometry.image, lows, geometry.strides, firsts, strict=True)
    ]
    phases = []
    for i in range(geometry.strides[0]):
        for j in range(geometry.strides[1]):
            places = kernel[i :: geometry.strides[0], j :: geometry.strides[1]]
            if 0 in places.shape:
                phases.append(jnp.zeros((y.shape[0], *counts, kernel.shape[2]), y.dtype))
                continue
            # Zeros before the first step, -1 for a step that nothing depends on; and after the last.
            begins = [k - 1 - first for k, first in zip(places.shape, firsts, strict=False)]
            ends = [f + c - n for f, c, n in zip(firsts, counts, y.shape[1:3], strict=True)]
            part = y[:, max(-begins[0], 0) :, max(-begins[1], 0) :]
            if 0 in part.shape:
                phases.append(jnp.zeros((y.shape[0], *counts, kernel.shape[2]), y.dtype))
                continue
            pads = [(max(begin, 0), end) for begin, end in zip(begins, ends, strict=True)]
            phases.append(_unstrided(part, _turned(places), "HWOI", pads))
    x = phases[0]
    if len(phases) > 1:
        batch, height, width, channels = x.shape
        x = jnp.stack(phases, axis=3).reshape(batch, height, width, *geometry.strides, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height * geometry.strides[0], width * geometry.strides[1], channels)
    begin = [low % s for low, s in zip(lows, geometry.strides, strict=True)]
    return x[:, begin[0] : begin[0] + geometry.image[0], begin[1] : begin[1] + geometry.image[1]]


def _turned(kernel: Array) -> Array:
    """The kernel, its places in the reverse order; XLA's own reversal goes number by number."""
    flat = kernel.reshape(-1, *kernel.shape[2:])
    if flat.shape[0] > _MOST_PLACES:
        return kernel[::-1, ::-1]
    places = [flat[i : i + 1] for i in reversed(range(flat.shape[0]))]
    return jnp.concatenate(places).reshape(kernel.shape)


def _kernel(x: Array, y: Array, geometry: Geometry) -> Array:
    """The kernel's cotangent `[height, width, C, O]` from the output's `[B, H', W', O]`."""
    (height, width), features = geometry.window, y.shape[3]
    sides = zip(
        x.shape[1:3], geometry.window, y.shape[1:3], geometry.strides, geometry.pads, strict=True
    )
    # Zeros above so many that there are as many outputs as the kernel has places.
    ends = [(n - 1) * s + k - size - low for size, k, n, s, (low, _) in sides]
    x = x[:, : x.shape[1] + min(ends[0], 0), : x.shape[2] + min(ends[1], 0)]
    batch, *size, channels = x.shape
    parts = channels // _FOLDED_CHANNELS
    parts = max(parts, 1 if channels < _FOLDED_CHANNELS else 2)  # for two threads, of which H has 3 rows
    while channels % parts:
        parts -= 1
    each = channels // parts
    x = x.reshape(batch, *size, parts, each).transpose(3, 1, 2, 4, 0)
    rows, columns = ((low, max(end, 0)) for (low, _), end in zip(geometry.pads, ends, strict=True))
    folded = _call(
        x.reshape(parts, size[0], size[1] * each, batch),
        y,
        "IHWO",
        (rows, (columns[0] * each, columns[1] * each)),
        dilation=(geometry.strides[0], geometry.strides[1] * each),
    )
    folded = folded.reshape(parts, height, width, each, features)
    return folded.transpose(1, 2, 0, 3, 4).reshape(height, width, channels, features)


def _unstrided(x: Array, kernel: Array, axes: str, pads: Sequence[tuple[int, int]]) -> Array:
    """`_call` without strides; where rows are short, of several images that lie in one another's rows.

    oneDNN multiplies a row of the output at once, which is slow for rows of a few pixels.
    """
    (batch, height, width, channels), (_, (left, right)) = x.shape, pads
    if width + left + right - kernel.shape[axes.index("W")] + 1 > _SHORT:
        return _call(x, kernel, axes, pads)
    each = gcd(batch, _IN_A_ROW)
    x = x.reshape(batch // each, each, height, width, channels).transpose(0, 2, 3, 1, 4)
    x = x.reshape(batch // each, height, width * each, channels)
    y = _call(x, kernel, axes, (pads[0], (left * each, right * each)), dilation=(1, each))
    y = y.reshape(batch // each, y.shape[1], y.shape[2] // each, each, y.shape[3])
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, *y.shape[1:3], y.shape[4])


def _call(
    x: Array,
    kernel: Array,
    axes: str,
    pads: Sequence[tuple[int, int]],
    strides: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> Array:
    """The call, for x `[B, H, W, C]`; `axes` are the kernel's: H, W, I(nput) and O(utput)."""
    where = {name: axes.index(name) for name in axes}
    window = [kernel.shape[where[name]] for name in "HW"]
    sides = zip(x.shape[1:3], window, pads, strides, dilation, strict=True)
    out = [(n + sum(p) - (k - 1) * d - 1) // s + 1 for n, k, p, s, d in sides]
    image = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    filter_dims = {
        "input_feature_dim": where["I"],
        "output_feature_dim": where["O"],
        "spatial_dims": [where["H"], where["W"]],
    }
    config = {
        "dims": 4,
        "input": image,
        "kernel": {"filter": filter_dims},
        "output": image,
        "window": {
            "pad_left": [low for low, _ in pads],
            "pad_right": [high for _, high in pads],
            "strides": list(strides),
            "window_dilations": list(dilation),
        },
        "feature_groups": 1,
    }
    call = jax.ffi.ffi_call(
        "__onednn$convolution",
        jax.ShapeDtypeStruct((x.shape[0], *out, kernel.shape[where["O"]]), x.dtype),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    return call(x, kernel)


def _is_partitioned(axis_context: Any) -> bool:
    """Whether XLA cuts the program into parts for several devices, rather than `shard_map`."""
    manual = getattr(axis_context, "manual_axes", None)
    if manual is not None:
        mesh = axis_context.mesh
        return any(size > 1 for axis, size in mesh.shape.items() if axis not in manual)
    return getattr(axis_context, "num_devices", None) != 1


@contextlib.contextmanager
def unkept() -> Iterator[None]:
    """While this is open, what is lowered in this thread is for a program that no cache will keep."""
    token = _unkept.set(True)
    try:
        yield
    finally:
        _unkept.reset(token)


_unkept: contextvars.ContextVar[bool] = contextvars.ContextVar("unkept", default=False)
_has_called_freely = False


def forget() -> None:
    """Drop what JAX has in memory if it has this call: a cache is about to be opened."""
    global _has_called_freely
    if _has_called_freely:
        jax.clear_caches()
        _has_called_freely = False


def _may_be_kept() -> bool:
    """Whether JAX might write the program to its persistent cache once it is compiled."""
    global _has_called_freely
    if _unkept.get():
        return False
    if getattr(jax.config, "jax_compilation_cache_dir") is not None:  # noqa: B009
        return True
    compilation_cache.reset_cache()  # one of before, which JAX would go on to use
    _has_called_freely = True
    return False


def _lower_for_cpu(ctx: mlir.LoweringRuleContext, *arrays: Any, **params: Any) -> Any:
    module = ctx.module_context
    is_for_lax = not is_known() or _is_partitioned(module.axis_context)
    if is_for_lax or module.lowering_parameters.for_export or _may_be_kept():
        return mlir.lower_fun(_by_lax, multiple_results=False)(ctx, *arrays, **params)
    return mlir.lower_fun(_by_onednn, multiple_results=False)(ctx, *arrays, **params)


mlir.register_lowering(_conv_p, _lower_for_cpu, platform="cpu")
mlir.register_lowering(_conv_p, mlir.lower_fun(_by_lax, multiple_results=False))
