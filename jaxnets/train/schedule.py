"""Learning rates over the steps of a run, by name."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnets import errors
from jaxnets.typing import Array

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(
    name: str, peak: float, num_steps: int, *, warmup: float = 0.0, end: float = 0.0
) -> Callable[[Array | int], Any]:
    """A learning rate that rises to its peak in a straight line and then falls.

    The rate depends on the step's number alone, so a run that is resumed goes on with it exactly.

    Args:
        name: "constant", "linear" or "cosine", from the peak on.
        peak: the highest rate, finite, at least 0.
        num_steps: T, steps of the run.
        warmup: share of the run for the rise from 0, in [0, 1).
        end: share of the peak that is left after the last step, in [0, 1].

    Returns:
        `schedule(step) -> rate`; at step 0 of a warm-up the rate is 0, at the peak's step the peak.

    Raises:
        ConfigError: if the name is unknown or a number out of range.

    Example:
        >>> rate = make_schedule("linear", 1.0, 10, warmup=0.2)
        >>> [round(float(rate(t)), 3) for t in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if name not in SCHEDULES:
        raise errors.unknown("schedule", name, SCHEDULES)
    if not (math.isfinite(peak) and peak >= 0):
        raise errors.ConfigError(f"the learning rate must be a finite number of at least 0, not {peak}")
    if num_steps < 1:
        raise errors.ConfigError(f"a schedule needs at least 1 step, not {num_steps}")
    if not 0 <= warmup < 1:
        raise errors.ConfigError(f"warmup is the share of the run in [0, 1), not {warmup}")
    if not 0 <= end <= 1:
        raise errors.ConfigError(f"end is a share of the peak in [0, 1], not {end}")
    rise = warmup * num_steps

    def schedule(step: Array | int) -> Array:
        # Of a number, for the record, in float64; of an array, in the step, in float32.
        xp, t = (jnp, step.astype(jnp.float32)) if isinstance(step, Array) else (np, np.float64(step))
        done = xp.clip((t - rise) / max(num_steps - rise, 1e-9), 0, 1)
        if name == "constant":
            left = xp.ones_like(done)
        else:
            left = 1 - done if name == "linear" else 0.5 * (1 + xp.cos(xp.pi * done))
            left = end + (1 - end) * left
        return peak * (xp.minimum(t / rise, left) if rise else left)

    return schedule
