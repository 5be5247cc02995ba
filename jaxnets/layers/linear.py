"""A linear map of the last axes."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.ops.product import add_bias, product
from jaxnets.typing import Array


class Linear(nn.Module):
    """A product with a learnt kernel, and a learnt bias.

    Attributes:
        features: sizes of the output's axes in place of the input's last ones, such as (F,), or (N, K)
            of N heads.
        num_inputs: how many of the input's axes are summed over, the last ones.
        use_bias: whether a bias is learnt.
        dtype: of the computation; that of input and parameters by default.
        kernel_init: of the kernel, whose axes are those of the input, then those of the output.

    Example:
        >>> import jax
        >>> layer = Linear((2, 5))
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
        (1, 3, 2, 5)
    """

    features: tuple[int, ...]
    num_inputs: int = 1
    use_bias: bool = True
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map x, `[..., *inputs]` to `[..., *features]`."""
        rest, inputs = x.shape[: -self.num_inputs], x.shape[-self.num_inputs :]
        size = math.prod(inputs)
        kernel = self.param("kernel", self.kernel_init, (*inputs, *self.features), jnp.float32)
        dtype = self.dtype or jnp.result_type(x, kernel)
        y = product(
            x.astype(dtype).reshape(*rest, size), kernel.astype(dtype).reshape(size, *self.features)
        )
        if self.use_bias:
            # One axis, for what tells biases from matrices by their ranks, as decay masks do.
            bias = self.param("bias", nn.initializers.zeros, (math.prod(self.features),), jnp.float32)
            y = add_bias(y, bias.reshape(self.features))
        return y
