"""Optimizers for tables that are updated by rows, as PyTorch has them for sparse gradients.

What each does to a row depends on that row, its gradient and the number of the step alone, so it may be
given the rows of a batch for a table (`jaxnets.train.row_updates`). Given whole tables they do the same
to all rows, used or not. Weight decay, too, is of the rows that are used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnets.train.optim import Rate, check_numbers
from jaxnets.typing import Array, Params, PyTree


def sgd(
    learning_rate: Rate,
    *,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent without momentum: by rows it is the same as of the whole table.

    Args:
        learning_rate: finite, at least 0; or a function of the step.
        weight_decay: factor of the parameters that is added to the gradient, at least 0.
        decay_mask: `decay_mask(params)` says which of them decay; all by default.
    """
    check_numbers(learning_rate, weight_decay, momentum=0.0)
    return _chained(optax.identity(), learning_rate, weight_decay, decay_mask)


def adagrad(
    learning_rate: Rate,
    *,
    epsilon: float = 1e-10,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Adagrad (Duchi et al. 2011) as PyTorch's: by rows it is the same as of the whole table.

    `s += g**2; p -= learning_rate * g / (sqrt(s) + epsilon)`, with s = 0 at the start. (Optax begins
    with 0.1 and has the epsilon below the root.)

    Args:
        learning_rate: as of `sgd`.
        epsilon: above 0.
        weight_decay: as of `sgd`.
        decay_mask: as of `sgd`.
    """
    check_numbers(learning_rate, weight_decay, momentum=0.0)

    def update(updates: PyTree, state: PyTree, params: Params | None = None):
        del params
        sums = jax.tree.map(lambda s, g: s + g * g, state, updates)
        return jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + epsilon), sums, updates), sums

    scale = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return _chained(scale, learning_rate, weight_decay, decay_mask)


class LazyAdamState(NamedTuple):
    """The number of steps, and the moments `[V, ...]` of each table."""

    count: Array
    mu: PyTree
    nu: PyTree


def lazy_adam(
    learning_rate: Rate,
    *,
    momentum: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Adam that leaves a row and its moments alone where it isn't used: PyTorch's SparseAdam.

    It isn't Adam (Kingma & Ba 2015): there the moments of every row decay at every step, and every row
    goes on moving by them. Here neither happens, while the correction of the moments' bias counts the
    steps of the run, as in PyTorch: it is too little for a row that is used for the first time late,
    whose first update is up to `(1 - momentum) / sqrt(1 - b2)`, 3.2 times as long as Adam's first.

    Args:
        learning_rate: as of `sgd`.
        momentum: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the second moment before its bias is corrected.
        weight_decay: as of `sgd`.
        decay_mask: as of `sgd`.
    """
    check_numbers(learning_rate, weight_decay, momentum=momentum)

    def init(params: Params) -> LazyAdamState:
        zeros = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return LazyAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(updates: PyTree, state: Any, params: Params | None = None):
        del params
        count: Any = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: m + (1 - momentum) * (g - m), state.mu, updates)
        nu = jax.tree.map(lambda v, g: v + (1 - b2) * (g * g - v), state.nu, updates)

        def scaled(m: Array, v: Array) -> Array:
            t = count.astype(m.dtype)
            factor = jnp.sqrt(_corrected(b2, t)) / _corrected(momentum, t)
            return factor * m / (jnp.sqrt(v) + epsilon)

        return jax.tree.map(scaled, mu, nu), LazyAdamState(count, mu, nu)

    scale: Any = optax.GradientTransformation(init, update)
    return _chained(scale, learning_rate, weight_decay, decay_mask)


def _corrected(decay: float, t: Array) -> Array:
    """`1 - decay**t`, without the cancellation of small t."""
    return -jnp.expm1(t * jnp.log(jnp.asarray(decay, t.dtype))) if decay else jnp.ones_like(t)


def _chained(
    scale: optax.GradientTransformation,
    learning_rate: Rate,
    weight_decay: float,
    decay_mask: Callable[[Params], PyTree] | None,
) -> optax.GradientTransformation:
    descent = optax.chain(scale, optax.scale_by_learning_rate(learning_rate))
    if not weight_decay:
        return descent
    return optax.chain(optax.add_decayed_weights(weight_decay, decay_mask), descent)
