"""A step of a model's contract on one device and on eight."""

from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnets import ops

QUICK = {"xla_backend_optimization_level": 0}


def assert_close(left, right, **tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def sums_and_gradients(loss_fn, params, axis_name):
    """The loss and gradients over the global batch, and this part's outputs.

    Args:
        loss_fn: `loss_fn(params) -> (loss, outputs)`, a sum over this part.
        params: what is differentiated.
        axis_name: of the devices in `jax.pmap`; None without it.
    """
    with ops.data_axis(axis_name):
        (loss, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return *ops.data_sum((loss, grads)), outputs


def assert_eight_equal_one(train, params, batch, strategy):
    """In float64.

    Args:
        train: `train(params, batch, axis_name=None) -> (loss, grads, logits [B, ...])`, of which the
            first two are sums over the global batch.
        params: on all devices.
        batch: `{name: [B, ...]}`, cut over them.
        strategy: "jit" or "pmap".
    """
    step = jax.jit(train, compiler_options=QUICK)
    expected = step(params, batch)
    if strategy == "jit":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        result = step(params, jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))))
    else:
        mapped = jax.pmap(
            partial(train, axis_name="data"),
            axis_name="data", in_axes=(None, 0), out_axes=(None, None, 0),
        )  # fmt: skip
        parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        loss, grads, logits = mapped(params, parts)
        result = loss, grads, logits.reshape(-1, *logits.shape[2:])
    assert_close(result, expected, rtol=1e-12, atol=1e-12)
