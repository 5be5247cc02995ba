"""Optimizers by name, and what wraps them: decay masks, clipping, freezing.

`sgd`, `adam` and `adamw` keep to the conventions of PyTorch's of the same name; the others are Optax's
own. All take the same arguments, so that an experiment can choose one by name.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets import errors
from jaxnets.train.mesh import path_of
from jaxnets.typing import Array, Params, PyTree

_IS_BIAS = re.compile(r"(^|/)bias$")

Rate = float | Callable[..., Any]


def sgd(
    learning_rate: Rate,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent; weight decay is added to the gradient before the momentum.

    Args:
        learning_rate: finite, at least 0; or a function of the step.
        momentum: share of the velocity that is kept, in [0, 1).
        weight_decay: factor of the parameters, at least 0.
        decay_mask: `decay_mask(params)` says which of them decay; all by default.
    """
    check_numbers(learning_rate, weight_decay, momentum=momentum)
    descent = optax.sgd(learning_rate, momentum=momentum or None)
    return _decayed(descent, weight_decay, decay_mask)


def adam(
    learning_rate: Rate,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980); weight decay is added to the gradient.

    Args:
        learning_rate: finite, at least 0; or a function of the step.
        momentum: decay of the first moment, in [0, 1).
        weight_decay: factor of the parameters, at least 0.
        decay_mask: `decay_mask(params)` says which of them decay; all by default.
    """
    check_numbers(learning_rate, weight_decay, momentum=momentum)
    return _decayed(optax.adam(learning_rate, b1=momentum), weight_decay, decay_mask)


def adamw(
    learning_rate: Rate,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.01,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Args:
        learning_rate: finite, at least 0; or a function of the step.
        momentum: decay of the first moment, in [0, 1).
        weight_decay: share of the parameters, times the learning rate, that a step takes off.
        decay_mask: `decay_mask(params)` says which of them decay; all by default.
    """
    check_numbers(learning_rate, weight_decay, momentum=momentum)
    return optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask)


def _decoupled(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """An optimizer of Optax with `b1`, `weight_decay` and `mask`, taking the arguments of `adamw`."""

    def optimizer(
        learning_rate: Rate,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay_mask: Callable[[Params], PyTree] | None = None,
    ) -> optax.GradientTransformation:
        check_numbers(learning_rate, weight_decay, momentum=momentum)
        return make(learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask)

    return optimizer


nadamw = _decoupled(optax.nadamw)
"""AdamW with Nesterov's momentum (Dozat 2016); arguments as in `adamw`."""

lamb = _decoupled(optax.lamb)
"""LAMB (You et al. 2020, arXiv 1904.00962); arguments as in `adamw`."""

lion = _decoupled(optax.lion)
"""Lion (Chen et al. 2023, arXiv 2302.06675); arguments as in `adamw`."""


def rmsprop(
    learning_rate: Rate,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """RMSProp (Hinton 2012); arguments as in `sgd`."""
    check_numbers(learning_rate, weight_decay, momentum=momentum)
    return _decayed(optax.rmsprop(learning_rate, momentum=momentum or None), weight_decay, decay_mask)


def adagrad(
    learning_rate: Rate,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Adagrad (Duchi et al. 2011), which has no momentum; other arguments as in `sgd`."""
    check_numbers(learning_rate, weight_decay, momentum=momentum)
    return _decayed(optax.adagrad(learning_rate), weight_decay, decay_mask)


def matrices_only(params: Params) -> PyTree:
    """A decay mask that spares biases and the scales and biases of normalisations."""
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def is_matrix(path: tuple[Any, ...], param: Array) -> bool:
    """Whether a parameter is a kernel or a table, and no vector; heads' biases `[N, K]` are vectors."""
    return param.ndim > 1 and not _IS_BIAS.search(path_of(path))


def clipped(tx: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """Scale the gradients down to a global norm where they exceed it.

    Args:
        tx: what takes them then.
        norm: finite, above 0.

    Raises:
        ConfigError: if the norm is out of range.
    """
    if not (math.isfinite(norm) and norm > 0):
        raise errors.ConfigError(f"gradients are clipped to a finite norm above 0, not {norm}")
    return optax.chain(optax.clip_by_global_norm(norm), tx)


def frozen(tx: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
    """Leave parameters as they are, bit for bit; the optimizer keeps nothing for them.

    Statistics that a model keeps itself, as batch normalisation does, go on changing.

    Args:
        tx: what changes the others.
        patterns: regular expressions, each searched for in paths such as "conv1/kernel".

    Raises:
        ConfigError: when the state is made, if a pattern is found in no path, or nothing is left to
            learn.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise errors.ConfigError(f"{pattern!r} is no regular expression: {error}") from None

    def label(params: Params) -> PyTree:
        paths = jax.tree_util.tree_map_with_path(lambda path, _: path_of(path), params)
        names = jax.tree.leaves(paths)
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise errors.ConfigError(
                    f"nothing to freeze: {pattern!r} is in none of {', '.join(names)}"
                )

        def is_frozen(name: str) -> bool:
            return any(re.search(pattern, name) for pattern in patterns)

        if all(is_frozen(name) for name in names):
            raise errors.ConfigError(f"{', '.join(patterns)} freezes every parameter")
        return jax.tree.map(lambda name: "frozen" if is_frozen(name) else "learnt", paths)

    return optax.partition({"learnt": tx, "frozen": _keep()}, label)


def _keep() -> optax.GradientTransformation:
    """Updates of -0, which added to any number, -0 too, leave its bits."""

    def update(updates: PyTree, state: optax.OptState, params: Params | None = None, **_: Any):
        del params
        return jax.tree.map(lambda x: jnp.full_like(x, -0.0), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decayed(
    descent: optax.GradientTransformation,
    weight_decay: float,
    decay_mask: Callable[[Params], PyTree] | None,
) -> optax.GradientTransformation:
    if not weight_decay:
        return descent
    return optax.chain(optax.add_decayed_weights(weight_decay, decay_mask), descent)


def check_numbers(learning_rate: Rate, weight_decay: float, *, momentum: float) -> None:
    """Refuse what no optimizer takes.

    Raises:
        ConfigError: if a number is out of range.
    """
    for name, value in (("learning rate", learning_rate), ("weight decay", weight_decay)):
        if not callable(value) and not (math.isfinite(value) and value >= 0):
            raise errors.ConfigError(f"the {name} must be a finite number of at least 0, not {value}")
    if not 0 <= momentum < 1:
        raise errors.ConfigError(f"the momentum must lie in [0, 1), not {momentum}")
