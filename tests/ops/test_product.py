"""Biases whose gradients are sums of float32, whatever the computation is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.layers import GRU, LSTM, Conv, Linear
from jaxnets.models import gpt
from jaxnets.ops import add_bias

LAYERS = {
    "linear": (Linear((8,)), (64, 100, 8)),
    "heads": (Linear((2, 4)), (64, 100, 8)),
    "conv": (Conv(8, (3, 3)), (16, 22, 22, 3)),
    "lstm": (LSTM(16), (64, 100, 8)),
    "gru": (GRU(16), (64, 100, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_biases_in_bfloat16(name):
    """Sums of thousands of numbers of one sign, as where a layer's every output is wrong alike."""
    layer, shape = LAYERS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    params = layer.init(jax.random.key(0), x)

    def gradients(dtype):
        def total(params):
            y = layer.clone(dtype=dtype).apply(params, x)
            return jnp.sum((y[0] if isinstance(y, tuple) else y).astype(jnp.float32))

        return jax.grad(total)(params)

    expected, found = (
        {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(dtype))
        }
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    biases = [path for path in expected if "bias" in path]
    assert biases
    for path in biases:
        error = np.linalg.norm(found[path] - expected[path]) / np.linalg.norm(expected[path])
        assert error < 0.02, path  # 0.24 to 0.44 with sums of bfloat16


def test_gradients_of_positions_in_bfloat16():
    model = gpt(7, max_length=4, num_layers=0, num_heads=1, width=8, returns_hidden=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2000, 4)))
    params = model.init(jax.random.key(0), tokens)
    along = jnp.arange(8.0)

    def gradient(dtype):
        fn = lambda p: jnp.sum(model.clone(dtype=dtype).apply(p, tokens) @ along)  # noqa: E731
        return jax.grad(fn)(params)["params"]["position_embedding"]["embedding"]

    expected, found = gradient(None), gradient(jnp.bfloat16)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_dtypes():
    bias = jnp.arange(3.0)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert add_bias(jnp.ones((2, 3), dtype), bias).dtype == dtype
    np.testing.assert_array_equal(add_bias(jnp.ones((2, 2, 3)), jnp.ones((2, 3))), np.full((2, 2, 3), 2))
