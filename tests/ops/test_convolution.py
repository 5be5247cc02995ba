import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

from jaxnets import ops
from jaxnets.layers import conv2d
from jaxnets.ops.convolution import convolve_tiles


def reference(x, kernel, pads):
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def draw_arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_tiles_equal_the_convolution_and_its_gradients(data):
    window = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)), "window")
    pads = data.draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2), "pads")
    size = [max(1, k - sum(p)) + data.draw(st.integers(0, 6)) for k, p in zip(window, pads, strict=True)]
    tile = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "tile")
    channels, features = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)), "channels")
    with jax.enable_x64(True):
        x, kernel = draw_arrays(0, (2, *size, channels), (*window, channels, features))
        expected, pull_expected = jax.vjp(jax.jit(lambda *a: reference(*a, pads)), x, kernel)
        found, pull = jax.vjp(jax.jit(lambda *a: convolve_tiles(*a, pads, tile)), x, kernel)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        (cotangent,) = draw_arrays(1, expected.shape)
        for ours, theirs in zip(pull(cotangent), pull_expected(cotangent), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


# What a kernel and a number of channels choose: every form there is, by the layer's own way in.
CASES = [(5, 3, 6), (5, 6, 16), (3, 3, 8), (2, 3, 4), (1, 5, 2), (3, 8, 8)]


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize(("side", "channels", "features"), CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fast_and_plain_form_agree(side, channels, features, strides, dtype, x64):
    arrays = draw_arrays(2, (2, 9, 11, channels), (side, side, channels, features))
    x, kernel = (a.astype(dtype) for a in arrays)
    bound = 1e-12 if dtype == "float64" else 2e-6

    def value_and_grads(x, kernel):
        def loss(x, kernel):
            y = conv2d(x, kernel, strides=strides, padding="SAME")
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=dtype).reshape(y.shape))), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    (_, y), grads = jax.jit(value_and_grads)(x, kernel)
    with ops.plain():
        (_, y_plain), grads_plain = jax.jit(lambda *a: value_and_grads(*a))(x, kernel)
    for fast, slow in zip((y, *grads), (y_plain, *grads_plain), strict=True):
        assert fast.dtype == dtype
        np.testing.assert_allclose(fast, slow, rtol=0, atol=bound * np.abs(slow).max())


def primitives(fun, *args):
    return {eqn.primitive.name for eqn in jax.make_jaxpr(fun)(*args).eqns}


def test_plain_form_is_a_convolution_and_fast_one_a_product():
    x, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((5, 5, 3, 6))
    assert "dot_general" in primitives(lambda *a: conv2d(*a), x, kernel)
    with ops.plain():
        assert primitives(lambda *a: conv2d(*a), x, kernel) == {"conv_general_dilated"}
    wide = jnp.zeros((1, 8, 8, 64)), jnp.zeros((3, 3, 64, 64))
    assert primitives(lambda *a: conv2d(*a), *wide) == {"conv_general_dilated"}
    small = jnp.zeros((1, 2, 2, 64)), jnp.zeros((3, 3, 64, 64))
    assert "dot_general" in primitives(lambda *a: conv2d(*a, padding=1), *small)


def test_transformations(x64):
    x, kernel, tangent = draw_arrays(3, (3, 2, 7, 6, 3), (5, 5, 3, 4), (3, 2, 7, 6, 3))
    conv = jax.jit(lambda x, kernel: conv2d(x, kernel))
    mapped = jax.vmap(conv, (0, None))(x, kernel)
    for i in range(3):
        np.testing.assert_allclose(mapped[i], conv(x[i], kernel), atol=1e-12)
    _, out = jax.jvp(conv, (x[0], kernel), (tangent[0], jnp.zeros_like(kernel)))
    np.testing.assert_allclose(out, conv(tangent[0], kernel), atol=1e-12)  # it is linear
    check_grads(lambda *a: conv(*a) ** 2, (x[0], kernel), order=2, atol=1e-5, rtol=1e-5)


def test_it_works_inside_a_scan(x64):
    xs, kernel = draw_arrays(4, (4, 2, 6, 6, 3), (5, 5, 3, 4))

    def total(kernel):
        return lax.scan(lambda c, x: (c + jnp.sum(conv2d(x, kernel) ** 2), None), 0.0, xs)[0]

    ours = jax.jit(jax.grad(total))(kernel)
    with ops.plain():
        plain = jax.grad(lambda k: sum(jnp.sum(conv2d(x, k) ** 2) for x in xs))(kernel)
    np.testing.assert_allclose(ours, plain, atol=1e-10)
