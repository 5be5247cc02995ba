"""A small convolutional network with batch normalisation and dropout, in the manner of VGG.

Simonyan & Zisserman 2015 (arXiv 1409.1556) for the 3x3 convolutions in stages, Ioffe & Szegedy 2015
(arXiv 1502.03167) for the normalisation between them.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers import BatchNorm, Conv, Dropout, Linear, constrain
from jaxnets.ops import max_pool
from jaxnets.typing import Array


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, batch normalisation, ReLU and pooling; then a dense layer.

    Attributes:
        num_classes: V.
        features: channels of each stage.
        hidden: width F of the dense layer.
        dropout_rate: probability of dropping a unit before the last layer.
        dtype: of the computation; that of input and parameters by default.
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 64, 128)
    hidden: int = 128
    dropout_rate: float = 0.3
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
            image: `[B, H, W, C]`, floating; H and W at least 2 to the number of stages.
            train: whether batch statistics and dropout are on.
            rows: `[B]`, the id of each row, to which its dropout mask belongs.
            mask: boolean `[B]`, false for rows that don't count in the batch statistics.

        Returns:
            logits `[B, V]`.

        Raises:
            ValueError: if the images are so small that a layer's output would be empty.
        """
        x_BHWC = image
        for i, features in enumerate(self.features, start=1):
            conv = Conv(features, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name=f"conv{i}")
            norm = BatchNorm(dtype=self.dtype, name=f"norm{i}")
            x_BHWC = norm(conv(x_BHWC), train=train, mask=mask)
            # ReLU and maximum can change places; this way ReLU has a quarter of the work.
            x_BHWC = jax.nn.relu(max_pool(x_BHWC, (2, 2)))
            x_BHWC = constrain(x_BHWC, "batch", None, None, None)
        x_BF = x_BHWC.reshape(x_BHWC.shape[0], -1)
        x_BF = jax.nn.relu(Linear((self.hidden,), dtype=self.dtype, name="dense1")(x_BF))
        x_BF = Dropout(self.dropout_rate, name="dropout1")(x_BF, train=train, rows=rows)
        return Linear((self.num_classes,), dtype=self.dtype, name="head")(x_BF)


def convnet(num_classes: int = 10, **kwargs) -> ConvNet:
    """Three stages of 32, 64 and 128 channels; 357,034 parameters for 32x32x3 and 10 classes."""
    return ConvNet(num_classes=num_classes, **kwargs)
