import copy
import pickle
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data import batches as batches_module
from jaxnets.data import order
from jaxnets.data.batches import Batches, take


@settings(max_examples=80, deadline=None)
@given(
    num_examples=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    num_positions=st.integers(1, 900),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_draws_are_the_stream_cut_in_pieces(num_examples, batch_size, num_positions, seed, shuffle):
    batches = Batches(num_examples, batch_size, num_positions, seed, shuffle)
    draws = list(batches)
    assert len(draws) == len(batches) == -(-num_positions // batch_size)
    index, position, mask = (
        np.concatenate([draw[name] for draw in draws]) for name in ("index", "position", "mask")
    )
    stream = np.arange(num_positions)
    expected = order.index(seed, stream, num_examples) if shuffle else stream % num_examples
    assert np.array_equal(index[mask], expected)
    assert np.array_equal(position, np.arange(len(position)))
    # Only the end is masked, and what is masked draws example 0.
    assert mask[:num_positions].all()
    assert not mask[num_positions:].any()
    assert not index[~mask].any()


def test_types_and_shapes():
    draw = Batches(10, 4, 10)[2]
    assert {name: (a.dtype.name, a.shape) for name, a in draw.items()} == {
        "index": ("int32", (4,)),
        "position": ("uint32", (4,)),
        "mask": ("bool", (4,)),
    }
    assert draw["mask"].tolist() == [True, True, False, False]


def test_every_example_once_an_epoch_across_batches_that_straddle():
    batches = Batches(num_examples=10, batch_size=4, num_positions=20)
    index = np.concatenate([draw["index"] for draw in batches])
    assert sorted(index[:10]) == sorted(index[10:]) == list(range(10))


def test_access_in_any_order_gives_the_same():
    # More batches than one block holds, and more blocks than the cache holds.
    batches = Batches(num_examples=1000, batch_size=1500, num_positions=1500 * 200)
    forward = [draw["index"].copy() for draw in batches]
    for i in np.random.default_rng(0).permutation(len(batches)).tolist():
        assert np.array_equal(batches[i]["index"], forward[i])


def test_another_object_with_a_warm_cache_does_not_leak_in():
    a, b = Batches(100, 8, 80, seed=1), Batches(100, 8, 80, seed=2)
    a_first = a[0]["index"].copy()
    assert not np.array_equal(a_first, b[0]["index"])
    assert np.array_equal(a[0]["index"], a_first)
    short = Batches(100, 8, 5, seed=1)  # shares a's blocks, but ends within the first
    assert short[0]["mask"].tolist() == [True] * 5 + [False] * 3
    assert a[0]["mask"].all()
    assert np.array_equal(a[0]["index"], a_first)


def test_threads_share_one():
    batches = Batches(num_examples=997, batch_size=100, num_positions=100 * 2000)
    expected = order.index(0, np.arange(100 * 2000), 997).reshape(-1, 100)
    wrong = []

    def read(start):
        wrong.extend(
            i for i in range(start, 2000, 8) if not np.array_equal(batches[i]["index"], expected[i])
        )

    batches_module._block.cache_clear()
    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_is_a_plain_value():
    used, fresh = Batches(50, 4, 100), Batches(50, 4, 100)
    used[3]
    assert used == fresh
    assert hash(used) == hash(fresh)
    assert used != Batches(50, 4, 100, seed=1)
    for twin in (pickle.loads(pickle.dumps(used)), copy.deepcopy(used)):
        assert twin == used
        assert np.array_equal(twin[3]["index"], used[3]["index"])
    assert len(pickle.dumps(used)) < 500  # no cache travels to a worker


@pytest.mark.parametrize("i", [0, 2])  # a full one and the padded one
def test_a_caller_cannot_corrupt_the_next_draw(i):
    batches = Batches(10, 4, 10)
    for array in batches[i].values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    draw = batches[i]
    draw["index"] = None
    assert batches[i]["index"] is not None


def test_out_of_range():
    batches = Batches(10, 4, 10)
    for i in (3, -1, 10**12):
        with pytest.raises(IndexError, match=f"batch {i} of 3"):
            batches[i]
    with pytest.raises(TypeError):
        batches[0:2]
    assert np.array_equal(batches[np.int64(1)]["index"], batches[1]["index"])


def test_positions_wrap_at_32_bits_but_the_order_does_not():
    batch_size = 2**20
    batches = Batches(3, batch_size, 2**33)
    i = 2**32 // batch_size
    assert batches[i]["position"][:2].tolist() == [0, 1]
    assert batches[i - 1]["position"][-1] == 2**32 - 1
    assert np.array_equal(batches[i]["index"][:6], order.index(0, 2**32 + np.arange(6), 3))


@pytest.mark.parametrize("field", ["num_examples", "batch_size", "num_positions"])
@pytest.mark.parametrize("value", [0, -3, 2.0, "4", None, True])
def test_refuses_sizes_that_are_not_counts(field, value):
    sizes = {"num_examples": 10, "batch_size": 4, "num_positions": 10} | {field: value}
    with pytest.raises(errors.ConfigError, match=f"{field} is "):
        Batches(**sizes)


def test_refuses_more_examples_than_int32_can_number():
    with pytest.raises(errors.ConfigError, match="num_examples"):
        Batches(2**31, 4, 10)
    assert Batches(2**31 - 1, 4, 10)[0]["index"].min() >= 0


def test_refuses_a_seed_that_is_no_integer():
    with pytest.raises(errors.ConfigError, match="seed"):
        Batches(10, 4, 10, seed=0.5)


def test_is_cheap_in_sequence():
    # About 3 us where this was written; without blocks it is some 400 us.
    batches = Batches(num_examples=50_000, batch_size=4, num_positions=4 * 8000)
    batches[0]
    best = float("inf")
    for _ in range(3):
        batches_module._block.cache_clear()
        start = time.perf_counter()
        for i in range(len(batches)):
            batches[i]
        best = min(best, (time.perf_counter() - start) / len(batches))
    assert best < 50e-6


def test_take_gathers_rows_and_keeps_the_draw():
    arrays = {"image": np.arange(24).reshape(6, 2, 2), "label": np.arange(6) * 10}
    draw = Batches(6, 4, 6, shuffle=False)[1]
    batch = take(arrays, draw)
    assert sorted(batch) == ["image", "index", "label", "mask", "position"]
    assert batch["label"].tolist() == [40, 50, 0, 0]
    assert np.array_equal(batch["image"], arrays["image"][[4, 5, 0, 0]])
    assert batch["mask"] is draw["mask"]
    batch["label"][0] = -1
    assert arrays["label"][4] == 40


def test_take_refuses_a_name_of_the_draw():
    with pytest.raises(errors.ConfigError, match="mask"):
        take({"mask": np.ones(6)}, Batches(6, 4, 6)[0])


def test_partners_are_another_shuffled_stream():
    batches = Batches(50, 8, 95, seed=3, partners=True)
    plain = Batches(50, 8, 95, seed=3)
    for i, draw in enumerate(batches):
        for name, x in plain[i].items():
            np.testing.assert_array_equal(draw[name], x)
        assert draw["partner"].dtype == np.int32
        assert not draw["partner"].flags.writeable
    drawn = np.concatenate([draw["partner"] for draw in batches])
    assert sorted(drawn[:50]) == list(range(50))  # each once in an epoch
    index = np.concatenate([draw["index"] for draw in batches])
    assert (drawn[:50] == index[:50]).mean() < 0.2
    assert (drawn[:46] != drawn[50:]).any()
