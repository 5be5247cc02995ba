import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data import order


def epoch_of(seed, epoch, num_examples):
    positions = np.arange(num_examples) + epoch * num_examples
    return order.index(seed, positions, num_examples)


@pytest.mark.parametrize("num_examples", [*range(1, 70), 127, 128, 129, 1000, 4096, 4097, 65537])
def test_each_epoch_is_a_permutation(num_examples):
    for epoch in (0, 1, 7):
        drawn = epoch_of(3, epoch, num_examples)
        assert np.array_equal(np.sort(drawn), np.arange(num_examples))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
    num_examples=st.integers(1, 3000),
)
def test_each_epoch_is_a_permutation_for_any_key(seed, epoch, num_examples):
    drawn = epoch_of(seed, epoch, num_examples)
    assert np.array_equal(np.sort(drawn), np.arange(num_examples))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**62),
    num_examples=st.integers(1, 2**31 - 1),
    count=st.integers(1, 40),
)
def test_an_array_over_epochs_equals_its_positions_one_by_one(seed, start, num_examples, count):
    positions = start + np.arange(count)
    together = order.index(seed, positions, num_examples)
    alone = [int(order.index(seed, int(position), num_examples)) for position in positions]
    assert together.tolist() == alone
    assert together.min() >= 0
    assert together.max() < num_examples


def test_shape_and_type():
    drawn = order.index(0, np.arange(12, dtype=np.int32).reshape(3, 4), 5)
    assert drawn.shape == (3, 4)
    assert drawn.dtype == np.int64
    assert order.index(0, 3, 5).shape == ()
    assert order.index(0, np.arange(0), 5).shape == (0,)


def test_golden_values():
    # Resumed and compared runs rest on these: they must never change.
    assert order.index(0, np.arange(12), 10).tolist() == GOLDEN_TEN
    assert order.index(7, np.arange(6) * 10_007, 50_000).tolist() == GOLDEN_CIFAR
    far = np.array([2**32 - 1, 2**32, 2**40 + 5, 2**62])
    assert order.index(2**63 + 1, far, 60_000).tolist() == GOLDEN_FAR


GOLDEN_TEN = [8, 0, 2, 3, 9, 6, 1, 4, 5, 7, 9, 3]
GOLDEN_CIFAR = [41009, 33499, 17614, 3356, 49431, 13343]
GOLDEN_FAR = [45616, 40130, 58770, 11509]


def test_epochs_and_seeds_differ():
    epochs = {tuple(epoch_of(0, epoch, 50)) for epoch in range(200)}
    seeds = {tuple(epoch_of(seed, 0, 50)) for seed in range(200)}
    assert len(epochs) == len(seeds) == 200
    assert len(epochs & seeds) == 1  # seed 0, epoch 0


def test_seed_and_epoch_are_not_interchangeable():
    assert not np.array_equal(epoch_of(0, 1, 50), epoch_of(1, 0, 50))
    assert not np.array_equal(epoch_of(2**32, 0, 50), epoch_of(0, 0, 50))  # all 64 bits count


def test_positions_beyond_32_bits_are_not_truncated():
    num_examples = 2**16  # divides 2**32, so a truncated position would repeat epoch 0
    far = epoch_of(0, 2**16, num_examples)
    assert np.array_equal(np.sort(far), np.arange(num_examples))
    assert not np.array_equal(far, epoch_of(0, 0, num_examples))


# Chi-square divided by its degrees of freedom is 1 +- sqrt(2 / df); six standard deviations are
# allowed, so a sound order fails by chance in about one of 10**8 changes of a constant.
def assert_uniform(counts, expected):
    df = counts.size - 1
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - df) < 6 * math.sqrt(2 * df) + 6, chi / df


@pytest.mark.parametrize("num_examples", [2, 3, 4, 5, 6])
def test_every_permutation_of_a_few_is_equally_likely(num_examples):
    num_epochs = 30_000
    drawn = order.index(5, np.arange(num_epochs * num_examples), num_examples)
    codes = drawn.reshape(num_epochs, num_examples) @ num_examples ** np.arange(num_examples)
    possible = [
        np.dot(one, num_examples ** np.arange(num_examples))
        for one in itertools.permutations(range(num_examples))
    ]
    counts = np.array([(codes == code).sum() for code in possible])
    assert counts.sum() == num_epochs
    assert_uniform(counts, num_epochs / len(possible))


@pytest.mark.parametrize("num_examples", [10, 97])
def test_the_first_example_is_uniform_over_seeds(num_examples):
    num_seeds = 2000
    first = np.array([int(order.index(seed, 0, num_examples)) for seed in range(num_seeds)])
    assert_uniform(np.bincount(first, minlength=num_examples), num_seeds / num_examples)


@pytest.mark.parametrize("num_examples", [17, 65, 129])
def test_pairs_of_positions_are_uniform_over_epochs(num_examples):
    num_epochs = 60_000
    starts = np.arange(num_epochs)[:, None] * num_examples
    for second in (1, num_examples // 2):
        a, b = order.index(3, starts + np.array([0, second]), num_examples).T
        counts = np.bincount(a * num_examples + b, minlength=num_examples**2)
        different = ~np.eye(num_examples, dtype=bool).ravel()
        assert counts[~different].sum() == 0
        assert_uniform(counts[different], num_epochs / different.sum())


@pytest.mark.parametrize("num_examples", [1000, 50_000])
def test_no_serial_correlation(num_examples):
    positions = np.arange(200_000)
    drawn = order.index(1, positions, num_examples) / num_examples
    for lag in (1, 2, 3, num_examples):
        # Within an epoch draws without replacement correlate by -1/(N - 1), far below the bound.
        correlation = np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(drawn.size - lag) + 2 / num_examples
    displacement = np.corrcoef(positions % num_examples, drawn)[0, 1]
    assert abs(displacement) < 5 / math.sqrt(drawn.size)


@pytest.mark.parametrize("num_examples", [0, -1, 2**31])
def test_refuses_an_impossible_number_of_examples(num_examples):
    with pytest.raises(errors.ConfigError, match="num_examples"):
        order.index(0, 0, num_examples)


@pytest.mark.parametrize("position", [-1, np.array([3, -2]), 0.5, np.array([1.0])])
def test_refuses_positions_that_are_not_counts(position):
    with pytest.raises(errors.ConfigError, match="positions"):
        order.index(0, position, 5)
