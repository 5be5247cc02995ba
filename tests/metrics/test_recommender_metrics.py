"""Errors, ranks, counts and AUC against scikit-learn, over any split into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs

from jaxnets import metrics
from jaxnets.metrics import AUC, ClassCounts, Mean, RootMeanSquare

N, V = 24, 4
quick = settings(max_examples=20, deadline=None)
SEED = st.integers(0, 2**32 - 1)
CUT = st.integers(0, N)


def parts_of(cut, mask):
    """The mask cut in two, as batches that are padded to one shape."""
    is_first = np.arange(N) < cut
    return [jnp.asarray(mask & is_first), jnp.asarray(mask & ~is_first)]


def merged(of, cut, mask):
    return jax.tree.map(jnp.add, *[of(part) for part in parts_of(cut, mask)])


def draw(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(N) < 0.8
    mask[:2] = True
    return rng, mask


@quick
@given(seed=SEED, cut=CUT)
def test_errors(seed, cut):
    rng, mask = draw(seed)
    left, right = rng.normal(size=(2, N)).astype(np.float32)
    left[~mask] = np.nan
    x, y = jnp.asarray(left), jnp.asarray(right)
    rmse = merged(lambda m: RootMeanSquare.of(x, y, m), cut, mask).compute()
    mae = merged(lambda m: Mean.of(metrics.absolute_error(x, y), m), cut, mask).compute()
    expected = theirs.root_mean_squared_error(right[mask], left[mask])
    np.testing.assert_allclose(rmse, expected, rtol=1e-5)
    np.testing.assert_allclose(mae, theirs.mean_absolute_error(right[mask], left[mask]), rtol=1e-5)


def test_nothing_counted_is_no_error():
    assert float(RootMeanSquare.of(jnp.ones(2), jnp.zeros(2), jnp.zeros(2, bool)).compute()) == 0


@quick
@given(seed=SEED, cut=CUT, score=st.sampled_from(["precision", "recall", "f1"]))
def test_counts(seed, cut, score):
    rng, mask = draw(seed)
    function = getattr(theirs, f"{score}_score")
    for average, num_classes in (("binary", 2), ("micro", V), ("macro", V), ("weighted", V)):
        found, labels = rng.integers(0, num_classes, (2, N))

        def of(m, found=found, labels=labels, average=average, num_classes=num_classes):
            return ClassCounts.of(
                jnp.asarray(found), jnp.asarray(labels), m,
                num_classes=num_classes, score=score, average=average,
            )  # fmt: skip

        expected = function(labels[mask], found[mask], average=average, zero_division=0)
        np.testing.assert_allclose(merged(of, cut, mask).compute(), expected, rtol=1e-5, atol=1e-7)


def test_counts_that_nothing_is_defined_of():
    ones, zeros = jnp.ones(3, jnp.int32), jnp.zeros(3, jnp.int32)
    for score in ("precision", "recall", "f1"):
        assert float(ClassCounts.of(zeros, zeros, score=score).compute()) == 0
        assert float(ClassCounts.of(ones > 0, ones > 0, score=score).compute()) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"score": "accuracy"}, "score is one of"),
        ({"average": "all"}, "average is one of"),
        ({"num_classes": 3}, "of 2 classes, not of 3"),
        ({"predictions": jnp.array([0.2, 0.9])}, "predictions are classes, .* not float32"),
        ({"labels": jnp.zeros(2, jnp.bfloat16)}, "labels are classes, .* not bfloat16"),
    ],
)
def test_unknown_counts_are_refused(options, match):
    classes = {"predictions": jnp.zeros(2, jnp.int32), "labels": jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match=match):
        ClassCounts.of(**classes | options)


@pytest.mark.parametrize("score", ["precision", "recall", "f1"])
@pytest.mark.parametrize(
    ("average", "num_classes"), [("binary", 2), ("micro", V), ("macro", V), ("weighted", V)]
)
def test_a_class_out_of_range_makes_the_score_nan(average, num_classes, score):
    """But for one that a mask leaves out; also under jit, after merging, and on the host."""
    options = {"num_classes": num_classes, "score": score, "average": average}

    @jax.jit
    def of(predictions, labels, mask):
        return ClassCounts.of(predictions, labels, mask, **options)

    classes, everything = jnp.array([1, 0, 1]), jnp.ones(3, bool)
    good = of(classes, classes, everything)
    assert float(good.compute()) == 1
    for other in (-1, num_classes, 300):
        spoiled = classes.at[1].set(other)
        for pair in ((spoiled, classes), (classes, spoiled), (spoiled, spoiled)):
            merged = jax.tree.map(jnp.add, good, of(*pair, everything))
            assert np.isnan(merged.compute())
            assert np.isnan(jax.tree.map(np.asarray, merged).compute())
            assert float(of(*pair, jnp.array([True, False, True])).compute()) == 1


@quick
@given(seed=SEED, cut=CUT, decimals=st.sampled_from([1, 6]))
def test_auc(seed, cut, decimals):
    rng, mask = draw(seed)
    scores = np.round(rng.normal(size=N), decimals).astype(np.float32)  # with one decimal, with ties
    labels = rng.integers(0, 2, N)
    labels[:2] = 0, 1
    first, second = (AUC.of(scores, labels, part) for part in parts_of(cut, mask))
    expected = theirs.roc_auc_score(labels[mask], scores[mask])
    np.testing.assert_allclose((first + second).compute(), expected, rtol=1e-12)


def test_auc_of_one_class_is_none():
    assert np.isnan(AUC.of([0.1, 0.2], [1, 1]).compute())
    assert np.isnan(AUC.of([0.1, np.nan], [1, 0]).compute())
    with pytest.raises(ValueError, match="0 or 1"):
        AUC.of([0.1], [2])
    with pytest.raises(ValueError, match="differ"):
        AUC.of([0.1, 0.2], [1])


@quick
@given(seed=SEED, k=st.integers(1, 12), levels=st.sampled_from([4, 1000]))
def test_ndcg(seed, k, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (5, 9)).astype(np.float32)  # with few levels, with ties
    relevance = rng.integers(0, 3, (5, 9)).astype(np.float32)
    found = metrics.ndcg(jnp.asarray(scores), jnp.asarray(relevance), k)
    for row in range(5):
        expected = theirs.ndcg_score(relevance[row : row + 1], scores[row : row + 1], k=k)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)


@quick
@given(seed=SEED, size=st.sampled_from([5, N]), k=st.integers(1, 12))
def test_the_mean_ndcg_of_any_batches(seed, size, k):
    """Queries in random order, some left out, the last batch filled up with what means nothing."""
    rng, mask = draw(seed)
    scores = rng.integers(0, 6, (N, 9)).astype(np.float32)
    relevance = rng.integers(0, 3, (N, 9)) * rng.integers(0, 2, (N, 1)).astype(np.float32)
    expected = theirs.ndcg_score(relevance[mask], scores[mask], k=k)
    order = np.pad(rng.permutation(N), (0, -N % size))
    keep = mask[order] & (np.arange(len(order)) < N)
    relevance = np.where(keep[:, None], relevance[order], 9)
    batches = np.split(np.arange(len(order)), len(order) // size)
    parts = [
        Mean.of(
            metrics.ndcg(*map(jnp.asarray, (scores[order[b]], relevance[b])), k), jnp.asarray(keep[b])
        )
        for b in batches
    ]
    merged = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    assert int(merged.count) == mask.sum()
    np.testing.assert_allclose(merged.compute(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
def test_ndcg_of_integer_scores(dtype):
    scores = np.array([[0, 1, 0, 1], [1, 0, 1, 1]])
    relevance = np.array([[0, 3, 1, 2], [1, 2, 0, 0]], np.float32)
    expected = [theirs.ndcg_score(relevance[i : i + 1], scores[i : i + 1], k=2) for i in range(2)]
    found = metrics.ndcg(jnp.asarray(scores, dtype), jnp.asarray(relevance), 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_ndcg_of_nan_is_nan():
    nan = jnp.nan
    scores = jnp.array([[nan, nan], [2.0, nan], [2.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    relevance = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, nan], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(metrics.ndcg(scores, relevance, 1), [nan, nan, nan, 1, 0])


@quick
@given(seed=SEED, cut=CUT, k=st.integers(1, 8))
def test_ranks_of_one_wanted_item(seed, cut, k):
    rng, mask = draw(seed)
    scores = rng.permuted(np.tile(np.arange(9.0, dtype=np.float32), (N, 1)), axis=1)
    wanted = rng.integers(0, 9, N)
    is_wanted = np.arange(9)[None] == wanted[:, None]
    ranks = metrics.rank_of(jnp.asarray(scores), jnp.asarray(wanted))
    values = {
        "hits": metrics.is_hit(ranks, k),
        "gains": metrics.gain_at(ranks, k),
        "reciprocals": metrics.reciprocal_rank(ranks),
    }
    found = {
        name: merged(lambda m, x=x: Mean.of(x, m), cut, mask).compute() for name, x in values.items()
    }
    labels, kept = wanted[mask], scores[mask]
    expected = {
        "hits": theirs.top_k_accuracy_score(labels, kept, k=k, labels=np.arange(9)),
        "gains": theirs.ndcg_score(is_wanted[mask], kept, k=k),
        "reciprocals": theirs.label_ranking_average_precision_score(is_wanted[mask], kept),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_ranks_among_candidates_with_ties_and_nan():
    scores = jnp.array([[3.0, 2.0, 2.0, 1.0], [jnp.nan, 1.0, 0.0, -1.0], [1.0, jnp.nan, 0.0, 5.0]])
    ranks = metrics.rank_of(scores, jnp.array([2, 1, 1]))
    assert ranks.tolist() == [3, 2, 4]
    only = jnp.array([[False, True, False, True], [True] * 4, [False] * 4])
    assert metrics.rank_of(scores, jnp.array([2, 1, 1]), only).tolist() == [2, 2, 1]
    assert metrics.rank_of(jnp.zeros((1, 20)), jnp.array([0])).tolist() == [20]
    with pytest.raises(ValueError, match="at least 1"):
        metrics.is_hit(ranks, 0)


def test_a_wanted_item_that_is_none_is_no_hit():
    """Nor do bytes wrap around in a catalogue that is larger than they count."""
    wanted, none = jnp.array([2, 7, -1, 1]), 2**31 - 1
    ranks = jax.jit(metrics.rank_of)(jnp.ones((4, 2)), wanted)
    assert ranks.tolist() == [none, none, none, 2]
    assert metrics.is_hit(ranks, 10).tolist() == [False, False, False, True]
    assert metrics.gain_at(ranks, 10)[:3].tolist() == [0, 0, 0]
    np.testing.assert_allclose(metrics.reciprocal_rank(ranks), [0, 0, 0, 0.5], atol=1e-9)
    nobody = jnp.zeros((4, 2), bool)
    assert metrics.rank_of(jnp.ones((4, 2)), wanted, nobody).tolist() == [none, none, none, 1]
    assert metrics.rank_of(jnp.arange(300.0)[None], jnp.array([200], jnp.uint8)).tolist() == [100]
