"""Products with a kernel, in the form that is fastest."""

import jax.numpy as jnp

from jaxnets.ops.forms import is_for_cpu
from jaxnets.typing import Array


def product(x: Array, kernel: Array) -> Array:
    """The last axis of x times the first of the kernel.

    On a CPU all other axes of x become one, and those of the kernel: with several XLA takes longer for
    the gradient, whose sums are over two axes then.

    Args:
        x: `[..., D]`.
        kernel: `[D, ...]`.

    Returns:
        `[..., ...]`: x's axes but the last, and the kernel's but the first.

    Example:
        >>> product(jnp.ones((4, 3, 2)), jnp.ones((2, 5, 6))).shape
        (4, 3, 5, 6)
    """
    if not is_for_cpu() or x.size == 0:
        return jnp.tensordot(x, kernel, axes=1)
    y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[0], -1)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def add_bias(x: Array, bias: Array) -> Array:
    """A bias added to the last axes of x, in at least float32.

    So the bias's gradient, a sum over all other axes, is one of float32: in bfloat16 such a sum stops
    growing after some hundred terms.

    Args:
        x: `[..., *F]`.
        bias: `[*F]`.

    Returns:
        `[..., *F]`, of x's dtype.

    Example:
        >>> add_bias(jnp.zeros((2, 3), jnp.bfloat16), jnp.arange(3.0))[0].tolist()
        [0.0, 1.0, 2.0]
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    bias = jnp.expand_dims(bias.astype(dtype), tuple(range(x.ndim - bias.ndim)))
    return (x.astype(dtype) + bias).astype(x.dtype)
