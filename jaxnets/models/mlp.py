"""A multilayer perceptron over the flattened image, with dropout."""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers import Dropout, Linear, constrain
from jaxnets.typing import Array


class MLP(nn.Module):
    """Dense layers with ReLU and dropout.

    Attributes:
        num_classes: V.
        hidden: widths F of the hidden layers.
        dropout_rate: probability of dropping a hidden unit.
        dtype: of the computation; that of input and parameters by default.
    """

    num_classes: int = 10
    hidden: Sequence[int] = (256, 128)
    dropout_rate: float = 0.1
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
            image: `[B, ...]`, floating.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout mask belongs.
            mask: without effect here.

        Returns:
            logits `[B, V]`.
        """
        del mask
        x_BF = image.reshape(image.shape[0], -1)
        for i, features in enumerate(self.hidden, start=1):
            x_BF = jax.nn.relu(Linear((features,), dtype=self.dtype, name=f"dense{i}")(x_BF))
            x_BF = constrain(x_BF, "batch", None)
            x_BF = Dropout(self.dropout_rate, name=f"dropout{i}")(x_BF, train=train, rows=rows)
        return Linear((self.num_classes,), dtype=self.dtype, name="head")(x_BF)


def mlp(num_classes: int = 10, **kwargs) -> MLP:
    """Two hidden layers of 256 and 128 units."""
    return MLP(num_classes=num_classes, **kwargs)
