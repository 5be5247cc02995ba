"""Residual networks (He et al. 2016, arXiv 1512.03385), for images of any size.

Version 1.5, as torchvision has it: the stride of a bottleneck lies in its 3x3 convolution. A stem for
small images, a 3x3 convolution without stride or pooling as in the usual CIFAR variant, is the
default; `small_images=False` gives the 7x7 stem of the paper.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers import BatchNorm, Conv, Linear, constrain
from jaxnets.ops import max_pool
from jaxnets.typing import Array

# The paper initialises for ReLU by the outputs of a layer (He et al. 2015, arXiv 1502.01852).
_init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

    Attributes:
        width: channels of the 3x3 convolutions.
        stride: of the first 3x3 convolution, in pixels.
        is_bottleneck: whether the block is a bottleneck, whose output has four times the width.
        dtype: of the computation.
    """

    width: int
    stride: int = 1
    is_bottleneck: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool, mask: Array | None = None) -> Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, width]` (or four times the width)."""
        if self.is_bottleneck:
            layers = ((self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1))
        else:
            layers = ((self.width, 3, self.stride), (self.width, 3, 1))
        y_BHWC = x_BHWC
        for i, (features, side, stride) in enumerate(layers, start=1):
            if i > 1:
                y_BHWC = jax.nn.relu(y_BHWC)
            y_BHWC = self._convolve(y_BHWC, features, side, stride, f"conv{i}")
            y_BHWC = BatchNorm(dtype=self.dtype, name=f"norm{i}")(y_BHWC, train=train, mask=mask)
        if x_BHWC.shape != y_BHWC.shape:
            x_BHWC = self._convolve(x_BHWC, y_BHWC.shape[3], 1, self.stride, "shortcut")
            norm = BatchNorm(dtype=self.dtype, name="shortcut_norm")
            x_BHWC = norm(x_BHWC, train=train, mask=mask)
        return constrain(jax.nn.relu(x_BHWC + y_BHWC), "batch", None, None, None)

    def _convolve(self, x_BHWC: Array, features: int, side: int, stride: int, name: str) -> Array:
        return Conv(
            features,
            (side, side),
            strides=(stride, stride),
            padding=side // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_init,
            name=name,
        )(x_BHWC)


class ResNet(nn.Module):
    """A stem, stages of residual blocks that halve the image and double the channels, and a head.

    Attributes:
        num_classes: V.
        stages: blocks in each stage.
        is_bottleneck: whether the blocks are bottlenecks.
        width: channels of the first stage.
        small_images: whether the stem is a 3x3 convolution without stride or pooling.
        dtype: of the computation; that of input and parameters by default.
    """

    num_classes: int = 10
    stages: Sequence[int] = (2, 2, 2, 2)
    is_bottleneck: bool = False
    width: int = 64
    small_images: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        image: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Classify.

        Args:
            image: `[B, H, W, C]`, floating.
            train: whether batch statistics are on.
            rows: without effect here.
            mask: boolean `[B]`, false for rows that don't count in the batch statistics.

        Returns:
            logits `[B, V]`.
        """
        del rows
        side, stride = (3, 1) if self.small_images else (7, 2)
        stem = Conv(
            self.width,
            (side, side),
            strides=(stride, stride),
            padding=side // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_init,
            name="stem",
        )
        x_BHWC = BatchNorm(dtype=self.dtype, name="stem_norm")(stem(image), train=train, mask=mask)
        x_BHWC = jax.nn.relu(x_BHWC)
        if not self.small_images:  # after ReLU a padding of zeros is as good as one of -inf
            x_BHWC = max_pool(jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))
        x_BHWC = constrain(x_BHWC, "batch", None, None, None)
        for i, num_blocks in enumerate(self.stages):
            for j in range(num_blocks):
                x_BHWC = Block(
                    width=self.width * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    is_bottleneck=self.is_bottleneck,
                    dtype=self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x_BHWC, train=train, mask=mask)
        dtype = jnp.promote_types(x_BHWC.dtype, jnp.float32)
        x_BC = x_BHWC.mean((1, 2), dtype=dtype).astype(x_BHWC.dtype)
        return Linear((self.num_classes,), dtype=self.dtype, name="head")(x_BC)


def resnet18(num_classes: int = 10, **fields) -> ResNet:
    """ResNet-18; 11,173,962 parameters for 3 channels and 10 classes."""
    return ResNet(num_classes, **{"stages": (2, 2, 2, 2), **fields})


def resnet34(num_classes: int = 10, **fields) -> ResNet:
    """ResNet-34; 21,282,122 parameters for 3 channels and 10 classes."""
    return ResNet(num_classes, **{"stages": (3, 4, 6, 3), **fields})


def resnet50(num_classes: int = 10, **fields) -> ResNet:
    """ResNet-50; 23,520,842 parameters for 3 channels and 10 classes."""
    return ResNet(num_classes, **{"stages": (3, 4, 6, 3), "is_bottleneck": True, **fields})


def resnet101(num_classes: int = 10, **fields) -> ResNet:
    """ResNet-101; 42,512,970 parameters for 3 channels and 10 classes."""
    return ResNet(num_classes, **{"stages": (3, 4, 23, 3), "is_bottleneck": True, **fields})


def resnet152(num_classes: int = 10, **fields) -> ResNet:
    """ResNet-152; 58,156,618 parameters for 3 channels and 10 classes."""
    return ResNet(num_classes, **{"stages": (3, 8, 36, 3), "is_bottleneck": True, **fields})
