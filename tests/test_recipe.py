import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.recipe import Recipe, count_positions


def recipe_of(**changes):
    values = {
        "name": "test",
        "init_fn": None,
        "loss_fn": None,
        "eval_fn": None,
        "tx": None,
        "train": {"image": np.zeros((10, 2)), "label": np.zeros(10)},
        "test": {"image": np.zeros((4, 2)), "label": np.zeros(4)},
        "num_positions": 25,
        "batch_size": 4,
    }
    return Recipe(**{**values, **changes})


@settings(deadline=None)
@given(
    num_examples=st.integers(1, 10**6),
    batch_size=st.integers(1, 10**4),
    epochs=st.integers(1, 100),
)
def test_whole_epochs_draw_every_example_that_often(num_examples, batch_size, epochs):
    batch_size = min(batch_size, num_examples)
    assert count_positions(num_examples, batch_size, epochs=epochs) == epochs * num_examples


@settings(deadline=None)
@given(steps=st.integers(1, 10**6), epochs=st.floats() | st.integers())
def test_steps_win_over_epochs(steps, epochs):
    assert count_positions(1000, 128, epochs=epochs, steps=steps) == steps * 128


@pytest.mark.parametrize(
    ("epochs", "expected"), [(0.5, 500), (0.0015, 2), (2.25, 2250), (1e-9, 1), (1 / 3, 333)]
)
def test_a_part_of_an_epoch(epochs, expected):
    drawn = count_positions(1000, 128, epochs=epochs)
    assert drawn == expected
    assert isinstance(drawn, int)


@pytest.mark.parametrize("epochs", [0, -1, -0.5, math.nan, math.inf, -math.inf])
def test_epochs_out_of_range(epochs):
    with pytest.raises(errors.ConfigError, match="epochs must be a finite number above 0, not"):
        count_positions(1000, 128, epochs=epochs)


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_out_of_range(steps):
    with pytest.raises(errors.ConfigError, match=f"steps must be at least 1, not {steps}"):
        count_positions(1000, 128, epochs=1, steps=steps)


@pytest.mark.parametrize("steps", [None, 5])
def test_batch_sizes_out_of_range(steps):
    for batch_size in (0, -1):
        with pytest.raises(errors.ConfigError, match="the batch size must be at least 1, not"):
            count_positions(1000, batch_size, epochs=1, steps=steps)
    with pytest.raises(errors.ConfigError, match="larger than the training set of 1000 examples"):
        count_positions(1000, 1001, epochs=1, steps=steps)
    assert count_positions(1000, 1000, epochs=1) == 1000


@pytest.mark.parametrize(("num_positions", "steps"), [(1, 1), (4, 1), (5, 2), (24, 6), (25, 7)])
def test_the_last_batch_may_be_short(num_positions, steps):
    assert recipe_of(num_positions=num_positions).num_steps == steps


def test_sizes_come_from_the_training_set():
    assert recipe_of().num_examples == 10


def test_a_recipe_does_not_change():
    with pytest.raises(AttributeError):
        recipe_of().batch_size = 8
    assert recipe_of().torch_arguments == {}
