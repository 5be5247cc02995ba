import contextlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import ops
from jaxnets.layers import Embedding, Linear, embed
from jaxnets.ops import partition


def test_rows_of_a_table_and_nan_for_none():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    indices = jnp.array([[0, 4], [2, 2]])
    for fn in (embed, jax.jit(embed)):
        np.testing.assert_array_equal(fn(table, indices), np.asarray(table)[np.asarray(indices)])
        assert np.isnan(fn(table, jnp.array([-1, 5, 2**31 - 1, -(2**31)]))).all()
    with pytest.raises(ValueError, match="integers, not float32"):
        embed(table, jnp.zeros(2))


def test_the_gradient_adds_up_over_places():
    table = jnp.zeros((4, 2))
    indices = jnp.array([1, 3, 1, 9])
    along = jnp.arange(1.0, 9.0).reshape(4, 2)
    grad = jax.grad(lambda table: jnp.sum(embed(table, indices)[:3] * along[:3]))(table)
    np.testing.assert_array_equal(grad, [[0, 0], [6, 8], [0, 0], [3, 4]])


def test_products_with_every_row():
    layer = Embedding(6, 4)
    variables = layer.init(jax.random.key(0), jnp.array([0]))
    (table,) = jax.tree.leaves(variables)
    assert (table.shape, table.dtype) == ((6, 4), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    logits = layer.apply(variables, x, method="attend")
    np.testing.assert_allclose(logits, np.asarray(x) @ np.asarray(table).T, rtol=1e-5, atol=1e-7)
    half = Embedding(6, 4, dtype=jnp.bfloat16)
    assert half.apply(variables, x, method="attend").dtype == jnp.bfloat16
    assert half.apply(variables, jnp.array([1])).dtype == jnp.bfloat16


def test_a_table_of_another_size_is_refused():
    layer = Embedding(5, 2)
    for size in (4, 6):
        table = {"params": {"embedding": jnp.ones((size, 2))}}
        with pytest.raises(flax.errors.ScopeParamShapeError):
            layer.apply(table, jnp.array([0]))
        with partition.some_rows():  # those that a batch uses
            assert layer.apply(table, jnp.array([0])).shape == (1, 2)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(
    ("features", "num_inputs", "equation"),
    [((2, 5), 1, "BTNK,KXY->BTNXY"), ((6,), 2, "BTNK,NKX->BTX"), ((6,), 4, "BTNK,BTNKX->X")],
)
def test_a_linear_map_of_the_last_axes(features, num_inputs, equation, use_bias, x64):
    layer = Linear(features, num_inputs, use_bias)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 4)))
    params = layer.init(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    params = {k: v + 0.5 for k, v in params.items()}
    expected = np.einsum(equation, x, params["kernel"])
    if use_bias:
        assert params["bias"].ndim == 1
        expected = expected + np.asarray(params["bias"]).reshape(features)
    with contextlib.ExitStack() as stack:
        for form in (contextlib.nullcontext, ops.plain):
            stack.enter_context(form())
            np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-12)
