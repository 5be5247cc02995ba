"""Two-dimensional convolution."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from jaxnets.ops.convolution import convolve, reach_of
from jaxnets.ops.product import add_bias
from jaxnets.typing import Array

Padding = str | int | tuple[tuple[int, int], tuple[int, int]]


def conv2d(
    x: Array,
    kernel: Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "VALID",
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Array:
    """Cross-correlation of images with a kernel, as deep learning calls a convolution.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[height, width, C / groups, features]`.
        strides: steps between outputs, in pixels.
        padding: "VALID", "SAME", the pixels on every side (as PyTorch's `padding=1`), or
            `((top, bottom), (left, right))`.
        dilation: steps between the kernel's places, in pixels.
        groups: into how many parts channels and features are cut, each part of the features seeing its
            part of the channels; C of them make a depthwise convolution.

    Returns:
        `[B, H', W', features]`.

    Raises:
        ValueError: if the ranks or channels don't fit, the padding is unknown or negative, steps or
            groups are below 1, or the output would be empty.
    """
    if min(*strides, *dilation, groups) < 1:
        raise ValueError(
            f"strides, dilation and groups are at least 1, not {strides}, {dilation} and {groups}"
        )
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2] * groups:
        channels = "C" if groups == 1 else f"C / {groups}"
        raise ValueError(
            f"conv2d takes [B, H, W, C] and [height, width, {channels}, features], "
            f"not {x.shape} and {kernel.shape}"
        )
    if kernel.shape[3] % groups:
        raise ValueError(f"{kernel.shape[3]} features don't split into {groups} groups")
    reach = reach_of(kernel.shape[:2], dilation)
    if isinstance(padding, str):
        if padding not in ("VALID", "SAME"):
            raise ValueError(f"padding is 'VALID', 'SAME' or pixels, not {padding!r}")
        pads = lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
    else:
        pads = [(padding, padding)] * 2 if isinstance(padding, int) else list(padding)
    if any(pad < 0 for pair in pads for pad in pair):
        raise ValueError(f"padding is at least 0, not {padding}")
    padded = [n + low + high for n, (low, high) in zip(x.shape[1:3], pads, strict=True)]
    if any(n < k for n, k in zip(padded, reach, strict=True)):
        raise ValueError(
            f"a {tuple(reach)} kernel leaves nothing of an image of shape {tuple(x.shape[1:3])}"
        )
    return convolve(x, kernel, strides, pads, dilation=dilation, groups=groups)


class Conv(nn.Module):
    """`conv2d` with a learnt kernel and bias.

    Attributes:
        features: channels of the output.
        kernel_size: height and width of the kernel, in pixels.
        strides: steps between outputs, in pixels.
        padding: as in `conv2d`.
        dilation: steps between the kernel's places, in pixels.
        groups: of channels, as in `conv2d`.
        use_bias: whether a bias is added.
        dtype: of the computation; that of input and parameters by default.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "VALID"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    use_bias: bool = True
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolve; x is `[B, H, W, C]`, the result `[B, H', W', features]`."""
        if self.groups < 1 or x.shape[-1] % self.groups:
            raise ValueError(f"{x.shape[-1]} channels don't split into {self.groups} groups")
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        dtype = self.dtype or jnp.result_type(x, kernel)
        y = conv2d(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = add_bias(y, bias)
        return y
