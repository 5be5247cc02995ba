"""Muon (Jordan et al. 2024): a kernel's step is made nearly orthogonal; all directions count alike.

A kernel is taken as the matrix of all its inputs by all its outputs: that of a convolution
`[H, W, I, O]` as `[H * W * I, O]`; of queries, keys and values `[D, N, K]` as `[D, N * K]`, and what is
behind the heads `[N, K, D]` as `[N * K, D]`. PyTorch's matrices are the transposed ones, which makes no
difference.
"""

import math
import re
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets.train import optim
from jaxnets.train.mesh import path_of
from jaxnets.typing import Array, Params, PyTree

# Of the odd polynomial of degree 5 that takes all singular values of a step to about 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# For SGD, against the rate of Muon: what the speed records on CIFAR-10 have come to, for the gradients
# of a mean over 500 examples and a head of unit scale.
_MATRIX_RATE, _BIAS_RATE = 5.5, 110.0
_SGD_MOMENTUM = 0.85
# Kernels `[D, N, K]`, as Flax calls them too; of all others the last axis alone is the output.
_INTO_HEADS = re.compile(r"(^|/)(query|key|value)/kernel$")


def muon(
    learning_rate: optim.Rate,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for kernels and tables, taken as matrices, and Adam for the rest.

    Args:
        learning_rate: finite, at least 0; or a function of the step.
        momentum: decay of Muon's momentum and of Adam's first moment, in [0, 1).
        weight_decay: share of the parameters, times the learning rate, that a step takes off.
        decay_mask: `decay_mask(params)` says which of them decay; all by default.
    """
    optim.check_numbers(learning_rate, weight_decay, momentum=momentum)

    def axes(params: Params) -> PyTree:
        def of(path: tuple[Any, ...], leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
            if not optim.is_matrix(path, leaf):
                return None
            inputs = _num_inputs(path, leaf)
            return optax.contrib.MuonDimensionNumbers(
                reduction_axis=tuple(range(inputs)), output_axis=tuple(range(inputs, leaf.ndim))
            )

        return jax.tree_util.tree_map_with_path(of, params)

    direction = optax.contrib.muon(
        1.0, beta=momentum, adam_b1=momentum, muon_weight_dimension_numbers=axes
    )
    # Optax's own weight decay of Muon has no mask for what Adam changes.
    decay = optax.add_decayed_weights(-weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
    return optax.chain(direction, decay, rate) if weight_decay else optax.chain(direction, rate)


def muon_sgd(
    learning_rate: optim.Rate,
    *,
    momentum: float = 0.6,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Muon for the kernels of convolutions, whose norms it keeps, and SGD for the rest.

    For networks with a normalisation behind each convolution, over which a kernel's norm is without
    effect: kept, it makes the learning rate the angle by which a kernel turns. SGD has Nesterov's
    momentum of 0.85, and higher rates: 5.5 times that of Muon for matrices, 110 times for biases.
    After the speed records on CIFAR-10 (Jordan 2024, github.com/KellerJordan/cifar10-airbench).

    Args:
        learning_rate: of Muon; finite, at least 0; or a function of the step.
        momentum: decay of Muon's momentum, in [0, 1).
        weight_decay: share of the parameters, times the learning rate, that a step takes off.
        decay_mask: `decay_mask(params)` says which of them decay; all by default.
    """
    optim.check_numbers(learning_rate, weight_decay, momentum=momentum)

    def sgd(rate: float) -> optax.GradientTransformation:
        return optax.chain(optax.trace(_SGD_MOMENTUM, nesterov=True), optax.scale(rate))

    directions: dict[Hashable, optax.GradientTransformation] = {
        "kernel": optax.chain(optax.trace(momentum, nesterov=True), _orthogonalized()),
        "matrix": sgd(_MATRIX_RATE),
        "bias": sgd(_BIAS_RATE),
    }

    def kind(params: Params) -> PyTree:
        def of(path: tuple[Any, ...], param: Array) -> str:
            if not optim.is_matrix(path, param):
                return "bias"
            return "kernel" if param.ndim > 2 else "matrix"

        return jax.tree_util.tree_map_with_path(of, params)

    decay = optax.add_decayed_weights(weight_decay, decay_mask) if weight_decay else optax.identity()
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optax.partition(directions, kind), decay, rate, _norms_kept())


def orthogonalize(matrix: Array, num_iterations: int = 3) -> Array:
    """Take all singular values of a matrix near 1, by iterations of Newton and Schulz.

    Args:
        matrix: `[M, N]`.
        num_iterations: three take singular values from a hundredth of the Frobenius norm on to 0.40 to
            1.21; five, to 0.68 to 1.14.

    Returns:
        `[M, N]`, with the same singular vectors.
    """
    a, b, c = _COEFFICIENTS
    x = matrix / (jnp.linalg.norm(matrix) + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    for _ in range(num_iterations):  # the smaller of the two squares
        if is_tall:
            square = x.T @ x
            x = a * x + x @ (b * square + c * square @ square)
        else:
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
    return x


def _num_inputs(path: tuple[Any, ...], kernel: Array) -> int:
    """How many of a kernel's axes, the first ones, are inputs."""
    return 1 if kernel.ndim == 3 and _INTO_HEADS.search(path_of(path)) else kernel.ndim - 1


def _orthogonalized() -> optax.GradientTransformation:
    """Updates of kernels, as matrices of all inputs by all outputs."""

    def one(path: tuple[Any, ...], update: Array) -> Array:
        num_outputs = math.prod(update.shape[_num_inputs(path, update) :])
        return orthogonalize(update.reshape(-1, num_outputs)).reshape(update.shape)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates))


def _norms_kept() -> optax.GradientTransformation:
    """Bring each kernel of a convolution to norm sqrt(outputs), and go from there."""

    def one(path: tuple[Any, ...], update: Array, param: Array) -> Array:
        if param.ndim <= 2:
            return update
        num_outputs = math.prod(param.shape[_num_inputs(path, param) :])
        norm = jnp.maximum(jnp.linalg.norm(param), 1e-12)
        return update + param * (num_outputs**0.5 / norm - 1)

    def update(updates: PyTree, params: Params | None) -> PyTree:
        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.stateless(update)
