"""Generation: with the cache as without it, each row as alone, and what is drawn."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import errors
from jaxnets.models.generation import GREEDY, Sampling, generate, restrict, stream
from jaxnets.models.gpt import GPT
from tests.models.tiny_gpt import KEY, QUICK, TINY, B, V, start

KINDS = [
    {"positions": "learned"},
    {"positions": "rotary", "use_bias": False, "use_tanh": False},
    {"positions": "learned", "tie_embeddings": False, "num_layers": 1},
]
LENGTHS = np.array([1, 4, 2, 7, 3, 5, 6, 2])
every_kind = pytest.mark.parametrize("fields", KINDS, ids=["learned", "rotary", "untied"])


@cache
def lively(**fields):
    """Parameters under which tokens don't repeat themselves: what blocks add outweighs the token."""
    params = start(**fields)
    blocks = {k: jax.tree.map(lambda x: 4 * x, v) for k, v in params.items() if k.startswith("block")}
    return {**params, **blocks}


def prompts(content=None):
    """Prompts of different lengths; what fills them up is random, or the content."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, 7))
    if content is not None:
        tokens = np.where(np.arange(7)[None] < LENGTHS[:, None], tokens, content)
    return tokens


@cache
def program(num_tokens, sampling=GREEDY, stop=None, use_cache=True, max_length=10, **fields):
    model = GPT(**{**TINY, **fields, "max_length": max_length})
    fn = partial(
        generate, model, num_tokens=num_tokens, sampling=sampling, stop=stop, use_cache=use_cache
    )
    return jax.jit(lambda params, x, lengths, key, rows: fn(params, x, lengths, key=key, rows=rows),
                   compiler_options=QUICK)  # fmt: skip


def run(num_tokens, x=None, lengths=LENGTHS, key=KEY, rows=None, **options):
    x = prompts() if x is None else x
    rows = np.arange(len(x)) if rows is None else rows
    fields = {k: v for k, v in options.items() if k not in ("sampling", "stop", "use_cache")}
    tokens, counts = program(num_tokens, **options)(lively(**fields), x, lengths, key, rows)
    return np.asarray(tokens), np.asarray(counts)


@every_kind
@pytest.mark.parametrize("num_tokens", [2, 25], ids=["that fit", "beyond the context"])
def test_greedy_with_the_cache_equals_greedy_without_it(fields, num_tokens):
    """Token for token, in float32; 25 are more than the model takes at once."""
    cached, counts = run(num_tokens, **fields)
    plain, _ = run(num_tokens, use_cache=False, **fields)
    np.testing.assert_array_equal(cached, plain)
    assert (counts == num_tokens).all()
    if num_tokens > 2:
        assert len(np.unique(cached)) > 4


@every_kind
def test_greedy_is_the_most_likely_token_of_the_model_itself(fields):
    """Row by row and without filling up, by the model as training calls it."""
    model, params = GPT(**{**TINY, **fields}), lively(**fields)
    cached, _ = run(25, **fields)
    apply = jax.jit(model.apply, compiler_options=QUICK)
    for row, length in enumerate(LENGTHS):
        seen = prompts()[row, :length].tolist()
        for token in cached[row]:
            logits = apply({"params": params}, jnp.array([seen + [0] * (10 - len(seen))]))
            assert np.argmax(logits[0, len(seen) - 1]) == token
            seen = [*(seen[-5:] if len(seen) == 10 else seen), int(token)]


def test_a_model_of_one_token_is_refused():
    model = GPT(5, max_length=1, num_layers=1, num_heads=1, width=4)
    with pytest.raises(ValueError, match="a model of one token can't go on"):
        generate(model, {}, jnp.ones((1, 1), int), jnp.array([1]), 3, key=KEY)


@pytest.mark.parametrize("temperature", [1e-2, 1e-38])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    logits = jnp.array([[1.0, 5.0, 3.0, -2.0]])
    scaled = restrict(logits, Sampling(temperature))
    keys = jax.random.split(jax.random.key(0), 20)
    assert all(int(jax.random.categorical(key, scaled)[0]) == 1 for key in keys)


def test_what_fills_prompts_up_is_without_effect():
    sampling = Sampling(temperature=0.8, top_k=9)
    first, _ = run(12, sampling=sampling)
    for content in (3, -1, V):  # the last two are no tokens
        np.testing.assert_array_equal(run(12, prompts(content), sampling=sampling)[0], first)
    uncached, _ = run(12, prompts(-1), sampling=sampling, use_cache=False)
    np.testing.assert_array_equal(uncached, first)


def test_a_long_prompt_is_read_in_chunks():
    x, lengths = np.random.default_rng(1).integers(0, V, (2, 9)), np.array([9, 7])
    whole, _ = run(8, x, lengths)
    np.testing.assert_array_equal(run(8, x, lengths, chunk=4)[0], whole)
    for fields, is_whole in ({"chunk": 4}, False), ({}, True):
        traced = program(8, **fields).trace(lively(**fields), x, lengths, KEY, np.arange(2))
        weights_of_all = re.search(r"f32\[2,\d+,9,10\]", str(traced.jaxpr))
        assert bool(weights_of_all) == is_whole


@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        ([[1, 2], [3, 4]], [2, 0], r"prompts have 1 to 2 tokens, not \[2, 0\]"),
        ([[1, 2]], [3], r"prompts have 1 to 2 tokens, not \[3\]"),
        ([[1, V]], [2], f"a prompt has a token that is none of the model's {V}"),
        ([[-1, 1]], [2], "a prompt has a token that is none"),
    ],
)
def test_prompts_that_cannot_be(x, lengths, message):
    with pytest.raises(ValueError, match=message):
        generate(GPT(**TINY), start(), jnp.array(x), np.array(lengths), 2, key=KEY)
    with pytest.raises(ValueError, match=message):
        next(stream(GPT(**TINY), start(), np.array(x), np.array(lengths), 2, key=KEY))


def test_a_row_is_as_if_it_were_alone():
    sampling = Sampling(top_p=0.9)
    together, _ = run(12, sampling=sampling)
    for row in (0, 3):
        x, lengths = prompts()[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1]
        alone, _ = run(12, x, lengths, rows=np.array([row]), sampling=sampling)
        np.testing.assert_array_equal(alone[0], together[row])
    np.testing.assert_array_equal(
        run(12, rows=np.arange(B), key=jax.random.key(1), sampling=sampling)[0], together
    )
    assert (run(12, key=jax.random.key(2), sampling=sampling)[0] != together).any(1).all()
    assert (run(12, rows=np.arange(B) + 1, sampling=sampling)[0] != together).any(1).all()


def test_a_row_is_over_behind_the_stop_token():
    free, _ = run(25)
    stop = int(free[2, 4])
    tokens, counts = run(25, stop=stop)
    for row, count, before in zip(tokens, counts, free, strict=True):
        places = np.flatnonzero(before == stop)
        expected = places[0] + 1 if len(places) else 25
        assert count == expected
        np.testing.assert_array_equal(row[:count], before[:count])
        assert (row[count:] == stop).all()


@pytest.mark.parametrize("stop", [None, 4])
def test_a_stream_gives_the_same_tokens(stop):
    sampling = Sampling(temperature=0.9)
    model = GPT(**TINY, dropout_rate=0.5, remat="full", chunk=2)
    x, lengths = prompts()[:3], LENGTHS[:3]
    expected, counts = run(15, x, lengths, sampling=sampling, stop=stop)
    found = list(stream(model, lively(), x, lengths, 15, key=KEY, sampling=sampling, stop=stop))
    np.testing.assert_array_equal(np.stack(found, 1), expected[:, : counts.max()])
    assert len(found) == counts.max()


def draws(logits, sampling, count=4000):
    """How often each token is drawn."""
    restricted = restrict(jnp.asarray(logits)[None], sampling)[0]
    drawn = jax.random.categorical(KEY, restricted, shape=(count,))
    return np.bincount(drawn, minlength=len(logits)) / count


def test_what_is_left_to_draw_from():
    share = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = np.log(share) + 3
    np.testing.assert_allclose(draws(logits, Sampling()), share, atol=0.03)
    hot = share**0.5 / (share**0.5).sum()
    np.testing.assert_allclose(draws(logits, Sampling(temperature=2.0)), hot, atol=0.03)
    for sampling, kept in [
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=3), [1, 3, 4]),
        (Sampling(top_k=9), range(5)),
        (Sampling(top_p=0.01), [1]),
        (Sampling(top_p=0.39), [1]),
        (Sampling(top_p=0.5), [1, 3]),
        (Sampling(top_p=0.9), [1, 3, 4, 0]),
        (Sampling(top_p=1.0), range(5)),
        (Sampling(top_k=3, top_p=0.6), [1, 3]),  # of 0.85
        (Sampling(temperature=0.1, top_p=0.9), [1]),
    ]:
        restricted = np.asarray(restrict(jnp.asarray(logits)[None], sampling))[0]
        assert sorted(np.flatnonzero(np.isfinite(restricted))) == sorted(kept), sampling


def test_greedy_is_the_limit_of_low_temperatures():
    cold, _ = run(6, sampling=Sampling(temperature=1e-6))
    np.testing.assert_array_equal(cold, run(6)[0])
    np.testing.assert_array_equal(run(6, sampling=Sampling(top_k=1))[0], cold)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is a number of at least 0"),
        ({"top_k": 0}, "top_k is at least 1"),
        ({"top_p": 0.0}, r"top_p lies in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p lies in \(0, 1\]"),
    ],
)
def test_samplings_that_cannot_be(arguments, message):
    with pytest.raises(errors.ConfigError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize(
    ("shape", "num_tokens", "stop", "message"),
    [
        ((1, 11), 1, None, "prompts of 11 tokens; this model takes 1 to 10"),
        ((1, 0), 1, None, "prompts of 0 tokens"),
        ((1, 3), 0, None, "number of tokens is at least 1, not 0"),
        ((1, 3), 1, V, f"the stop token {V} is none of the model's {V}"),
    ],
)
def test_what_cannot_be_generated(shape, num_tokens, stop, message):
    with pytest.raises(ValueError, match=message):
        generate(GPT(**TINY), start(), np.zeros(shape, int), np.ones(1), num_tokens, key=KEY, stop=stop)
