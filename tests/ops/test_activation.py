import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from jaxnets import ops

X = np.concatenate([np.linspace(-9, 9, 181), [-1e30, 1e30, 0.0, -0.0]])


def by_hand(x):
    return np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def test_values_by_hand(x64):
    np.testing.assert_allclose(ops.gelu(jnp.asarray(X)), by_hand(X), rtol=1e-13, atol=1e-14)
    single = ops.gelu(jnp.asarray(X, jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, by_hand(X.astype(np.float32)), rtol=3e-7, atol=1e-6)
    assert bool(jnp.isnan(ops.gelu(jnp.float32(jnp.nan))))


def test_the_plain_form_agrees_and_is_jax_nn(x64):
    x = jnp.asarray(X)
    fast = jax.vjp(ops.gelu, x)[1](jnp.ones_like(x))[0]
    with ops.plain():
        np.testing.assert_array_equal(ops.gelu(x), jax.nn.gelu(x, approximate=False))
        plain = jax.vjp(lambda x: ops.gelu(x), x)[1](jnp.ones_like(x))[0]
    np.testing.assert_allclose(fast[:181], plain[:181], atol=1e-13)


def test_derivatives(x64):
    check_grads(ops.gelu, (jnp.linspace(-4.0, 4.0, 17),), order=2, modes=["fwd", "rev"])
    assert np.isfinite(jax.vmap(jax.grad(ops.gelu))(jnp.asarray(X))).all()


def test_bfloat16_is_computed_in_float32():
    x = jnp.linspace(-3, 3, 33).astype(jnp.bfloat16)
    y = ops.gelu(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, ops.gelu(x.astype(jnp.float32)).astype(jnp.bfloat16))
