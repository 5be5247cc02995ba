"""Steps that are skipped: what a state remembers of them, and which they are.

A step whose loss or gradients aren't finite can be skipped instead of ending the run, and so can one
whose loss or norm of gradients jumps far above what the last steps had. Everything is decided within the
compiled step, from values that are the same on every device.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets import errors
from jaxnets.typing import Array

CHOICES = ("stop", "skip")
WINDOW = 128
"""Applied steps that mean and variance are about: all of the first so many count alike, then older ones
fade by 1 / WINDOW a step."""
WARM_UP = 32
"""Applied steps before the first that can be a spike."""
MAX_IN_A_ROW = 10
"""Skipped steps in a row. Then a spike is a new level: it is applied, and mean and variance begin anew;
a step that isn't finite stops the run."""

# A loss that doesn't change at all is no reason to skip a step for its rounding.
_ROUNDING = 1e-5
# Of a greater one the square is infinite in float32.
_LARGEST = 1e18


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """What is remembered of skipped and of applied steps.

    Attributes:
        skipped: int32 `[]`, the number of steps skipped so far.
        in_a_row: int32 `[]`, how many of them are the last ones.
        count: int32 `[]`, the applied steps that mean and variance are about, at most WINDOW.
        mean: float32 `[2]`, of the loss and of the norm of the gradients.
        variance: float32 `[2]`, of the same.
    """

    skipped: Array
    in_a_row: Array
    count: Array
    mean: Array
    variance: Array


def fresh_health() -> Health:
    """The one before the first step."""
    # Each has memory of its own: the step is given all of it.
    numbers = (jnp.zeros((), jnp.int32) for _ in range(3))
    return Health(*numbers, *(jnp.zeros(2, jnp.float32) for _ in range(2)))


def abstract_health(place: Any) -> Any:
    """Shapes and dtypes of the counters, with a sharding."""
    shapes = jax.eval_shape(fresh_health)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def uses_health(on_nonfinite: str, max_spike: float | None) -> bool:
    """Whether steps may be skipped, so that the state needs a `Health`.

    Args:
        on_nonfinite: "stop" or "skip".
        max_spike: standard deviations above the mean, above 0; None for no limit.

    Raises:
        ConfigError: if one of them can't be.
    """
    if on_nonfinite not in CHOICES:
        raise errors.unknown("way to treat a non-finite step", on_nonfinite, CHOICES)
    if max_spike is not None and not (math.isfinite(max_spike) and max_spike > 0):
        raise errors.ConfigError(
            f"max_spike is a number of standard deviations above 0, not {max_spike}; None is no limit"
        )
    return on_nonfinite == "skip" or max_spike is not None


def judge(
    health: Health,
    loss: Array,
    grad_norm: Array,
    *,
    on_nonfinite: str,
    max_spike: float | None,
) -> tuple[Array, Array, Health]:
    """Decide what becomes of a step.

    Args:
        health: before it.
        loss: `[]`, over the global batch.
        grad_norm: `[]`, of the gradients over the global batch.
        on_nonfinite: "stop" or "skip".
        max_spike: standard deviations above the mean, or None.

    Returns:
        booleans `[]`: whether the step is skipped, and whether it stops the run (then it isn't applied
        either); and the health after it.
    """
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    is_over = health.in_a_row >= MAX_IN_A_ROW
    dtype = health.mean.dtype
    seen = jnp.clip(jnp.stack([loss.astype(dtype), grad_norm.astype(dtype)]), -_LARGEST, _LARGEST)
    is_spike = jnp.zeros((), bool)
    if max_spike is not None:
        limit = health.mean + max_spike * jnp.sqrt(health.variance) + _ROUNDING * jnp.abs(health.mean)
        is_spike = is_finite & (health.count >= WARM_UP) & jnp.any(seen > limit)
    is_bad = is_spike if on_nonfinite == "stop" else is_spike | ~is_finite
    is_skipped = is_bad & ~is_over
    is_fault = ~is_finite if on_nonfinite == "stop" else ~is_finite & is_over

    mean, variance, count = health.mean, health.variance, health.count
    if max_spike is not None:
        old = jnp.where(is_spike, 0, count)  # a spike that is applied is a new beginning
        share = 1 / jnp.minimum(old + 1, WINDOW).astype(dtype)
        difference = seen - mean
        is_counted = ~is_skipped & ~is_fault
        mean = jnp.where(is_counted, mean + share * difference, mean)
        spread = (1 - share) * (variance + share * difference**2)
        variance = jnp.where(is_counted, spread, variance)
        count = jnp.where(is_counted, jnp.minimum(old + 1, WINDOW), count).astype(jnp.int32)
    one = is_skipped.astype(jnp.int32)
    in_a_row = jnp.where(is_skipped, health.in_a_row + 1, 0).astype(jnp.int32)
    return is_skipped, is_fault, Health(health.skipped + one, in_a_row, count, mean, variance)
