import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import ops
from jaxnets.metrics import Mean, is_correct

VALUES = st.lists(st.integers(-1000, 1000), min_size=12, max_size=12)
MASK = st.lists(st.booleans(), min_size=12, max_size=12)
sum_up = jax.jit(Mean.of)


def test_of_a_few_numbers():
    mean = Mean.of(jnp.array([1.0, 2.0, 6.0]))
    assert float(mean.total) == 9
    assert int(mean.count) == 3
    assert float(mean.compute()) == 3


@settings(max_examples=25, deadline=None)
@given(values=VALUES, mask=MASK, split=st.integers(0, 12))
def test_parts_merge_to_the_mean_of_all(values, mask, split):
    values, mask = np.array(values, np.float32), np.array(mask)
    place = np.arange(12) < split
    parts = [sum_up(jnp.asarray(values), jnp.asarray(mask & part)) for part in (place, ~place)]
    merged = jax.tree.map(jnp.add, *parts)
    expected = values[mask].mean() if mask.any() else 0
    np.testing.assert_allclose(float(merged.compute()), expected, rtol=1e-6, atol=1e-6)
    assert int(merged.count) == mask.sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_masked_values_do_not_enter(bad):
    mean = Mean.of(jnp.array([1.0, bad, 3.0, bad]), jnp.array([True, False, True, False]))
    assert float(mean.compute()) == 2
    grad = jax.grad(lambda x: Mean.of(x, jnp.array([True, False])).total)(jnp.array([1.0, bad]))
    assert grad.tolist() == [1, 0]


def test_a_nan_that_counts_shows():
    assert np.isnan(Mean.of(jnp.array([1.0, jnp.nan])).compute())


def test_nothing_counted_is_zero():
    for mean in (Mean.of(jnp.ones(3), jnp.zeros(3, bool)), Mean.of(jnp.zeros((0, 4)))):
        assert int(mean.count) == 0
        assert float(mean.compute()) == 0


def test_a_mask_of_the_leading_axes_covers_the_others():
    values = jnp.arange(24.0).reshape(2, 3, 4)
    rows = Mean.of(values, jnp.array([False, True]))
    assert (float(rows.compute()), int(rows.count)) == (17.5, 12)
    mask = np.random.default_rng(0).random((2, 3)) < 0.5
    np.testing.assert_allclose(
        Mean.of(values, jnp.asarray(mask)).compute(), np.asarray(values)[mask].mean(), rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4), (2, 1), (2, 3, 1)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises((AssertionError, ValueError)):
        Mean.of(jnp.ones((2, 3)), jnp.ones(shape, bool))


@pytest.mark.parametrize("mask", [[0, 1, 1], [0.0, 1.0, 1.0]])
def test_a_mask_of_numbers_counts_as_one_of_truth_values(mask):
    mean = Mean.of(jnp.array([5.0, 1.0, 2.0]), jnp.array(mask))
    assert (float(mean.compute()), int(mean.count)) == (1.5, 2)


def test_truth_values_are_counted_exactly():
    size = 2**24 + 3  # float32 has no such number
    mean = sum_up(jnp.ones(size, bool))
    assert int(mean.total) == int(mean.count) == size
    assert mean.total.dtype == jnp.int32
    assert float(mean.compute()) == 1


def test_types(x64):
    expected = {
        jnp.bfloat16: jnp.float32,
        jnp.float32: jnp.float32,
        jnp.float64: jnp.float64,
        jnp.int32: jnp.float32,
        jnp.uint8: jnp.float32,
        bool: jnp.int32,
    }
    for dtype, total in expected.items():
        mean = Mean.of(jnp.ones(3, dtype))
        assert (mean.total.dtype, mean.count.dtype) == (total, jnp.int32)
    # 300 times 1 in bfloat16 would stop at 256.
    assert float(Mean.of(jnp.ones(300, jnp.bfloat16)).total) == 300


@pytest.mark.parametrize(
    ("value", "dtype"), [(255, jnp.uint8), (2 * 10**9, jnp.int32), (-(10**9), jnp.int32)]
)
def test_sums_of_integers_do_not_overflow(value, dtype):
    mean = Mean.of(jnp.full(10**7, value, dtype))
    assert float(mean.compute()) == pytest.approx(value, rel=1e-5)


def test_devices_add_up():
    values, mask = jnp.arange(16.0), jnp.arange(16) % 3 > 0

    def fun(values, mask):
        with ops.data_axis("data"):
            return ops.data_sum(Mean.of(values, mask))

    summed = jax.pmap(fun, axis_name="data")(values.reshape(8, 2), mask.reshape(8, 2))
    expected = np.arange(16.0)[np.asarray(mask)].mean()
    np.testing.assert_allclose(summed.compute(), np.full(8, expected), rtol=1e-6)


def test_the_largest_logit_is_compared_with_the_label():
    logits = jnp.array([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [-1.0, -2.0, -0.5]])
    correct = is_correct(logits, jnp.array([1, 1, 2]))
    assert correct.dtype == bool
    assert correct.tolist() == [True, False, True]


def test_the_first_of_equal_logits_wins():
    assert is_correct(jnp.ones((3, 3)), jnp.arange(3)).tolist() == [True, False, False]


def test_accuracy_equals_numpy_with_any_leading_axes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5, 7)), rng.integers(0, 7, (4, 5))
    expected = logits.argmax(-1) == labels
    np.testing.assert_array_equal(is_correct(jnp.asarray(logits), jnp.asarray(labels)), expected)
    accuracy = Mean.of(is_correct(jnp.asarray(logits), jnp.asarray(labels))).compute()
    np.testing.assert_allclose(float(accuracy), expected.mean(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 1), (4, 3)])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises((AssertionError, ValueError)):
        is_correct(jnp.ones((4, 3)), jnp.zeros(shape, jnp.int32))
