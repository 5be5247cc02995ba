from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxnets import ops
from jaxnets.layers import BatchNorm, batch_moments

MASK = np.array([True, False, True, True, False, True, True, True])
SCALE, BIAS = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, -1.0])


def images(seed=0, rows=8):
    """Channels of different means and spreads, `[B, 2, 3, 3]`."""
    noise = np.random.default_rng(seed).normal(size=(rows, 2, 3, 3))
    return noise * np.array([1.0, 3.0, 0.1]) + np.array([0.0, 5.0, -2.0])


def variables_of(dtype=np.float64, mean=0.0, var=1.0):
    return {
        "params": {"scale": jnp.asarray(SCALE, dtype), "bias": jnp.asarray(BIAS, dtype)},
        "batch_stats": {"mean": jnp.full(3, mean, dtype), "var": jnp.full(3, var, dtype)},
    }


def train(variables, x, mask=None, **options):
    """Output and new statistics, compiled."""

    @jax.jit
    def fun(variables, x, mask):
        layer = BatchNorm(**options)
        return layer.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])

    out, changed = fun(variables, jnp.asarray(x), None if mask is None else jnp.asarray(mask))
    return out, {**variables, **changed}


def normalised(x, mean, var, epsilon=1e-5):
    return (x - mean) / np.sqrt(var + epsilon) * SCALE + BIAS


def test_outputs_and_running_statistics_by_hand(x64):
    variables, mean, var = variables_of(), np.zeros(3), np.ones(3)
    for seed in range(4):
        x = images(seed)
        out, variables = train(variables, x)
        flat = x.reshape(-1, 3)
        np.testing.assert_allclose(out, normalised(x, flat.mean(0), flat.var(0)), rtol=1e-12)
        mean = 0.9 * mean + 0.1 * flat.mean(0)
        var = 0.9 * var + 0.1 * flat.var(0, ddof=1)  # unbiased: over n - 1
    stats = variables["batch_stats"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-12)
    out = BatchNorm().apply(variables, jnp.asarray(x), train=False)
    np.testing.assert_allclose(out, normalised(x, mean, var), rtol=1e-12)


def test_momentum_and_epsilon(x64):
    x = images()
    out, variables = train(variables_of(), x, momentum=0.25, epsilon=0.5)
    flat = x.reshape(-1, 3)
    np.testing.assert_allclose(out, normalised(x, flat.mean(0), flat.var(0), 0.5), rtol=1e-12)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], 0.75 * flat.mean(0), rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 3), (6, 5, 3), (6, 2, 4, 3), (1, 4, 3)])
def test_moments_of_any_rank(shape, x64):
    x = np.random.default_rng(0).normal(size=shape)
    mean, var, count = jax.jit(batch_moments)(jnp.asarray(x))
    flat = x.reshape(-1, 3)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(var, flat.var(0), rtol=1e-12)
    assert float(count) == len(flat)


@pytest.mark.parametrize("padding", [0.0, 1e30, np.inf, np.nan])
def test_masked_rows_do_not_count_whatever_they_hold(padding, x64):
    x = images()
    x[~MASK] = padding
    mean, var, count = jax.jit(batch_moments)(jnp.asarray(x), jnp.asarray(MASK))
    flat = x[MASK].reshape(-1, 3)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, flat.var(0), rtol=1e-12)
    assert float(count) == len(flat)
    reference = images()
    reference[~MASK] = 1.0
    expected, after = train(variables_of(), reference, MASK)
    out, variables = train(variables_of(), x, MASK)
    np.testing.assert_array_equal(np.asarray(out)[MASK], np.asarray(expected)[MASK])
    for name, values in after["batch_stats"].items():
        np.testing.assert_array_equal(variables["batch_stats"][name], values)


@pytest.mark.parametrize("padding", [1.0, 1e30])
def test_masked_rows_do_not_change_gradients(padding, x64):
    def grads(x, mask):
        def loss(params, x):
            variables = {**variables_of(), "params": params}
            out, _ = BatchNorm().apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
            kept = out if mask is None else jnp.where(mask[:, None, None, None], out, 0)
            return (kept**3).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(variables_of()["params"], jnp.asarray(x))

    x = images()
    x[~MASK] = padding
    (params, inputs), (expected, expected_inputs) = (
        grads(x, jnp.asarray(MASK)),
        grads(x[MASK], None),
    )
    for name in ("scale", "bias"):
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-11)
    np.testing.assert_allclose(inputs[MASK], expected_inputs, rtol=1e-9, atol=1e-11)
    assert not np.asarray(inputs)[~MASK].any()


def test_a_batch_of_masked_rows_alone_leaves_the_statistics():
    before = variables_of(np.float32, mean=0.25, var=2.0)
    out, after = train(before, images().astype(np.float32), np.zeros(8, bool))
    assert np.isfinite(out).all()
    for name in ("mean", "var"):
        np.testing.assert_array_equal(after["batch_stats"][name], before["batch_stats"][name])


def test_a_single_element_keeps_finite_statistics():
    out, after = train(variables_of(np.float32), np.full((1, 3), 7.0, np.float32))
    np.testing.assert_allclose(out, BIAS[None], atol=1e-6)
    np.testing.assert_allclose(after["batch_stats"]["mean"], 0.7, rtol=1e-6)
    np.testing.assert_allclose(after["batch_stats"]["var"], 0.9, rtol=1e-6)


def test_an_empty_batch_counts_nothing():
    mean, var, count = batch_moments(jnp.zeros((0, 2, 2, 3)))
    assert float(count) == 0
    assert mean.tolist() == var.tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", ["pmap", "jit"])
def test_eight_devices_equal_one(strategy, x64):
    """One row on each device: the worst case for statistics that are kept by device."""
    x, mask = jnp.asarray(images()), jnp.asarray(MASK)
    target = jnp.asarray(images(1))
    variables = variables_of()

    def loss_and_stats(params, x, mask, target):
        out, changed = BatchNorm().apply(
            {**variables, "params": params}, x, train=True, mask=mask, mutable=["batch_stats"]
        )
        loss = jnp.where(mask[:, None, None, None], (out - target) ** 2, 0).sum()
        return loss, changed

    def step(params, x, mask, target, axis_name=None):
        with ops.data_axis(axis_name):
            grad_fn = jax.value_and_grad(loss_and_stats, (0, 1), has_aux=True)
            (loss, changed), (grads, input_grads) = grad_fn(params, x, mask, target)
            return ops.data_sum((loss, grads)), changed, input_grads

    expected = jax.jit(step)(variables["params"], x, mask, target)
    if strategy == "pmap":
        parts = (x[:, None], mask[:, None], target[:, None])
        mapped = jax.pmap(partial(step, axis_name="data"), axis_name="data", in_axes=(None, 0, 0, 0))
        sums, changed, input_grads = mapped(variables["params"], *parts)
        for leaf in jax.tree.leaves((sums, changed)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        first = jax.tree.map(lambda leaf: leaf[0], (sums, changed))
        result = (*first, input_grads[:, 0])
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        parts = jax.device_put((x, mask, target), NamedSharding(mesh, PartitionSpec("data")))
        result = jax.jit(step)(variables["params"], *parts)
        assert len(result[2].sharding.device_set) == 8
    leaves = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    for leaf, reference in leaves:
        np.testing.assert_allclose(leaf, reference, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences(x64):
    def loss(x, scale, bias):
        variables = {**variables_of(), "params": {"scale": scale, "bias": bias}}
        out, _ = BatchNorm().apply(
            variables, x, train=True, mask=jnp.asarray(MASK[:4]), mutable=["batch_stats"]
        )
        return (out**3).sum()

    arguments = (jnp.asarray(images(rows=4)), jnp.asarray(SCALE), jnp.asarray(BIAS))
    check_grads(jax.jit(loss), arguments, order=1, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_large_mean_does_not_cost_the_variance_its_digits(offset):
    x = images()[..., :1] + offset
    x = x.astype(np.float32)
    _, var, _ = jax.jit(batch_moments)(jnp.asarray(x))
    # The mean of squares less the square of the mean would be off by offset**2 * 1e-7.
    np.testing.assert_allclose(float(var[0]), x.astype(np.float64).var(), rtol=1e-4)


def test_a_constant_channel_is_finite():
    out, variables = train(variables_of(np.float32), np.full((4, 3), 1e4, np.float32))
    np.testing.assert_allclose(out, np.tile(BIAS, (4, 1)), atol=1e-5)
    np.testing.assert_allclose(variables["batch_stats"]["var"], 0.9, rtol=1e-6)


def test_bfloat16_in_and_out_but_statistics_in_float32():
    x = jnp.asarray(images(), jnp.bfloat16)
    out, variables = train(variables_of(np.float32), x)
    assert out.dtype == jnp.bfloat16
    for values in variables["batch_stats"].values():
        assert values.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    flat = exact.reshape(-1, 3)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    expected = normalised(exact, flat.mean(0), flat.var(0))
    # bfloat16 has 8 bits, and only the output is rounded to it.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-4)
    assert BatchNorm(dtype=jnp.bfloat16).apply(variables, jnp.ones((2, 3)), train=False).dtype == (
        jnp.bfloat16
    )


def test_initialisation_counts_nothing_and_evaluation_changes_nothing():
    x = jnp.asarray(images(), jnp.float32)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    assert variables["batch_stats"]["mean"].tolist() == [0, 0, 0]
    assert variables["batch_stats"]["var"].tolist() == [1, 1, 1]
    out, changed = BatchNorm().apply(variables, x, train=False, mutable=["batch_stats"])
    np.testing.assert_allclose(out, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    for name, values in changed["batch_stats"].items():
        np.testing.assert_array_equal(values, variables["batch_stats"][name])


def test_float64_images_leave_float32_statistics(x64):
    """Or a step would give back another type than it took, and be compiled anew."""
    _, after = train(variables_of(np.float32), images())
    assert {x.dtype for x in after["batch_stats"].values()} == {np.dtype("float32")}
