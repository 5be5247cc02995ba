import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxnets import ops
from jaxnets.ops import partition


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def test_constrain_outside_of_a_context_is_the_identity():
    x = jnp.ones((8, 3))
    assert ops.constrain(x, "batch", None) is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: ops.constrain(x, "batch", None))(x))


@pytest.mark.parametrize("axes", [(), ("batch",), ("batch", None, None)])
def test_constrain_takes_one_name_for_each_axis(axes):
    with pytest.raises(ValueError, match=r"axis names for an array of shape \(8, 3\)"):
        ops.constrain(jnp.ones((8, 3)), *axes)


@pytest.mark.parametrize("use_jit", [True, False])
def test_constrain_spreads_an_axis_that_has_a_rule(use_jit):
    mesh = mesh_of(8)

    def fun(x):
        with partition.activation_rules(mesh, {"batch": "data", "time": None}):
            return ops.constrain(x, "batch", "time", "model") * 2  # "model" has no rule

    x = jnp.arange(16.0 * 3 * 4).reshape(16, 3, 4)
    out = (jax.jit(fun) if use_jit else fun)(x)
    np.testing.assert_array_equal(out, np.asarray(x) * 2)
    assert out.sharding.shard_shape(out.shape) == (2, 3, 4)
    assert len(out.sharding.device_set) == 8


def test_rules_hold_only_while_their_context_is_open():
    mesh, x = mesh_of(2), jnp.ones((4, 2))
    with partition.activation_rules(mesh, {"batch": "data"}):
        with partition.activation_rules(mesh, {}):
            inner = ops.constrain(x, "batch", None)
        outer = ops.constrain(x, "batch", None)
    assert inner.sharding.spec == PartitionSpec(None, None)
    assert outer.sharding.spec == PartitionSpec("data", None)
    assert ops.constrain(x, "batch", None) is x


def test_an_exception_closes_both_contexts():
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        ops.data_axis("data"),
        partition.activation_rules(mesh_of(2), {"batch": "data"}),
    ):
        raise RuntimeError("on purpose")
    x = jnp.ones((4, 2))
    assert ops.constrain(x, "batch", None) is x
    assert ops.data_sum(x) is x


def test_data_sum_outside_of_a_context_is_the_identity():
    tree = {"a": jnp.ones(3), "b": (jnp.zeros(2), None)}
    assert ops.data_sum(tree) is tree
    with ops.data_axis(None):
        assert ops.data_sum(tree) is tree


@pytest.mark.parametrize("count", [1, 2, 8])
def test_data_sum_adds_every_leaf_over_the_devices(count):
    def fun(x):
        with ops.data_axis("data"):
            return ops.data_sum({"a": x, "b": (2 * x.sum(), jnp.int32(1))})

    x = jnp.arange(8.0 * 3).reshape(count, 8 // count, 3)
    out = jax.pmap(fun, axis_name="data", devices=jax.devices()[:count])(x)
    for device in range(count):
        np.testing.assert_array_equal(out["a"][device], np.asarray(x).sum(0))
        assert float(out["b"][0][device]) == 2 * 276
        assert int(out["b"][1][device]) == count


def test_data_sum_under_jit_leaves_global_arrays_alone():
    mesh, x = mesh_of(8), jnp.arange(16.0)

    def fun(x):
        with ops.data_axis(None), partition.activation_rules(mesh, {"batch": "data"}):
            return ops.data_sum(ops.constrain(x, "batch").sum())

    assert float(jax.jit(fun)(x)) == 120


def test_the_inner_data_axis_counts():
    def fun(x):
        with ops.data_axis("data"):
            with ops.data_axis(None):
                alone = ops.data_sum(x)
            return alone, ops.data_sum(x)

    alone, together = jax.pmap(fun, axis_name="data")(jnp.arange(8.0))
    np.testing.assert_array_equal(alone, np.arange(8.0))
    np.testing.assert_array_equal(together, np.full(8, 28.0))


def test_default_rows_are_the_places_in_the_global_batch():
    np.testing.assert_array_equal(partition.default_rows(5), np.arange(5))
    with partition.micro_batch(1, of=3):
        np.testing.assert_array_equal(partition.default_rows(3), [1, 4, 7])

    def fun(x):
        with ops.data_axis("data"):
            return partition.default_rows(len(x))

    rows = jax.pmap(fun, axis_name="data")(jnp.zeros((8, 5)))
    np.testing.assert_array_equal(np.ravel(rows), np.arange(40))
