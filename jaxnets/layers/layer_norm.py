"""Layer normalisation (Ba et al. 2016, arXiv 1607.06450)."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from jaxnets.typing import Array


def layer_norm(x: Array, *, epsilon: float = 1e-5) -> Array:
    """Bring the last axis to mean 0 and variance 1.

    `(x - mean) / sqrt(var + epsilon)` with the biased variance, as PyTorch computes it. The squares are
    taken around the mean: "mean of squares less square of mean" would cost float32 its last digits.

    Args:
        x: `[..., D]`.
        epsilon: added to the variance.

    Returns:
        `[..., D]`, computed in at least float32 and left so.

    Example:
        >>> [f"{y:.4f}" for y in layer_norm(jnp.array([1.0, 2.0, 3.0]))]
        ['-1.2247', '0.0000', '1.2247']
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
    """`layer_norm` with a learnt scale and bias.

    Attributes:
        epsilon: added to the variance.
        use_bias: whether a bias is learnt.
        dtype: of the output; the input's by default.
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis; x is `[..., D]`, as the result."""
        leading = tuple(range(x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        y = layer_norm(x, epsilon=self.epsilon) * jnp.expand_dims(scale, leading)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
            y = y + jnp.expand_dims(bias, leading)
        return y.astype(self.dtype or x.dtype)
