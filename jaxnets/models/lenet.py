"""LeNet-5 as tutorials teach it, for images of any size and number of channels.

LeCun et al. 1998, "Gradient-based learning applied to document recognition", with ReLU, maximum
pooling and full connections between the feature maps instead of the paper's tanh, subsampling and
partial connections.
"""

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers import Conv, Linear, constrain
from jaxnets.ops import max_pool
from jaxnets.typing import Array


class LeNet(nn.Module):
    """Two 5x5 convolutions with pooling, then three dense layers.

    Attributes:
        num_classes: V.
        dtype: of the computation; that of input and parameters by default.
    """

    num_classes: int = 10
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
            image: `[B, H, W, C]`, floating; H and W at least 16.
            train: without effect here.
            rows: without effect here.
            mask: without effect here.

        Returns:
            logits `[B, V]`.

        Raises:
            ValueError: if the images are so small that a layer's output would be empty.
        """
        del train, rows, mask
        x_BHWC = image
        for i, features in enumerate((6, 16), start=1):
            x_BHWC = Conv(features, (5, 5), dtype=self.dtype, name=f"conv{i}")(x_BHWC)
            # ReLU and maximum can change places; this way ReLU has a quarter of the work.
            x_BHWC = jax.nn.relu(max_pool(x_BHWC, (2, 2)))
            x_BHWC = constrain(x_BHWC, "batch", None, None, None)
        x_BF = x_BHWC.reshape(x_BHWC.shape[0], -1)
        for i, features in enumerate((120, 84), start=1):
            x_BF = jax.nn.relu(Linear((features,), dtype=self.dtype, name=f"dense{i}")(x_BF))
        return Linear((self.num_classes,), dtype=self.dtype, name="head")(x_BF)


def lenet(num_classes: int = 10, **kwargs) -> LeNet:
    """LeNet; 62,006 parameters for 32x32x3 images and 10 classes."""
    return LeNet(num_classes=num_classes, **kwargs)
