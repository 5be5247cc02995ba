import numpy as np
import pytest

from jaxnets.interop.distance import MOST_ALLOWED, allowed, distances, only_rounding


def test_the_largest_difference_over_the_largest_magnitude():
    expected = {"a": np.array([1.0, -4.0]), "b": np.array([2.0])}
    found = {"a": np.array([1.5, -4.0]), "b": np.array([2.0])}
    assert distances(found, expected) == {"a": 0.125, "b": 0.0}
    assert np.isnan(distances({"a": np.array([np.nan])}, {"a": np.array([1.0])})["a"])
    assert distances({}, {}) == {}


@pytest.mark.parametrize("exact", [np.float32, np.float64])
def test_a_tensor_that_is_only_rounding_has_no_magnitude(exact):
    """In the rougher dtype of the two: float64 knows of 1e-17 what float32 can't."""
    large = np.array([1.0])
    expected = {"kernel": large.astype(exact), "bias": np.array([1e-17], exact)}
    near = {"kernel": large.astype(np.float32), "bias": np.array([1e-7], np.float32)}
    assert distances(near, expected) == {"kernel": 0.0, "bias": 0.0}
    far = near | {"bias": np.array([1e-3], np.float32)}
    assert distances(far, expected)["bias"] == np.inf


def test_what_is_only_rounding():
    tensors = {"kernel": 1.0, "bias": 1e-17, "small": 1e-12, "zero": 0.0}
    assert only_rounding({name: np.array([x]) for name, x in tensors.items()}) == {"bias"}
    in_float32 = {name: np.array([x], np.float32) for name, x in tensors.items()}
    assert only_rounding(in_float32) == {"bias", "small"}
    assert only_rounding({}) == set()


def test_what_is_allowed():
    assert allowed(1e-5, []) == 1e-5
    assert allowed(1e-5, [1e-8, 1e-4]) == pytest.approx(1e-3)
    for rounding in (0.1, np.inf):
        assert allowed(1e-5, [rounding]) == MOST_ALLOWED < 1
