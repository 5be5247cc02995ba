"""Layers: conventions that frameworks don't share, derivatives of derivatives, parts and wholes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxnets import ops
from jaxnets.data import Batches, take
from jaxnets.layers import BatchNorm, conv2d, dropout
from jaxnets.train import make_strategy
from jaxnets.train.sharding import gather_rows
from tests.traps import probe


@pytest.mark.parity
def test_conventions_are_those_said_of_pytorch(x64):
    """ "SAME" puts the odd pixel below and to the right, which padding=1 doesn't; means and GELU."""
    import torch
    from torch.nn import functional

    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 8, 3)), rng.normal(size=(3, 3, 3, 4))

    def theirs(fn, x, *args, **options):
        y = fn(torch.tensor(x.transpose(0, 3, 1, 2)), *args, **options)
        return y.numpy().transpose(0, 2, 3, 1)

    weight = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
    shifted = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    same, one = (conv2d(jnp.asarray(x), jnp.asarray(kernel), strides=(2, 2), padding=p)
                 for p in ("SAME", 1))  # fmt: skip
    np.testing.assert_allclose(same, theirs(functional.conv2d, shifted, weight, stride=2), rtol=1e-10)
    np.testing.assert_allclose(
        one, theirs(functional.conv2d, x, weight, stride=2, padding=1), rtol=1e-10
    )
    assert same.shape == one.shape
    assert np.abs(same - one).max() > 1
    for window, strides in [((2, 2), (2, 2)), ((3, 2), (2, 1)), ((4, 5), (4, 5))]:
        for ours, fn in ((ops.avg_pool, functional.avg_pool2d), (ops.max_pool, functional.max_pool2d)):
            found = ours(jnp.asarray(x), window, strides)
            np.testing.assert_allclose(found, theirs(fn, x, window, strides), rtol=1e-12)
    many = np.linspace(-6, 6, 101)
    exact, tanh = (
        functional.gelu(torch.tensor(many), approximate=kind).numpy() for kind in ("none", "tanh")
    )
    np.testing.assert_allclose(ops.gelu(jnp.asarray(many)), exact, rtol=1e-9, atol=1e-12)
    assert np.abs(exact - tanh).max() > 1e-4


RNG = np.random.default_rng(0)
X_BHWC = RNG.normal(size=(2, 4, 5, 2))
MASK = np.array([True, False, True])
SMOOTH = {
    "conv": (
        lambda x, k: conv2d(x, k, padding=1),
        (X_BHWC, RNG.normal(size=(3, 3, 2, 3))),
    ),
    "strided": (
        lambda x, k: conv2d(x, k, strides=(2, 1), padding="SAME"),
        (X_BHWC, RNG.normal(size=(3, 2, 2, 3))),
    ),
    "depthwise": (
        lambda x, k: conv2d(x, k, padding=1, groups=2),
        (X_BHWC, RNG.normal(size=(3, 3, 1, 4))),
    ),
    "gelu": (ops.gelu, (RNG.normal(size=7),)),
    "avg_pool": (lambda x: ops.avg_pool(x, (2, 2)), (X_BHWC,)),
    "dropout": (
        lambda x: dropout(x, 0.4, key=jax.random.key(0), rows=jnp.arange(2)),
        (X_BHWC,),
    ),
    "batch_norm": (
        lambda x, scale, bias: BatchNorm().apply(
            {
                "params": {"scale": scale, "bias": bias},
                "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
            },
            x,
            train=True,
            mask=jnp.asarray(MASK),
            mutable=["batch_stats"],
        )[0],
        (RNG.normal(size=(3, 2, 2)), np.array([1.0, -2.0]), np.array([0.5, 0.0])),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gelu", "batch_norm") else pytest.param(name, marks=pytest.mark.long)
        for name in SMOOTH
    ],
)
def test_first_and_second_derivatives_equal_finite_differences(name, x64):
    """Forwards and backwards, in float64; the maximum and its kinks have tests of their own."""
    layer, arguments = SMOOTH[name]
    fun = jax.jit(lambda *args: jnp.sum(jnp.sin(layer(*args))))
    arrays = tuple(map(jnp.asarray, arguments))
    check_grads(fun, arrays, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    num_devices=st.sampled_from([1, 2, 4, 8]),
    rows=st.integers(1, 3),
    inner=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from(["uint8", "int32", "float32", "bool", "float16"]),
    name=st.sampled_from(["jit", "pmap"]),
)
def test_a_batch_comes_back_from_the_devices_as_it_went(num_devices, rows, inner, dtype, name):
    """In order, whatever its shape and dtype, and each device has as many rows."""
    shape = (num_devices * rows, *inner)
    values = np.random.default_rng(rows).integers(0, 2 if dtype == "bool" else 100, shape)
    batch = {"x": values.astype(dtype), "index": np.arange(shape[0], dtype=np.int32)}
    placed = make_strategy(name, num_devices=num_devices).put_batch(batch)
    for key, x in batch.items():
        parts = sorted(placed[key].addressable_shards, key=lambda shard: shard.device.id)
        assert len(parts) == num_devices
        found = np.concatenate([np.asarray(part.data).reshape(rows, *x.shape[1:]) for part in parts])
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, x)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 17), epochs=st.integers(1, 2))
def test_padding_taken_off_leaves_each_example_as_often_as_it_was_drawn(size, batch_size, epochs):
    """Gathered by NumPy or on the device; what fills up is a copy of a real row."""
    data = {"x": np.random.default_rng(size).normal(size=(size, 2)).astype(np.float32)}
    seen = []
    for draw in Batches(size, batch_size, epochs * size, seed=size):
        batch, other = take(data, draw), gather_rows(data, draw)
        probe.assert_same(dict(other), dict(batch))
        assert np.isfinite(batch["x"]).all()
        assert len(batch["x"]) == batch_size
        seen.append(batch["x"][draw["mask"]])
    found = np.concatenate(seen)
    assert len(found) == epochs * size
    order = sorted(map(tuple, found.tolist()))
    assert order == sorted(map(tuple, np.tile(data["x"], (epochs, 1)).tolist()))
