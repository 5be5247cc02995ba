from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnets import layers, ops, train
from jaxnets.ops import onednn
from jaxnets.ops.convolution import convolve
from jaxnets.train import program_cache

pytestmark = pytest.mark.skipif(not onednn.is_known(), reason="this jaxlib hasn't the call")
CALL = "__onednn$convolution"
BOUND = 1e-5


@pytest.fixture(autouse=True)
def no_cache():
    """JAX's cache of programs, which the tests have on, would have the call left out."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def draw_arrays(seed, *shapes, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def exact(x, kernel, strides, pads):
    """In float64, as a product of what lies under each place of the kernel."""
    with jax.enable_x64(True):
        return convolve(x.astype(jnp.float64), kernel.astype(jnp.float64), strides, pads)


def assert_near(found, expected, bound=BOUND):
    expected = np.asarray(expected, np.float64)
    scale = max(np.abs(expected).max(initial=0), 1)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound * scale)


def value_and_pulls(conv, x, kernel, cotangent):
    value, pull = jax.vjp(conv, x, kernel)
    return value, *pull(cotangent.astype(value.dtype))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_and_gradients_over_odd_shapes(data):
    draw = data.draw
    window = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)), "window")
    strides = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "strides")
    pads = [tuple(draw(st.integers(0, k - 1)) for _ in range(2)) for k in window]
    size = [max(1, k - sum(p)) + draw(st.integers(0, 9)) for k, p in zip(window, pads, strict=True)]
    channels = draw(st.sampled_from([2, 3, 9, 64, 130]), "channels")
    features = draw(st.sampled_from([1, 5, 16, 70]), "features")
    batch = draw(st.sampled_from([1, 2, 17, 35]), "batch")
    x, kernel = draw_arrays(0, (batch, *size, channels), (*window, channels, features))
    conv = partial(onednn.convolve, strides=strides, pads=pads)
    (cotangent,) = draw_arrays(1, jax.eval_shape(conv, x, kernel).shape)
    assert onednn.fits(x, kernel, pads)
    program = jax.jit(partial(value_and_pulls, conv))
    assert CALL in program.lower(x, kernel, cotangent).as_text()
    with jax.enable_x64(True):
        reference = partial(convolve, strides=strides, pads=pads)
        args = [a.astype(jnp.float64) for a in (x, kernel, cotangent)]
        expected = jax.jit(partial(value_and_pulls, reference))(*args)
    for ours, theirs in zip(program(x, kernel, cotangent), expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == jnp.float32
        assert_near(ours, theirs)


CASES = {
    "a wide image": ((3, 12, 11, 16), (3, 3, 16, 24), (1, 1), ((1, 1), (1, 1))),
    "short rows": ((6, 5, 4, 16), (3, 3, 16, 24), (1, 1), ((1, 1), (1, 1))),
    "strides": ((3, 9, 12, 16), (3, 3, 16, 24), (2, 2), ((1, 1), (1, 1))),
    "strides over nothing": ((3, 9, 9, 16), (1, 2, 16, 24), (3, 3), ((0, 0), (1, 0))),
    "many images": ((35, 8, 8, 64), (3, 3, 64, 24), (1, 1), ((1, 1), (1, 1))),
}


@pytest.mark.parametrize("case", CASES)
def test_transformations(case):
    x_shape, kernel_shape, strides, pads = CASES[case]
    conv = partial(onednn.convolve, strides=strides, pads=pads)
    reference = partial(exact, strides=strides, pads=pads)
    xs, kernels, dx = draw_arrays(2, (3, *x_shape), (3, *kernel_shape), x_shape)
    each = jnp.stack([reference(x, kernels[0]) for x in xs])
    assert_near(jax.jit(jax.vmap(conv, (0, None)))(xs, kernels[0]), each)
    assert_near(
        jax.jit(jax.vmap(conv, (None, 0)))(xs[0], kernels),
        jnp.stack([reference(xs[0], kernel) for kernel in kernels]),
    )
    both = jnp.stack([reference(x, kernel) for x, kernel in zip(xs, kernels, strict=True)])
    assert_near(jax.jit(jax.vmap(conv))(xs, kernels), both)
    axes = (3, 1)  # neither in front
    moved = [jnp.moveaxis(a, 0, axis) for a, axis in zip((xs, kernels), axes, strict=True)]
    assert_near(jax.jit(jax.vmap(conv, axes, 2))(*moved), jnp.moveaxis(both, 0, 2))

    _, dot = jax.jit(lambda x, dx: jax.jvp(lambda x: conv(x, kernels[0]), (x,), (dx,)))(xs[0], dx)
    assert_near(dot, reference(dx, kernels[0]))  # linear in either argument

    def total(conv, dtype, xs, kernel):
        @jax.checkpoint
        def body(carry, x):
            return carry + jnp.sum(conv(x, kernel) ** 2), None

        return lax.scan(body, jnp.zeros((), dtype), xs)[0]

    program = jax.jit(jax.grad(partial(total, conv, jnp.float32), argnums=(0, 1)))
    assert CALL in program.lower(xs, kernels[0]).as_text()
    with jax.enable_x64(True):
        args = xs.astype(jnp.float64), kernels[0].astype(jnp.float64)
        conv64 = partial(convolve, strides=strides, pads=pads)
        expected = jax.jit(jax.grad(partial(total, conv64, jnp.float64), argnums=(0, 1)))(*args)
    for ours, theirs in zip(program(xs, kernels[0]), expected, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_gradients(case):
    x_shape, kernel_shape, strides, pads = CASES[case]
    arrays = draw_arrays(3, x_shape, kernel_shape, x_shape, kernel_shape)

    def curvature(conv, x, kernel, dx, dkernel):
        loss = lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel)))  # noqa: E731
        slope = lambda *a: jax.jvp(loss, a, (dx, dkernel))[1]  # noqa: E731
        return jax.grad(slope, (0, 1))(x, kernel)

    conv = partial(onednn.convolve, strides=strides, pads=pads)
    found = jax.jit(partial(curvature, conv))(*arrays)
    with jax.enable_x64(True):
        conv64 = partial(convolve, strides=strides, pads=pads)
        args = [a.astype(jnp.float64) for a in arrays]
        expected = jax.jit(partial(curvature, conv64))(*args)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, 3e-4)


WIDE = ((16, 16, 16, 32), (3, 3, 32, 32))


def test_the_layer_takes_it_where_it_pays_and_not_elsewhere():
    def takes(x_shape, kernel_shape, dtype="float32", **arguments):
        arrays = jnp.zeros(x_shape, dtype), jnp.zeros(kernel_shape, dtype)
        jaxpr = jax.make_jaxpr(lambda *a: layers.conv2d(*a, padding=1, **arguments))(*arrays)
        return onednn.NAME in {eqn.primitive.name for eqn in jaxpr.eqns}

    assert takes(*WIDE)
    assert takes(*WIDE, strides=(2, 2))
    assert not takes(*WIDE, dtype="bfloat16")
    assert not takes(*WIDE, dilation=(2, 2))
    assert not takes((2, 8, 8, 16), (3, 3, 16, 16))  # little to do
    assert not takes((1, 4, 4, 512), (3, 3, 512, 512))  # a few pixels
    assert not takes((0, *WIDE[0][1:]), WIDE[1])
    with ops.plain():
        assert not takes(*WIDE)
    with jax.enable_x64(True):
        assert not takes(*WIDE, dtype="float64")


def test_what_it_does_not_take():
    x, kernel = jnp.zeros((2, 6, 6, 4)), jnp.zeros((3, 3, 4, 5))
    pads = ((2, 2), (2, 2))
    assert onednn.fits(x, kernel, pads)
    assert not onednn.fits(x, kernel, ((3, 0), (0, 0)))
    assert not onednn.fits(x.astype(jnp.bfloat16), kernel, pads)
    assert not onednn.fits(x[..., :1], kernel[:, :, :1], pads)
    assert not onednn.fits(x[:0], kernel, pads)


def test_only_a_release_that_was_tried(monkeypatch):
    x, kernel = draw_arrays(4, *WIDE)
    conv = lambda x, kernel: layers.conv2d(x, kernel, padding=1)  # noqa: E731
    assert CALL in jax.jit(lambda *a: conv(*a)).lower(x, kernel).as_text()
    monkeypatch.setattr(onednn, "jaxlib_version", "99.0")
    assert CALL not in jax.jit(lambda *a: conv(*a)).lower(x, kernel).as_text()
    kept = lambda *a: onednn.convolve(*a, (1, 1), ((1, 1), (1, 1)))  # noqa: E731
    assert CALL not in jax.jit(kept).lower(x, kernel).as_text()  # what was traced elsewhere


def test_other_platforms_get_the_plain_convolution():
    x, kernel = draw_arrays(4, *WIDE)
    conv = jax.jit(lambda *a: onednn.convolve(*a, (1, 1), ((1, 1), (1, 1))))
    text = conv.trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert CALL not in text
    assert "stablehlo.convolution" in text


def test_several_devices():
    x, kernel = draw_arrays(5, *WIDE)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))

    def value_and_grads(x, kernel):
        conv = lambda x, kernel: layers.conv2d(x, kernel, padding=1)  # noqa: E731
        return value_and_pulls(conv, x, kernel, jnp.ones_like(x))

    # XLA doesn't know how to cut the call, and would run all of it on every device.
    program = jax.jit(value_and_grads, in_shardings=(rows, NamedSharding(mesh, P())))
    assert CALL not in program.lower(x, kernel).as_text()
    expected = jax.jit(lambda *a: value_and_grads(*a))(x, kernel)
    for ours, theirs in zip(program(x, kernel), expected, strict=True):
        assert_near(ours, theirs)
    # `pmap` cuts the arrays itself.
    mapped = jax.pmap(value_and_grads, in_axes=(0, None), devices=jax.devices()[:4])
    split = x.reshape(4, -1, *x.shape[1:])
    assert CALL in mapped.lower(split, kernel).as_text()
    value, dx, dkernel = mapped(split, kernel)
    for ours, theirs in zip((value, dx, dkernel), expected, strict=True):
        assert_near(jnp.sum(ours, 0) if ours is dkernel else ours.reshape(theirs.shape), theirs)


def test_a_program_with_the_call_is_not_kept_and_others_are(tmp_path):
    """XLA can't write the call down; trying to reads memory that isn't its own."""
    arrays = draw_arrays(6, *WIDE)

    def make_step(axis_name):
        def step(state, batch):
            y = layers.conv2d(batch["x"], state, padding=1)
            return state - 0.1 * jnp.mean(y), {"loss": jnp.sum(y)}

        return step

    strategy = train.make_strategy("jit", num_devices=1)
    with program_cache.opened(tmp_path) as uses:
        conv = lambda x, kernel: layers.conv2d(x, kernel, padding=1)  # noqa: E731
        kept = jax.jit(lambda *a: conv(*a))
        assert CALL not in kept.lower(*arrays).as_text()  # a user's own, under a cache
        step = strategy.compile_step(make_step)
        kernel = strategy.replicate(arrays[1])
        requests = uses.requests
        state, metrics = step(kernel + 0, {"x": arrays[0]})
        for _ in range(2):
            state, metrics = step(state, {"x": arrays[0]})
        assert uses.requests <= requests + 1  # of `kernel + 0`
        assert not list(tmp_path.glob("*/*body*-cache"))
        jax.block_until_ready(kept(*arrays))
        assert list(tmp_path.glob("*/*-cache"))
    with ops.plain():
        plain = strategy.compile_step(make_step)
        expected = plain(strategy.replicate(arrays[1]), {"x": arrays[0]})
        for _ in range(2):
            expected = plain(expected[0], {"x": arrays[0]})
    assert_near(state, expected[0])
    assert_near(metrics["loss"], expected[1]["loss"], 1e-3)
