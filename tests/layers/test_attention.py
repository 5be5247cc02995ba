import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxnets import ops
from jaxnets.layers import KeyValues, MultiHeadAttention, SelfAttention, attention
from jaxnets.ops.partition import activation_rules

B, T, N, K = 3, 6, 2, 5


def draw(dtype=np.float64, length=T, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, length, N, K)), dtype) for _ in range(3)]


def masks(seed=1):
    """Keys that are seen: in the middle, none, all."""
    mask = np.random.default_rng(seed).random((B, T)) < 0.6
    mask[1], mask[2] = False, True
    assert 0 < mask[0].sum() < T
    return jnp.asarray(mask)


def by_hand(query, key, value, is_causal=False, mask=None):
    """One query of one head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = np.ones(key.shape[1], bool) if mask is None else np.array(mask[b])
        if is_causal:
            seen[t + 1 :] = False
        if seen.any():
            weights = np.exp(key[b, seen, n] @ query[b, t, n] / np.sqrt(query.shape[3]))
            out[b, t, n] = weights @ value[b, seen, n] / weights.sum()
    return out


every_form = pytest.mark.parametrize("is_causal", [False, True])
with_and_without_mask = pytest.mark.parametrize("has_mask", [False, True])


@every_form
@with_and_without_mask
def test_the_values_by_hand(is_causal, has_mask, x64):
    mask = masks() if has_mask else None
    query, key, value = draw()
    out = attention(query, key, value, is_causal=is_causal, mask=mask)
    assert out.dtype == jnp.float64
    expected = by_hand(query, key, value, is_causal, mask)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    compiled = jax.jit(partial(attention, is_causal=is_causal))(query, key, value, mask=mask)
    np.testing.assert_allclose(compiled, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_keys", [1, 4, 9])
def test_another_number_of_keys_than_queries(num_keys, x64):
    query, (_, key, value) = draw()[0], draw(length=num_keys)
    expected = by_hand(query, key, value)
    np.testing.assert_allclose(attention(query, key, value), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask_axes", [0, 2, 3])
@pytest.mark.parametrize("length", [64, 65, 150, 600])
def test_blocks_of_a_long_causal_sequence_are_the_whole(length, mask_axes, x64):
    """On a CPU; 600 places are more than eight blocks of the shortest kind."""
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.normal(size=(2, length, 1, 2))) for _ in range(4)]
    shape = {0: None, 2: (2, length), 3: (2, length, length)}[mask_axes]
    mask = None if shape is None else jnp.asarray(rng.random(shape) < 0.5)

    def of(query, key, value, weights):
        out = attention(query, key, value, is_causal=True, mask=mask)
        return jnp.sum(weights * out), out

    def derivatives():
        return jax.jit(jax.value_and_grad(partial(of), (0, 1, 2), has_aux=True))(*arrays)

    with ops.plain():
        (_, expected), grads = derivatives()
    (_, found), others = derivatives()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(others, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    products = str(jax.make_jaxpr(of)(*arrays)).count("dot_general")
    assert products == 2 * {64: 1, 65: 2, 150: 3, 600: 8}[length]


@pytest.mark.parametrize("mask_axes", [0, 2, 3])
@pytest.mark.parametrize(("batch", "rows"), [(4, 4), (6, 3), (8, 4), (7, 7)])
def test_some_rows_at_once_are_all_of_them(batch, rows, mask_axes, x64, monkeypatch):
    """On a CPU; seven rows have no equal parts of two to four."""
    monkeypatch.setattr(sys.modules["jaxnets.layers.attention"], "_IN_CACHE", 4 * T * T * N)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.normal(size=(batch, T, N, K))) for _ in range(4)]
    shape = {0: None, 2: (batch, T), 3: (batch, T, T)}[mask_axes]
    mask = None if shape is None else jnp.asarray(rng.random(shape) < 0.5)

    def of(query, key, value, weights):
        out = attention(query, key, value, is_causal=True, mask=mask)
        return jnp.sum(weights * out**2), out

    def derivatives(*arrays):
        out = jax.value_and_grad(of, (0, 1, 2), has_aux=True)(*arrays)
        return out, jax.jvp(jax.grad(lambda *x: of(*x)[0]), arrays, arrays)

    with ops.plain():
        expected = jax.jit(derivatives)(*arrays)
    found = jax.jit(partial(derivatives))(*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    scores = re.findall(r"f64\[(\d+),2,6,6\] = dot_general", str(jax.make_jaxpr(of)(*arrays)))
    assert scores == [str(rows)]
    with activation_rules(jax.make_mesh((2,), ("data",)), {}):
        whole = str(jax.make_jaxpr(partial(of))(*arrays))
    assert "scan" not in whole  # spread over devices, no part of the rows is on all of them


def test_rows_that_a_caller_has_spread_stay_where_they_are():
    """Under a `jit` of one's own, which says nothing to the layer."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("data"))
    arrays = [jax.ShapeDtypeStruct((64, 256, 8, 4), np.float32, sharding=where)] * 3
    compiled = jax.jit(attention).lower(*arrays).compile()
    assert compiled.output_shardings.is_equivalent_to(where, 4)
    assert "all-gather" not in compiled.as_text()


def test_dropout_and_a_cache_are_refused():
    layer, x = SelfAttention(1, is_causal=True, dropout_rate=0.5), jnp.ones((1, 2, 4))
    cache = KeyValues.empty(1, 2, 1, 4, jnp.float32)
    options = {"cache": cache, "places": jnp.arange(2)[None]}
    params = layer.init(jax.random.key(0), x, train=False)
    layer.apply(params, x, train=False, **options)
    with pytest.raises(ValueError, match="has no dropout"):
        layer.apply(params, x, train=True, **options)


def test_weights_that_nobody_asks_for_are_not_made_at_once():
    """A causal layer's, of which most blocks are half empty; asked for, they are the same ones."""
    layer, x = MultiHeadAttention(4, 2, is_causal=True), jnp.ones((1, 150, 4))
    params = layer.init(jax.random.key(0), x, x)
    found = layer.apply(params, x, x)
    expected, noted = layer.apply(params, x, x, mutable=["intermediates"])
    assert noted["intermediates"]["weights"][0].shape == (1, 2, 150, 150)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    made = str(jax.make_jaxpr(layer.apply)(params, x, x))
    assert "[1,2,150,150]" not in made


def test_a_single_place_sees_itself():
    query, key, value = draw(np.float32, length=1)
    np.testing.assert_array_equal(attention(query, key, value, is_causal=True), value)


@pytest.mark.parity
@every_form
@with_and_without_mask
def test_pytorch_agrees(is_causal, has_mask, x64):
    import torch

    query, key, value = draw()
    # Where a query sees nothing, PyTorch has had several answers.
    mask = masks().at[1, 0].set(True).at[:, 0].set(True) if has_mask else None
    seen = np.ones((B, N, T, T), bool) if mask is None else np.tile(mask[:, None, None], (1, N, T, 1))
    seen &= np.tril(np.ones((T, T), bool))[None, None] if is_causal else True

    def forward(*arrays):
        return attention(*arrays, is_causal=is_causal, mask=mask)

    theirs = [torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *theirs, attn_mask=torch.tensor(np.asarray(seen))
    ).transpose(1, 2)
    out, pull = jax.vjp(forward, query, key, value)
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    along = np.random.default_rng(2).normal(size=out.shape)
    grads = torch.autograd.grad(expected, theirs, torch.tensor(along))
    for ours, grad in zip(pull(jnp.asarray(along)), grads, strict=True):
        np.testing.assert_allclose(ours, grad.transpose(1, 2).numpy(), rtol=1e-9, atol=1e-12)


def test_finite_differences(x64):
    mask = masks()
    check_grads(jax.jit(partial(attention, is_causal=True, mask=mask)), draw(), order=2)


@partial(jax.jit, static_argnames="is_causal")
def loss_and_grads(query, key, value, is_causal, mask):
    along = jnp.asarray(np.random.default_rng(3).normal(size=query.shape), query.dtype)

    def loss(*arrays):
        return jnp.sum(attention(*arrays, is_causal=is_causal, mask=mask) * along)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)


@every_form
@pytest.mark.parametrize("content", [0.0, -7.0, 1e30, -1e38])
def test_what_a_masked_place_holds_is_without_effect(is_causal, content):
    query, key, value = draw(np.float32)
    mask = masks()
    clean = loss_and_grads(query, key, value, is_causal, mask)
    hidden = ~mask[:, :, None, None]
    key, value = (jnp.where(hidden, content, x) for x in (key, value))
    dirty = loss_and_grads(query, key, value, is_causal, mask)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    _, (query_grad, key_grad, value_grad) = dirty
    for grad in (key_grad, value_grad):
        assert (np.asarray(grad)[~np.asarray(mask)] == 0).all()
        assert (np.asarray(grad)[np.asarray(mask)][:-1] != 0).any()
    assert (query_grad[1] == 0).all()
    assert (query_grad[0] != 0).any()


def test_a_query_that_sees_nothing_gets_zero():
    query, key, value = draw(np.float32)
    mask = jnp.ones((B, T), bool).at[:, :2].set(False)  # padding on the left
    with jax.debug_nans(True):  # nor is there any NaN on the way
        out = attention(query, key, value, is_causal=True, mask=mask)
    assert (out[:, :2] == 0).all()
    assert (out[:, 2:] != 0).all()
    np.testing.assert_array_equal(out[:, 2], value[:, 2])


def test_nothing_of_the_future_is_seen():
    query, key, value = draw(np.float32)

    @jax.jit
    def pull(along):
        return jax.vjp(partial(attention, is_causal=True), query, key, value)[1](along)

    for t in range(T):
        along = np.zeros_like(query)
        along[:, t] = 1
        grads = pull(along)
        for grad in grads:
            assert (np.asarray(grad)[:, t + 1 :] == 0).all()
        assert (np.asarray(grads[2])[:, : t + 1] != 0).all()


@pytest.mark.parametrize("size", [0.0, 1e4, 1e15])
def test_extreme_scores(size):
    query, key, value = draw(np.float32)
    loss, grads = loss_and_grads(size * query, size * key, value, True, masks())
    assert np.isfinite(loss)
    for grad in grads:
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_softmax_is_in_float32(dtype):
    rounded = draw(dtype)
    out = attention(*rounded, is_causal=True)
    assert out.dtype == dtype
    exact = attention(*(x.astype(np.float32) for x in rounded), is_causal=True)
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=4 * float(jnp.finfo(dtype).eps))
    text = str(jax.make_jaxpr(partial(attention, is_causal=True))(*rounded))
    assert re.findall(r":(\w+)\[[\d,]+\] = exp", text) == ["f32"]
    grads = jax.grad(lambda *xs: attention(*xs).astype(np.float32).sum(), argnums=(0, 1, 2))(*rounded)
    assert {grad.dtype for grad in grads} == {np.dtype(dtype)}


def test_dropout_is_of_the_weights():
    query, key, value = draw(np.float32)

    def drop(weights_BNTS):
        assert weights_BNTS.shape == (B, N, T, T)
        np.testing.assert_allclose(weights_BNTS.sum(3), 1, rtol=1e-6)
        return weights_BNTS.at[:, :, :, 0].set(0)

    out = attention(query, key, value, dropout_fn=drop)
    first = attention(query, key, value.at[:, 0].set(100.0), dropout_fn=drop)
    np.testing.assert_array_equal(out, first)


def test_what_cannot_be():
    query, key, value = draw(np.float32)
    with pytest.raises(ValueError, match="as many keys as queries, not 6 and 4"):
        attention(query[:, :4], key, value, is_causal=True)
    for wrong in (
        (query, key[:, :4], value),
        (query, key[:1], value[:1]),
        (query, key, value[:, :, :1]),
    ):
        with pytest.raises(AssertionError, match="shape"):
            attention(*wrong)
    with pytest.raises(AssertionError, match="shape"):
        attention(query, key, value, mask=jnp.ones((B, T - 1), bool))
    with pytest.raises(ValueError, match="a width of 10 doesn't split into 4 heads"):
        SelfAttention(4).init(jax.random.key(0), jnp.ones((1, 2, 10)), train=False)


def test_the_layer_is_its_projections_around_the_function(x64):
    layer = SelfAttention(N, is_causal=True)
    x_BTD = jnp.asarray(np.random.default_rng(5).normal(size=(B, T, N * K)))
    params = jax.eval_shape(partial(layer.init, train=False), jax.random.key(0), x_BTD)["params"]
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), params)
    into = {"kernel": ((N * K, N, K), "float32"), "bias": ((N * K,), "float32")}
    out = {"kernel": ((N, K, N * K), "float32"), "bias": ((N * K,), "float32")}
    assert shapes == {"query": into, "key": into, "value": into, "out": out}
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)

    def project(name):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        flat = np.asarray(x_BTD) @ np.reshape(kernel, (N * K, -1)) + np.asarray(bias)[None, None]
        return flat.reshape(B, T, N, K)

    mask = masks()
    y = by_hand(project("query"), project("key"), project("value"), True, mask)
    expected = y.reshape(B, T, -1) @ np.reshape(params["out"]["kernel"], (N * K, -1))
    expected += np.asarray(params["out"]["bias"])[None, None]
    result = layer.apply({"params": params}, x_BTD, train=True, mask=mask)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_dropout_of_the_layer_belongs_to_the_row():
    layer = SelfAttention(N, dropout_rate=0.5)
    x_BTD = jnp.asarray(np.random.default_rng(5).normal(size=(B, T, N * K)), jnp.float32)
    rng, rows = np.random.default_rng(6), np.array([5, 9, 7])
    variables = jax.eval_shape(partial(layer.init, train=False), jax.random.key(0), x_BTD)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), variables)

    @partial(jax.jit, static_argnames="train")
    def run(x_BTD, rows, train=True):
        rngs = {"dropout": jax.random.key(1)}
        return layer.apply(variables, x_BTD, train=train, rows=rows, rngs=rngs)

    out = run(x_BTD, rows)
    np.testing.assert_allclose(run(x_BTD[::-1], rows[::-1]), out[::-1], rtol=1e-5, atol=1e-5)
    assert np.abs(run(x_BTD, rows + 1) - out).max() > 0.01
    assert np.abs(run(x_BTD, rows, train=False) - out).max() > 0.01
