import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data import Batches, ByLength, Lengths

BUCKETS = (4, 8, 16)


def made(num_examples=100, batch_size=4, num_positions=100, *, shuffle=True, stretch=None, seed=0):
    length = np.random.default_rng(seed).integers(0, 20, num_examples)
    batches = Batches(num_examples, batch_size, num_positions, seed=seed, shuffle=shuffle)
    return ByLength(batches, {"tokens": length}, BUCKETS, stretch), length


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_each_epoch_is_a_pass(num_examples, batch_size, stretch, epochs, seed):
    """Also where a batch has examples of two epochs, whose rows have the positions of either."""
    count = epochs * num_examples
    draws, _ = made(num_examples, batch_size, count, stretch=stretch, seed=seed)
    found = [{name: draw[name][draw["mask"]] for name in ("index", "position")} for draw in draws]
    index, position = (np.concatenate([draw[name] for draw in found]) for name in found[0])
    assert sorted(position.tolist()) == list(range(count))
    for epoch in range(epochs):
        seen = index[position // num_examples == epoch]
        assert sorted(seen.tolist()) == list(range(num_examples))


def test_rows_of_a_batch_are_of_like_length():
    draws, length = made(1000, 10, 1000, stretch=20)
    spread = [np.ptp(length[draw["index"]]) for draw in draws]
    plain = [np.ptp(length[draw["index"]]) for draw in draws.batches]
    assert np.mean(spread) < 2 < 10 < np.mean(plain)
    firsts = [length[draws[i]["index"]].mean() for i in range(20)]
    assert firsts != sorted(firsts)  # and not the short ones first


def test_masks_say_where_tokens_are_in_the_least_bucket():
    draws, length = made()
    for draw in draws:
        size = np.minimum(length[draw["index"]], 16) * draw["mask"]
        assert draw["tokens_mask"].sum(1).tolist() == size.tolist()
        width = draw["tokens_mask"].shape[1]
        assert width in BUCKETS
        assert width == min(b for b in BUCKETS if b >= max(size.max(), 1))
        for row, n in zip(draw["tokens_mask"], size, strict=True):
            assert row[:n].all()


def test_a_longer_run_begins_the_same():
    short, _ = made(num_positions=90, stretch=6)
    long, _ = made(num_positions=1000, stretch=6)
    for i in range(90 // 4):
        for name, x in short[i].items():
            assert np.array_equal(x, long[i][name]), name
    assert short[22]["mask"].sum() == 2  # of the last batch, in which there are 4 in the longer run


def test_evaluation_sees_each_example_once():
    draws, length = made(num_examples=103, num_positions=103, shuffle=False)
    assert len(draws) == 26
    seen = np.concatenate([draw["index"][draw["mask"]] for draw in draws])
    assert sorted(seen.tolist()) == list(range(103))
    assert np.all(np.diff(length[seen]) >= 0)
    assert [int(draw["mask"].sum()) for draw in draws] == [4] * 25 + [3]
    assert not draws[25]["tokens_mask"][3].any()


def test_several_sequences_share_a_bucket():
    batches = Batches(num_examples=4, batch_size=2, num_positions=4, shuffle=False)
    lengths = {"source": np.array([3, 9, 1, 2]), "target": np.array([1, 1, 1, 7])}
    draws = ByLength(batches, lengths, BUCKETS)
    assert [draw["index"].tolist() for draw in draws] == [[2, 0], [3, 1]]
    assert [draw[f"{n}_mask"].shape[1] for draw in draws for n in lengths] == [4, 4, 16, 16]
    assert draws[1]["target_mask"].sum(1).tolist() == [7, 1]


def test_what_cannot_be():
    with pytest.raises(errors.ConfigError, match=r"buckets are lengths of at least 1, not \[\]"):
        Lengths({"a": np.array([1])}, {"a": np.array([1])}, ())
    with pytest.raises(errors.DataError, match="lengths are of"):
        Lengths({"a": np.array([1])}, {"b": np.array([1])}, (4,))
    with pytest.raises(errors.DataError, match="counts"):
        Lengths({"a": np.array([-1])}, {"a": np.array([1])}, (4,))
    with pytest.raises(errors.DataError, match="different numbers"):
        Lengths(
            {"a": np.array([1]), "b": np.array([1, 2])}, {"a": np.array([1]), "b": np.array([1])}, (4,)
        )
    with pytest.raises(errors.ConfigError, match="3 lengths of a for 4 examples"):
        ByLength(Batches(4, 2, 4), {"a": np.arange(3)}, (4,))
    with pytest.raises(errors.ConfigError, match="partners"):
        ByLength(Batches(4, 2, 4, partners=True), {"a": np.arange(4)}, (4,))
    draws, _ = made()
    with pytest.raises(IndexError, match="batch 25 of 25"):
        draws[25]
