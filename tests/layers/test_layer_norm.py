import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxnets.layers import LayerNorm, layer_norm


def draw(shape=(3, 4, 7), dtype=np.float64):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * 3 + 1, dtype)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 4, 1), (0, 5)])
def test_the_values_by_hand(shape, x64):
    x = np.asarray(draw(shape))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.25)
    out = layer_norm(jnp.asarray(x), epsilon=0.25)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parity
def test_pytorch_agrees(x64):
    import torch

    x = draw()
    rng = np.random.default_rng(1)
    scale, bias = rng.normal(size=7), rng.normal(size=7)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    theirs = torch.nn.LayerNorm(7, dtype=torch.float64)  # with the epsilon that it has
    theirs.weight.data, theirs.bias.data = torch.tensor(scale), torch.tensor(bias)
    x_torch = torch.tensor(np.asarray(x)).requires_grad_()
    expected = theirs(x_torch)
    out, pull = jax.vjp(lambda params, x: LayerNorm().apply({"params": params}, x), params, x)
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    along = rng.normal(size=x.shape)
    expected.backward(torch.tensor(along))
    grads, x_grad = pull(jnp.asarray(along))
    np.testing.assert_allclose(x_grad, x_torch.grad.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads["scale"], theirs.weight.grad.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads["bias"], theirs.bias.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_finite_differences(x64):
    check_grads(jax.jit(layer_norm), (draw(),), order=2)


def test_a_large_mean_costs_no_digits():
    x = np.random.default_rng(0).normal(size=(4, 64))
    out = layer_norm(jnp.asarray(x + 1000, jnp.float32))
    shifted = np.asarray(x + 1000, np.float32).astype(np.float64)  # as it was rounded
    expected = (shifted - shifted.mean(-1, keepdims=True)) / shifted.std(-1, keepdims=True)
    np.testing.assert_allclose(out, expected, atol=2e-4)


def test_a_constant_row_is_zero():
    x = jnp.full((2, 5), 3.0)
    assert (layer_norm(x) == 0).all()
    assert np.isfinite(jax.grad(lambda x: (layer_norm(x) ** 2).sum())(x)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_are_in_float32(dtype):
    x = draw((3, 512), dtype)
    layer = LayerNorm()
    variables = layer.init(jax.random.key(0), x)
    assert jax.tree.map(lambda x: str(x.dtype), variables["params"]) == dict.fromkeys(
        ("scale", "bias"), "float32"
    )
    out = layer.apply(variables, x)
    assert out.dtype == dtype
    exact = layer_norm(x.astype(jnp.float32))
    np.testing.assert_array_equal(out, exact.astype(dtype))
    assert LayerNorm(dtype=jnp.float32).apply(variables, x).dtype == jnp.float32


def test_a_layer_without_bias():
    x = draw((2, 5), np.float32)
    variables = LayerNorm(use_bias=False).init(jax.random.key(0), x)
    assert set(variables["params"]) == {"scale"}
    np.testing.assert_array_equal(LayerNorm(use_bias=False).apply(variables, x), layer_norm(x))
