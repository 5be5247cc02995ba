import threading
import time
from functools import partial

import jax
import jax.export
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


@settings(max_examples=20, deadline=None)
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
    "one row of many steps": ((4, 1, 9, 16), (3, 3, 16, 24), (2, 1), ((2, 0), (1, 1))),
    "a kernel of many places": ((2, 12, 12, 4), (8, 8, 4, 8), (1, 1), ((3, 4), (0, 0))),
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
        assert_near(ours, theirs, 3e-4)  # a sine of sums of a hundred numbers, and its slope


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
    for ours, theirs in zip((value, dx, jnp.sum(dkernel, 0)), expected, strict=True):
        assert_near(ours.reshape(theirs.shape), theirs)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    x, kernel = draw_arrays(5, *WIDE)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def grad(x, kernel):
        loss = lambda kernel: jnp.sum(layers.conv2d(x, kernel, padding=1) ** 2)  # noqa: E731
        found = jax.grad(loss)(kernel)
        return found if check_vma else lax.psum(found, "data")

    mapped = jax.shard_map(
        grad, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=check_vma
    )
    # With the check JAX adds up the gradient itself, by rules that the primitive hasn't.
    assert (CALL in jax.jit(mapped).lower(x, kernel).as_text()) == (not check_vma)
    assert_near(
        jax.jit(mapped)(x, kernel),
        jax.jit(
            lambda *a: jax.grad(lambda kernel: jnp.sum(layers.conv2d(a[0], kernel, padding=1) ** 2))(
                a[1]
            )
        )(x, kernel),
    )


def test_a_mesh_whose_axes_are_part_of_the_type():
    x, kernel = draw_arrays(5, *WIDE)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    conv = lambda x, kernel: layers.conv2d(x, kernel, padding=1)  # noqa: E731
    expected = jax.jit(lambda *a: conv(*a))(x, kernel)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = jax.jit(lambda *a: conv(*a))(spread, kernel)
        assert jax.typeof(found).sharding.spec[0] == "data"
        xs = jax.device_put(x.reshape(4, 4, *x.shape[1:]), NamedSharding(mesh, P("data")))
        mapped = jax.jit(jax.vmap(conv, (0, None)))(xs, kernel)
    assert_near(found, expected)
    assert_near(mapped.reshape(expected.shape), expected)


def test_eager_calls_compile_once_and_work_without_jit():
    x, kernel = draw_arrays(7, *WIDE)
    conv = lambda x: layers.conv2d(x, kernel, padding=1)  # noqa: E731
    expected = exact(x, kernel, (1, 1), ((1, 1), (1, 1)))
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    assert_near(conv(x), expected)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert_near(conv(x), expected)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "backend_compile" in event]
    with jax.disable_jit():
        assert_near(conv(x), expected)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        conv(x.at[0, 0, 0, 0].set(jnp.nan))


def test_nothing_to_map_over():
    kernel = jnp.ones(WIDE[1])
    conv = lambda x, kernel: layers.conv2d(x, kernel, padding=1)  # noqa: E731
    grad = jax.grad(lambda k: jnp.sum(jax.vmap(conv, (0, None))(jnp.zeros((0, *WIDE[0])), k)))
    np.testing.assert_array_equal(jax.jit(grad)(kernel), np.zeros(kernel.shape))


def test_an_export_has_the_plain_convolution():
    x, kernel = draw_arrays(8, *WIDE)
    conv = jax.jit(lambda x, kernel: layers.conv2d(x, kernel, padding=1))
    exported = jax.export.export(conv)(x, kernel)
    assert CALL not in exported.mlir_module()
    assert_near(exported.call(x, kernel), conv(x, kernel))
    (batch,) = jax.export.symbolic_shape("b")
    of_any = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    fresh = jax.jit(lambda x, kernel: layers.conv2d(x, kernel, padding=1))
    assert_near(jax.export.export(fresh)(of_any, kernel).call(x, kernel), conv(x, kernel))


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "strides", "pads"),
    [
        ((2, 6, 6, 4), (3, 3, 5, 5), (1, 1), ((0, 0), (0, 0))),
        ((2, 6, 6, 4), (3, 3, 4, 5), (1, 1), ((-1, 0), (0, 0))),
        ((2, 2, 6, 4), (3, 3, 4, 5), (1, 1), ((0, 0), (0, 0))),
        ((2, 6, 6, 4), (3, 3, 4, 5), (0, 1), ((0, 0), (0, 0))),
        ((2, 6, 6), (3, 3, 4, 5), (1, 1), ((0, 0), (0, 0))),
    ],
)
def test_what_would_end_the_process_is_refused(x_shape, kernel_shape, strides, pads):
    with pytest.raises(ValueError, match="oneDNN doesn't take"):
        onednn.convolve(jnp.zeros(x_shape), jnp.zeros(kernel_shape), strides, pads)


def make_step(axis_name):
    def step(state, batch):
        y = layers.conv2d(batch["x"], state, padding=1)
        return state - 0.1 * jnp.mean(y), {"loss": jnp.mean(y)}

    return step


def kept(folder):
    return sorted(path.name for path in folder.glob("*/*-cache"))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_strategy_compiles_with_the_cache_closed(tmp_path, monkeypatch, num_steps):
    """XLA can't write the call down; trying to reads memory that isn't its own."""
    x, kernel = draw_arrays(6, *WIDE)
    batch = {"x": x if num_steps == 1 else jnp.stack([x] * num_steps)}
    texts = []
    as_text = jax.stages.Compiled.as_text
    monkeypatch.setattr(
        jax.stages.Compiled, "as_text", lambda self: texts.append(as_text(self)) or texts[-1]
    )
    strategy = train.make_strategy("jit", num_devices=1)
    with program_cache.opened(tmp_path) as uses:
        step = strategy.compile_step(make_step, num_steps=num_steps)
        state = strategy.replicate(np.array(kernel))
        before = kept(tmp_path), uses.requests
        for _ in range(3):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        assert (kept(tmp_path), uses.requests) == before
        assert [CALL in text for text in texts] == [True]  # where jaxlib has faulty fusions: looked at
        # A user's own program, under the cache: it is kept, so it hasn't the call.
        own = jax.jit(lambda *a: layers.conv2d(*a, padding=1))
        assert CALL not in own.lower(x, kernel).as_text()
        jax.block_until_ready(own(x, kernel))
        assert len(kept(tmp_path)) > len(before[0])
    with ops.plain():
        plain = strategy.compile_step(make_step, num_steps=num_steps)
        expected = strategy.replicate(np.array(kernel))
        for _ in range(3):
            expected, expected_metrics = plain(expected, batch)
    assert_near(state, expected)
    assert_near(metrics["loss"], expected_metrics["loss"])


def test_a_program_over_several_devices_is_kept(tmp_path):
    x, kernel = draw_arrays(6, *WIDE)
    strategy = train.make_strategy("jit", num_devices=4)
    with program_cache.opened(tmp_path):
        step = strategy.compile_step(make_step)
        state = strategy.replicate(np.array(kernel))
        before = kept(tmp_path)
        jax.block_until_ready(step(state, {"x": x}))
        assert len(kept(tmp_path)) > len(before)


def test_a_program_of_before_does_not_reach_a_cache(tmp_path):
    x, kernel = draw_arrays(6, *WIDE)
    conv = jax.jit(lambda *a: layers.conv2d(*a, padding=1))
    assert CALL in conv.lower(x, kernel).as_text()
    with program_cache.opened(tmp_path):
        assert CALL not in conv.lower(x, kernel).as_text()
        jax.block_until_ready(conv(x, kernel))
        assert kept(tmp_path)


def test_a_cache_that_jax_still_has_open(tmp_path):
    """JAX looks at its option once."""
    x, kernel = draw_arrays(6, *WIDE)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.jit(lambda x: x + 1)(x)
    jax.config.update("jax_compilation_cache_dir", None)
    conv = jax.jit(lambda *a: layers.conv2d(*a, padding=1))
    assert CALL in conv.lower(x, kernel).as_text()
    names = sorted(tmp_path.iterdir())
    jax.block_until_ready(conv(x, kernel))
    assert sorted(tmp_path.iterdir()) == names


def test_two_threads(tmp_path):
    """While one compiles with the cache closed, the other's program is one that may be kept."""
    x, kernel = draw_arrays(6, *WIDE)
    entered, lowered = threading.Event(), threading.Event()
    texts = []

    def other():
        entered.wait(60)
        texts.append(jax.jit(lambda *a: layers.conv2d(*a, padding=1)).lower(x, kernel).as_text())
        lowered.set()
        with program_cache.closed():
            texts.append(is_open)

    is_open = True
    with program_cache.opened(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        with program_cache.closed():
            entered.set()
            assert lowered.wait(60)
            time.sleep(0.05)
            is_open = False
        thread.join(60)
        assert jax.config.jax_enable_compilation_cache
    assert CALL not in texts[0]
    assert texts[1] is False
