"""Beam search against trying every sequence, and against greedy search."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.models.beam_search import beam_search

V, T, B = 4, 4, 3
BEGIN, END = 1, 0


def table(seed=0, scale=2.0, rows=B):
    """Logits of the next token, by row, position, the token before it and the one before that."""
    return np.random.default_rng(seed).normal(scale=scale, size=(rows, T, V, V, V)).astype(np.float32)


def stepper(logits):
    """A model whose cache is the token before the last: it is wrong if the cache isn't reordered."""
    logits = jnp.asarray(logits)

    def step(tokens, position, cache):
        rows = jnp.arange(len(logits))[:, None]
        return logits[rows, position, cache, tokens], tokens

    return step


def search(logits, num_beams, **options):
    batch = len(logits)
    run = partial(
        beam_search,
        stepper(logits),
        batch_size=batch,
        num_beams=num_beams,
        max_length=T,
        begin=BEGIN,
        end=END,
    )
    cache = jnp.zeros((batch, num_beams), jnp.int32)
    return jax.tree.map(np.asarray, jax.jit(partial(run, **options))(cache))


def all_scores(logits, alpha, limit=T):
    """Score of every sequence that ends, or comes to the limit, for one row."""
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)), np.float64)
    scores = {}
    for tokens in itertools.product(range(V), repeat=limit):
        length = tokens.index(END) + 1 if END in tokens else limit
        said, total, before, last = tokens[:length], 0.0, 0, BEGIN
        for t, token in enumerate(said):
            total += log_p[t, before, last, token]
            before, last = last, token
        scores[said] = total / ((5 + length) / 6) ** alpha
    return scores


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_all_beams_find_what_trying_everything_finds(alpha):
    logits, num_beams = table(), V**T
    tokens, scores = search(logits, num_beams, length_penalty=alpha)
    for row in range(B):
        expected = sorted(all_scores(logits[row], alpha).items(), key=lambda x: -x[1])
        found = scores[row][np.isfinite(scores[row])]
        np.testing.assert_allclose(found, [s for _, s in expected], rtol=1e-5)
        for (said, _), ours in zip(expected[:5], tokens[row], strict=False):
            assert tuple(ours[: len(said)]) == said
            assert (ours[len(said) :] == END).all()


def test_one_beam_is_greedy():
    logits = table(3, rows=20)
    tokens, scores = search(logits, 1, length_penalty=1.3)
    lengths = set()
    for row in range(20):
        said, before, last, total = [], 0, BEGIN, 0.0
        for t in range(T):
            log_p = np.asarray(jax.nn.log_softmax(logits[row, t, before, last]))
            token = int(log_p.argmax())
            said.append(token)
            total += log_p[token]
            before, last = last, token
            if token == END:
                break
        lengths.add(len(said))
        assert tokens[row, 0].tolist() == said + [END] * (T - len(said))
        np.testing.assert_allclose(scores[row, 0], total / ((5 + len(said)) / 6) ** 1.3, rtol=1e-5)
    assert len(lengths) > 2  # rows that ended early, too


def test_more_beams_find_no_worse_and_sometimes_better():
    logits = table(5, rows=40, scale=1.0)
    one, some, many = (search(logits, w, length_penalty=0.0)[1][:, 0] for w in (1, 3, V**T))
    assert (many >= some - 1e-6).all()
    assert (some > one + 1e-3).any()


def test_a_row_is_not_changed_by_others():
    logits = table(7, rows=6)
    together = search(logits, 3)
    for row in range(6):
        alone = search(logits[row : row + 1], 3)
        for ours, theirs in zip(alone, together, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


def test_it_ends_when_all_rows_have():
    """The table has NaN where nobody should ever look."""
    logits = table(2)
    logits[:, 1] = -1000.0
    logits[:, 1, :, :, END] = 0.0  # everything ends with the second token
    logits[:, 2:] = np.nan
    tokens, scores = search(logits, 2)
    assert np.isfinite(scores).all()
    assert (tokens[:, :, 1:] == END).all()


def test_limits_of_rows():
    logits = table(4)
    logits[..., END] = -50.0  # nobody wants to end
    limits = jnp.array([1, 2, 4])
    tokens, scores = search(logits, 2, limits=limits, length_penalty=0.0)
    for row, limit in enumerate([1, 2, 4]):
        assert (tokens[row, 0, :limit] != END).all()
        assert (tokens[row, 0, limit:] == END).all()
    best = max(all_scores(logits[0], 0.0, limit=1).values())
    np.testing.assert_allclose(scores[0, 0], best, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"num_beams": 0}, {"max_length": 0}, {"length_penalty": -1.0}])
def test_what_cannot_be(wrong):
    options = {"num_beams": 1, "max_length": T, "length_penalty": 0.6, **wrong}
    with pytest.raises(ValueError, match="can't be"):
        beam_search(
            stepper(table()), jnp.zeros((B, 1), jnp.int32), batch_size=B, begin=BEGIN, end=END, **options
        )
