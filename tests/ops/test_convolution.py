import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnets import ops
from jaxnets.layers import conv2d
from jaxnets.ops.convolution import convolve_tiles

QUICK = {"xla_backend_optimization_level": 0}  # most of the time goes to the compiler


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


# One of each form that the layer's own way in chooses: shapes of x and kernel, and arguments.
FORMS = {
    "tiles of 2x2": ((2, 9, 11, 3), (5, 5, 3, 6), {"padding": "SAME"}),
    "tiles of 1x2": ((2, 9, 11, 3), (3, 3, 3, 8), {"padding": 1}),
    "tiles of 1x1": ((2, 9, 11, 3), (2, 2, 3, 4), {}),
    "a small image": ((2, 2, 2, 9), (3, 3, 9, 4), {"padding": 1}),
    "one pixel": ((2, 7, 5, 9), (1, 1, 9, 4), {}),
    "one pixel, strided": ((2, 7, 5, 9), (1, 1, 9, 4), {"strides": (2, 3)}),
    "few, strided": ((2, 9, 11, 3), (5, 5, 3, 6), {"strides": (2, 2), "padding": 2}),
    "patches": ((2, 8, 12, 3), (4, 4, 3, 6), {"strides": (4, 4)}),
    "wide": ((2, 9, 11, 9), (3, 3, 9, 4), {"padding": "SAME"}),
    "wide, strided": ((2, 9, 11, 9), (3, 3, 9, 4), {"strides": (2, 2), "padding": 1}),
    "dilated": ((2, 9, 11, 3), (3, 3, 3, 4), {"dilation": (2, 3), "padding": "SAME"}),
    "depthwise": ((2, 9, 11, 9), (3, 3, 1, 9), {"groups": 9, "padding": 1}),
    "depthwise, strided": ((2, 9, 11, 9), (3, 3, 1, 18), {"groups": 9, "strides": (2, 2), "padding": 1}),
    "groups": ((2, 9, 11, 8), (3, 3, 4, 6), {"groups": 2, "padding": 1}),
    "bundles of groups": ((2, 5, 6, 35), (3, 3, 5, 14), {"groups": 7, "padding": 1}),
}


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_fast_and_plain_form_agree_over_odd_shapes(data):
    draw = data.draw
    window = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)), "window")
    strides = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "strides")
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]), "dilation")
    pads = draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2), "pads")
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    size = [max(1, k - sum(p)) + draw(st.integers(0, 6)) for k, p in zip(reach, pads, strict=True)]
    groups = draw(st.integers(1, 4), "groups")
    channels = groups * draw(st.sampled_from([1, 1, 2, 3, 9]), "channels of a group")
    features = groups * draw(st.integers(1, 3), "features of a group")
    arguments = {"strides": strides, "padding": pads, "dilation": dilation, "groups": groups}
    with jax.enable_x64(True):
        check_forms((2, *size, channels), (*window, channels // groups, features), arguments)


def check_forms(x_shape, kernel_shape, arguments, dtype="float64", bound=1e-12):
    """Values, both gradients and a derivative along a direction, fast against plain."""
    arrays = draw_arrays(2, x_shape, kernel_shape, x_shape, kernel_shape)
    x, kernel, *tangents = (a.astype(dtype) for a in arrays)

    def everything(x, kernel, *tangents):
        def weighted(x, kernel):
            y = conv2d(x, kernel, **arguments)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=dtype).reshape(y.shape))), y

        (_, y), grads = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(x, kernel)
        _, dot = jax.jvp(lambda *a: conv2d(*a, **arguments), (x, kernel), tuple(tangents))
        return y, *grads, dot

    found = jax.jit(everything, compiler_options=QUICK)(x, kernel, *tangents)
    with ops.plain():
        expected = jax.jit(lambda *a: everything(*a), compiler_options=QUICK)(x, kernel, *tangents)
    for fast, slow in zip(found, expected, strict=True):
        assert fast.dtype == dtype
        assert fast.shape == slow.shape
        slow = np.asarray(slow, np.float64)
        np.testing.assert_allclose(
            np.asarray(fast, np.float64), slow, rtol=0, atol=bound * max(np.abs(slow).max(initial=0), 1)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 3e-6), ("bfloat16", 3e-2)])
def test_every_form_in_every_dtype(form, dtype, bound, x64):
    check_forms(*FORMS[form], dtype=dtype, bound=bound)


@pytest.mark.long
def test_a_depthwise_convolution_adds_in_float32():
    """In bfloat16 a sum of ones would stop at 256."""
    x, kernel = jnp.ones((2, 40, 40, 3), jnp.bfloat16), jnp.ones((1, 1, 1, 3), jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda k: jnp.sum(conv2d(x, k, groups=3).astype(jnp.float32))))(kernel)
    np.testing.assert_allclose(np.asarray(grad, np.float32), 3200, rtol=2**-8)
    wide = conv2d(
        jnp.ones((1, 20, 20, 2), jnp.bfloat16), jnp.ones((20, 20, 1, 2), jnp.bfloat16), groups=2
    )
    np.testing.assert_allclose(np.asarray(wide, np.float32), 400, rtol=2**-8)


def primitives(fun, *args):
    return {eqn.primitive.name for eqn in jax.make_jaxpr(fun)(*args).eqns}


# XLA's own, or made of it.
OWN = ("wide", "wide, strided", "few, strided", "groups", "bundles of groups")


def test_plain_form_is_a_convolution_and_fast_one_a_product():
    for name, (x_shape, kernel_shape, arguments) in FORMS.items():
        arrays = jnp.zeros(x_shape), jnp.zeros(kernel_shape)
        found = primitives(lambda *a, kw=arguments: conv2d(*a, **kw), *arrays)
        is_own = name in OWN
        assert ("conv_general_dilated" in found) == is_own, name
        with ops.plain():
            found = primitives(lambda *a, kw=arguments: conv2d(*a, **kw), *arrays)
        assert found == {"conv_general_dilated"}, name


@pytest.mark.parametrize("form", FORMS)
def test_transformations(form, x64):
    x_shape, kernel_shape, arguments = FORMS[form]
    xs, kernel = draw_arrays(3, (3, *x_shape), kernel_shape)

    def conv(x, kernel):
        return conv2d(x, kernel, **arguments)

    def squares(kernel):
        each = lax.map(lambda x: conv(x, kernel), xs)
        return jnp.sum(each**2), each

    with ops.plain():
        (_, expected), grad = jax.jit(jax.value_and_grad(squares, has_aux=True))(kernel)
    bound = 1e-11 * np.abs(expected).max()
    mapped = jax.jit(jax.vmap(conv, (0, None)))(xs, kernel)
    np.testing.assert_allclose(mapped, expected, rtol=0, atol=bound)

    def total(kernel):
        @jax.checkpoint
        def body(carry, x):
            y = conv(x, kernel)
            return carry + jnp.sum(y**2), y

        return lax.scan(body, 0.0, xs)

    (_, scanned), found = jax.jit(jax.value_and_grad(total, has_aux=True))(kernel)
    np.testing.assert_allclose(scanned, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(found, grad, rtol=0, atol=1e-11 * np.abs(grad).max())

    def curvature(x, kernel, *tangents):
        slope = lambda *a: jax.jvp(lambda *a: jnp.sum(jnp.sin(conv(*a))), a, tangents)[1]  # noqa: E731
        return jax.grad(slope, (0, 1))(x, kernel)

    tangents = draw_arrays(5, x_shape, kernel_shape)
    bends = jax.jit(curvature)(xs[0], kernel, *tangents)
    with ops.plain():
        expected = jax.jit(lambda *a: curvature(*a))(xs[0], kernel, *tangents)
    for ours, theirs in zip(bends, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())


@pytest.mark.parametrize("form", FORMS)
def test_the_batch_over_eight_devices(form, x64):
    x_shape, kernel_shape, arguments = FORMS[form]
    x, kernel = draw_arrays(4, (8, *x_shape[1:]), kernel_shape)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))

    def value_and_grad(x, kernel):
        return jax.value_and_grad(lambda k: jnp.sum(conv2d(x, k, **arguments) ** 2))(kernel)

    program = jax.jit(value_and_grad, in_shardings=(rows, NamedSharding(mesh, P())))
    spread = program(jax.device_put(x, rows), kernel)
    alone = jax.jit(lambda *a: value_and_grad(*a))(x, kernel)
    for ours, theirs in zip(spread, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())
