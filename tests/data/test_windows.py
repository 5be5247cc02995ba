"""Windows of a text, and how they are kept on devices without one copy for each place in a window."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors, feed
from jaxnets.config import RunOptions
from jaxnets.data import Batches, Windows, cut_into_windows, take
from jaxnets.data.sources import read_rows
from jaxnets.train import make_strategy
from jaxnets.train.mesh import Overlapping, without_overlap


@given(st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_every_place_begins_a_window(num_tokens, length):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    if num_tokens < length:
        with pytest.raises(
            errors.DataError, match=f"{num_tokens} tokens don't fill a window of {length}"
        ):
            Windows(tokens, length)
        return
    windows = Windows(tokens, length)
    expected = np.arange(len(windows))[:, None] + np.arange(length)
    assert len(windows) == num_tokens - length + 1
    np.testing.assert_array_equal(windows.arrays["tokens"], expected)
    np.testing.assert_array_equal(
        np.stack([windows[i]["tokens"] for i in range(len(windows))]), expected
    )
    index = np.random.default_rng(0).integers(0, len(windows), 7)
    np.testing.assert_array_equal(read_rows(windows, index)["tokens"], expected[index])
    for i in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[i]


@given(st.integers(2, 60), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_validation_predicts_every_token_once(num_tokens, length):
    tokens = np.arange(100, 100 + num_tokens, dtype=np.uint8)
    cut = cut_into_windows(tokens, length)
    inputs, labels, mask = cut["tokens"][:, :-1], cut["tokens"][:, 1:], cut["token_mask"]
    assert labels[mask].tolist() == tokens[1:].tolist()
    assert (labels[mask] == inputs[mask] + 1).all()
    assert mask[:-1].all()
    assert len(mask) == -(-(num_tokens - 1) // length)


def test_one_token_predicts_nothing():
    with pytest.raises(errors.DataError, match="1 tokens leave nothing"):
        cut_into_windows(np.zeros(1, np.uint8), 4)


@pytest.mark.parametrize("options", [{}, {"strategy": "pmap"}, {"fixed_order": 8}, {"num_devices": 1}])
def test_a_device_keeps_the_text_and_not_its_windows(options):
    tokens = np.random.default_rng(0).integers(0, 200, 500).astype(np.uint8)
    arrays = Windows(tokens, 33).arrays
    kept = without_overlap(arrays["tokens"])
    assert isinstance(kept, Overlapping)
    assert kept.whole.shape == (500,)
    name, shards = options.get("strategy", "jit"), options.get("fixed_order", 0)
    strategy = make_strategy(name, num_devices=options.get("num_devices"), virtual_shards=shards)
    if not shards:
        resident = strategy.replicate(arrays)
        assert sum(x.nbytes for x in jax.tree.leaves(resident)) == 500

    def make_step(*, axis_name):
        from jaxnets.ops.partition import data_axis, data_sum

        def step(state, batch):
            assert batch["tokens"].shape[1:] == (33,)
            weights = 1 + batch["index"][:, None].astype(np.float32)
            with data_axis(axis_name):
                return data_sum({"sum": (batch["tokens"] * weights).sum(0)})

        return step

    draw = Batches(468, 16, 16)[0]
    found = strategy.compile_eval(make_step, arrays)({}, draw)["sum"]
    expected = take(arrays, draw)["tokens"] * (1.0 + draw["index"][:, None])
    np.testing.assert_allclose(found, expected.sum(0), rtol=1e-6)


def test_only_windows_are_kept_as_a_text():
    tokens = np.arange(40, dtype=np.uint8)
    for array in (tokens, tokens.reshape(8, 5), np.broadcast_to(tokens[:5], (8, 5)), tokens[:, None]):
        assert without_overlap(array) is array
    view = Windows(tokens[::2], 3).arrays["tokens"]
    np.testing.assert_array_equal(view[1], [2, 4, 6])
    assert without_overlap(view) is view  # its tokens don't lie side by side


def test_what_windows_take_is_what_is_counted():
    class Data:
        train = Windows(np.zeros(1_000_000, np.uint8), 1000).arrays
        test = train
        lengths = partners = None

    feed.check_feed(Data, RunOptions(max_resident_gb=0.003))
    with pytest.raises(errors.ConfigError, match=r"0\.002 GB of each device, more than the 0\.0015 GB"):
        feed.check_feed(Data, RunOptions(max_resident_gb=0.0015))
