"""How far apart two sets of tensors are, and how far they may be."""

from collections.abc import Iterable, Mapping

import numpy as np

# How many times the reference's own rounding, its distance from its result in float64, another may
# differ from it in float32. Two sides that round equally differ by 1 to 2 times; 2.4 was seen, in the
# tail of Adam's errors.
ROUNDING_FACTOR = 10.0
# Never more than this, however badly the reference rounds: a gradient that is missing is off by 1.
MOST_ALLOWED = 0.3


def distances(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For every tensor the largest difference over the largest magnitude of `expected`'s.

    A tensor that is zero, or nothing but rounding (smaller than 16 units in the last place of the
    largest tensor, in the rougher dtype of the two), has no magnitude of its own: it is off by 0 if the
    difference is as small, and by infinity otherwise.

    Args:
        found: tensors by name.
        expected: the same names and shapes.

    Returns:
        the distances; NaN where something isn't finite.
    """
    result = {}
    for name, x in expected.items():
        rounding = _rounding(expected, max((x, found[name]), key=lambda x: np.finfo(x.dtype).eps))
        difference = peak(found[name].astype(np.float64) - x.astype(np.float64))
        if peak(x) <= rounding:
            result[name] = 0.0 if difference <= rounding else np.inf
        else:
            result[name] = difference / peak(x)
    return result


def only_rounding(tensors: Mapping[str, np.ndarray]) -> set[str]:
    """The names of those that aren't zero, but nothing but rounding, as `distances` has it."""
    return {name for name, x in tensors.items() if 0 < peak(x) <= _rounding(tensors, x)}


def _rounding(tensors: Mapping[str, np.ndarray], rougher: np.ndarray) -> float:
    """16 units in the last place of the largest, in the dtype of `rougher`."""
    return 16 * float(np.finfo(rougher.dtype).eps) * max(map(peak, tensors.values()))


def allowed(bound: float, rounding: Iterable[float]) -> float:
    """How far a result may be off.

    Args:
        bound: at least this.
        rounding: how far the reference's own tensors are off from exact ones.

    Returns:
        the bound, or a multiple of the worst rounding where that is more, up to `MOST_ALLOWED`.
    """
    worst = max(rounding, default=0.0)
    return max(bound, min(ROUNDING_FACTOR * worst, MOST_ALLOWED))


def peak(x: np.ndarray) -> float:
    """The largest magnitude; 0 of nothing."""
    return float(np.max(np.abs(x))) if x.size else 0.0
