"""Batch normalisation over the global batch (Ioffe & Szegedy 2015, arXiv 1502.03167).

Sums, centred sums of squares and counts are added over the devices, rows that only fill up a batch
don't count, and the running variance is the unbiased one, as in PyTorch. `flax.linen.BatchNorm`
averages the devices' means, knows no such rows, and keeps the biased variance.
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.ops.partition import data_sum
from jaxnets.typing import Array


def batch_moments(x: Array, mask: Array | None = None) -> tuple[Array, Array, Array]:
    """Mean and biased variance of each channel over the global batch.

    The mean comes first and the squares are taken around it: the difference of two large numbers in
    "mean of squares less square of mean" would cost float32 its last digits.

    Args:
        x: `[B, ..., C]`, floating.
        mask: boolean `[B]`, false for rows that don't count.

    Returns:
        mean `[C]`, variance `[C]` and the count of elements behind them `[]`, in at least float32.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(dtype)
    per_row = math.prod(x.shape[1:-1])
    num_rows = x.shape[0] if mask is None else jnp.sum(mask, dtype=dtype)
    count = data_sum(jnp.asarray(num_rows * per_row, dtype))

    def mean_of(values: Array) -> Array:
        # Row by row first: which of them count is then asked once a row and channel, not everywhere.
        sums = jnp.sum(values, tuple(range(1, x.ndim - 1)))
        kept = sums if mask is None else jnp.where(mask[:, None], sums, 0)
        return data_sum(jnp.sum(kept, 0)) / jnp.maximum(count, 1)

    mean = mean_of(x)
    centred = x - _along_channels(mean, x)
    return mean, mean_of(centred * centred), count


def _along_channels(values: Array, x: Array) -> Array:
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


class BatchNorm(nn.Module):
    """Batch normalisation with running statistics in the collection "batch_stats".

    Attributes:
        momentum: share of the running statistics that an update keeps; 0.9 is PyTorch's 0.1.
        epsilon: added to the variance.
        use_scale: whether a scale is learnt.
        dtype: of the output; the input's by default. Statistics are in at least float32.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    use_scale: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Normalise by the batch in training, by the running statistics otherwise.

        Args:
            x: `[B, ..., C]`.
            train: whether this is training.
            mask: boolean `[B]`, false for rows that don't count.

        Returns:
            `[B, ..., C]`.
        """
        width = x.shape[-1:]
        mean_var = self.variable("batch_stats", "mean", jnp.zeros, width)
        var_var = self.variable("batch_stats", "var", jnp.ones, width)
        scale = self.param("scale", nn.initializers.ones, width) if self.use_scale else 1.0
        bias = self.param("bias", nn.initializers.zeros, width)
        if train:
            mean, var, count = batch_moments(x, mask)
            if not self.is_initializing():
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                # A micro-batch of fill-up rows alone has nothing to say.
                weight = jnp.where(count > 0, 1 - self.momentum, 0)
                for running, new in ((mean_var, mean), (var_var, unbiased)):
                    # In its own dtype: float64 images would leave float64, and a program of their own.
                    change = weight * (new - running.value)
                    running.value += change.astype(running.value.dtype)
        else:
            mean, var = mean_var.value, var_var.value
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        factor = _along_channels(scale / jnp.sqrt(var + self.epsilon), x)
        y = (x.astype(dtype) - _along_channels(mean, x)) * factor + _along_channels(bias, x)
        return y.astype(self.dtype or x.dtype)
