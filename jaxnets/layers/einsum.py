"""A linear map of named axes."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.typing import Array


class Einsum(nn.Module):
    """`einsum` of the input with a learnt kernel, and a learnt bias.

    Attributes:
        equation: with the kernel second, such as "BTD,DNK->BTNK".
        kernel_shape: sizes of the kernel's axes.
        bias_shape: sizes of the output's last axes, over which the bias differs; none without a bias.
        dtype: of the computation; that of input and parameters by default.
        kernel_init: of the kernel.
    """

    equation: str
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...] = ()
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map x, whose axes are the first of the equation."""
        kernel = self.param("kernel", self.kernel_init, self.kernel_shape, jnp.float32)
        dtype = self.dtype or jnp.result_type(x, kernel)
        y = jnp.einsum(self.equation, x.astype(dtype), kernel.astype(dtype))
        if self.bias_shape:
            # One axis, for what tells biases from matrices by their ranks, as decay masks do.
            size = math.prod(self.bias_shape)
            bias = self.param("bias", nn.initializers.zeros, (size,), jnp.float32)
            bias = bias.astype(dtype).reshape(self.bias_shape)
            y = y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))
        return y
