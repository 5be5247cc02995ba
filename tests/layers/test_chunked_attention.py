"""Attention in chunks: the same numbers and gradients, in memory linear in the length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.layers import SelfAttention, attention, chunked_attention, rotate

B, T, N, K = 2, 7, 3, 4


def draw(length=T, num_keys=None, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    sizes = (length, num_keys or length, num_keys or length)
    return [jnp.asarray(rng.normal(size=(B, n, N, K)).astype(dtype)) for n in sizes]


def masks():
    rng = np.random.default_rng(1)
    return {"none": None, "keys": rng.random((B, T)) < 0.7, "pairs": rng.random((B, T, T)) < 0.6}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "keys", "pairs"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_it_equals_the_plain_form(chunk, kind, is_causal, x64):
    arrays, along = draw(), draw(seed=2)[0]
    mask = masks()[kind]

    def run(fn, *arrays):
        out, pull = jax.vjp(partial(fn, is_causal=is_causal, mask=mask), *arrays)
        return out, pull(along)

    plain = jax.jit(partial(run, attention))(*arrays)
    chunked = jax.jit(partial(run, partial(chunked_attention, chunk=chunk)))(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), chunked, plain)


def test_other_numbers_of_queries_than_keys(x64):
    arrays = draw(5, 8)
    np.testing.assert_allclose(
        chunked_attention(*arrays, chunk=2), attention(*arrays), rtol=1e-12, atol=1e-13
    )
    assert chunked_attention(*draw(0, 3), chunk=2).shape == (B, 0, N, K)


def peak(fn, length):
    """Temporary bytes of the gradient, as XLA plans them."""
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 3

    def loss(*arrays):
        return jnp.sum(fn(*arrays) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square():
    chunked = partial(chunked_attention, chunk=64, is_causal=True)
    short, long = (peak(chunked, length) for length in (512, 2048))
    assert long < 4.5 * short
    plain = partial(attention, is_causal=True)
    assert peak(plain, 2048) > 10 * peak(plain, 512)
    assert long < peak(plain, 2048) / 8


def test_dropout_belongs_to_rows_and_is_that_of_all_at_once(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 6, 12)))
    layer = SelfAttention(N, is_causal=True, chunk=2, dropout_rate=0.5)
    params = layer.init(jax.random.key(0), x, train=False)
    rows = np.array([5, 9])

    def run(x, rows, key=1, layer=layer):
        return layer.apply(params, x, train=True, rows=rows, rngs={"dropout": jax.random.key(key)})

    out = run(x, rows)
    np.testing.assert_allclose(run(x[::-1], rows[::-1]), out[::-1], rtol=1e-12)
    assert np.abs(run(x, rows, key=2) - out).max() > 1e-3
    assert np.abs(run(x, rows + 1) - out).max() > 1e-3
    plain = layer.apply(params, x, train=False)
    assert np.abs(out - plain).max() > 1e-3
    whole = SelfAttention(N, is_causal=True, dropout_rate=0.5)
    np.testing.assert_allclose(whole.apply(params, x, train=False), plain, rtol=1e-12)
    # The chunks together have the mask of all at once.
    for chunk in (1, 4):
        other = SelfAttention(N, is_causal=True, chunk=chunk, dropout_rate=0.5)
        np.testing.assert_allclose(run(x, rows, layer=other), out, rtol=1e-12)
    np.testing.assert_allclose(run(x, rows, layer=whole), out, rtol=1e-12)
    seen = []

    def drop(weights, first):
        seen.append(weights.shape)
        return weights * (first // 2 + 1)

    query, key, _ = draw(6)
    scaled = chunked_attention(query, key, jnp.ones_like(key), chunk=2, dropout_fn=drop)
    np.testing.assert_allclose(scaled[0, :, 0, 0], [1, 1, 2, 2, 3, 3], rtol=1e-12)
    assert set(seen) == {(B, N, 2, 6)}


def test_what_cannot_be():
    with pytest.raises(ValueError, match="at least 1 query, not 0"):
        chunked_attention(*draw(), chunk=0)
    with pytest.raises(ValueError, match="as many keys as queries"):
        chunked_attention(*draw(5, 8), chunk=2, is_causal=True)
    with pytest.raises(AssertionError, match="shape"):
        chunked_attention(*draw(), chunk=2, mask=np.ones((B, T + 1), bool))


@pytest.mark.parity
@pytest.mark.parametrize("places", [None, np.array([[0, 1, 2, 3, 4, 5, 6], [9, 3, 3, 0, 100, 7, 1]])])
def test_rotary_positions_by_complex_numbers(places, x64):
    """Each pair as a complex number, turned."""
    x = np.asarray(draw()[0])
    at = np.tile(np.arange(T), (B, 1)) if places is None else places
    angle = at[:, :, None, None] * 10_000.0 ** (-np.arange(2) / 2)
    turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), places), expected, rtol=1e-12, atol=1e-13)


def test_rotary_products_depend_on_the_distance_alone(x64):
    query, key, _ = draw()

    def products(shift):
        places = np.tile(np.arange(T) + shift, (B, 1))
        return jnp.einsum("BTNK,BSNK->BNTS", rotate(query, places), rotate(key, places))

    np.testing.assert_allclose(products(0), products(1000), rtol=1e-9, atol=1e-10)
    assert np.abs(products(0) - jnp.einsum("BTNK,BSNK->BNTS", query, key)).max() > 0.1
    with pytest.raises(ValueError, match="even width, not 3"):
        rotate(query[..., :3])
