"""Optimizers by name, each with the conventions of PyTorch's of the same name."""

import math

import optax

from jaxnets import errors


def sgd(
    learning_rate: float, *, momentum: float = 0.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Stochastic gradient descent; weight decay is added to the gradient before the momentum.

    Args:
        learning_rate: finite, at least 0.
        momentum: share of the velocity that is kept, in [0, 1).
        weight_decay: factor of the parameters, at least 0.
    """
    _check(learning_rate, weight_decay, momentum=momentum)
    descent = optax.sgd(learning_rate, momentum=momentum or None)
    return optax.chain(optax.add_decayed_weights(weight_decay), descent) if weight_decay else descent


def adam(
    learning_rate: float, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980); weight decay is added to the gradient.

    Args:
        learning_rate: finite, at least 0.
        momentum: decay of the first moment, in [0, 1).
        weight_decay: factor of the parameters, at least 0.
    """
    _check(learning_rate, weight_decay, momentum=momentum)
    descent = optax.adam(learning_rate, b1=momentum)
    return optax.chain(optax.add_decayed_weights(weight_decay), descent) if weight_decay else descent


def adamw(
    learning_rate: float, *, momentum: float = 0.9, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Args:
        learning_rate: finite, at least 0.
        momentum: decay of the first moment, in [0, 1).
        weight_decay: share of the parameters, times the learning rate, that a step takes off.
    """
    _check(learning_rate, weight_decay, momentum=momentum)
    return optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay)


def _check(learning_rate: float, weight_decay: float, *, momentum: float) -> None:
    for name, value in (("learning rate", learning_rate), ("weight decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise errors.ConfigError(f"the {name} must be a finite number of at least 0, not {value}")
    if not 0 <= momentum < 1:
        raise errors.ConfigError(f"the momentum must lie in [0, 1), not {momentum}")
