import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnets import ops
from jaxnets.layers import Dropout, dropout
from jaxnets.ops import partition

KEY = jax.random.key(7)
# Compiled, or each of its operations is compiled alone; one test compares with the eager one.
jitted = jax.jit(dropout, static_argnums=1)


class Two(nn.Module):
    """Two layers of dropout, one after the other, with both outputs."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, *, train, rows=None):
        one = Dropout(self.rate, name="one")(x, train=train, rows=rows)
        return one, Dropout(self.rate, name="two")(x, train=train, rows=rows)


@jax.jit
def both(x, key, rows):
    return Two().apply({}, x, train=True, rows=rows, rngs={"dropout": key})


def agreement(left, right):
    """Share of the elements that two masks of rate 0.5 treat alike: 1/2 for independent ones."""
    return np.mean((np.asarray(left) == 0) == (np.asarray(right) == 0))


def test_rate_zero_and_one():
    x, rows = jnp.full((2, 3), jnp.nan), jnp.arange(2)
    assert dropout(x, 0, key=KEY, rows=rows) is x
    assert dropout(x, 1, key=KEY, rows=rows).tolist() == [[0, 0, 0]] * 2
    assert Dropout(0.0).apply({}, x, train=True) is x  # and needs no key
    out = Dropout(1.0).apply({}, x, train=True, rngs={"dropout": KEY})
    assert out.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_wrong_rate_is_refused(rate):
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        dropout(jnp.ones((2, 3)), rate, key=KEY, rows=jnp.arange(2))
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        Dropout(rate).apply({}, jnp.ones((2, 3)), train=True, rngs={"dropout": KEY})


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.9])
def test_the_kept_share_and_its_scale(rate):
    x = jnp.ones((256, 400))
    out = np.asarray(jitted(x, rate, key=KEY, rows=jnp.arange(256)))
    kept = out != 0
    # Five standard deviations of a binomial share, and of the shares of all rows or of all places.
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    for axis in (0, 1):
        deviation = np.sqrt(rate * (1 - rate) / x.shape[axis])
        assert np.abs(kept.mean(axis) - (1 - rate)).max() < 6 * deviation
    np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("rate", [1e-12, 1 - 1e-12])
def test_a_rate_next_to_zero_or_one(rate):
    out = jitted(jnp.ones((4, 100)), rate, key=KEY, rows=jnp.arange(4))
    assert np.isfinite(out).all()
    assert (np.asarray(out) == (0 if rate > 0.5 else 1)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_type_stays_and_the_mask_does_not_depend_on_it(dtype):
    out = jitted(jnp.ones((8, 50), dtype), 0.5, key=KEY, rows=jnp.arange(8))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out == 2, ops.row_bits(KEY, jnp.arange(8), (50,)) >> 31 == 1)


def test_a_dropped_element_is_zero_whatever_it_was():
    bad = jnp.tile(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e38]), (32, 4))
    out = np.asarray(jitted(bad, 0.5, key=KEY, rows=jnp.arange(32)))
    kept = np.asarray(jitted(jnp.ones_like(bad), 0.5, key=KEY, rows=jnp.arange(32))) != 0
    assert (out[~kept] == 0).all()
    assert np.isnan(out[:, 0][kept[:, 0]]).all()


def test_a_row_keeps_its_mask_whatever_the_order_and_split_of_the_batch():
    x, rows = jnp.ones((16, 9)), jnp.arange(40, 56)
    expected = [np.asarray(out) for out in both(x, KEY, rows)]
    order = np.random.default_rng(0).permutation(16)
    for whole, part in zip(expected, both(x, KEY, rows[order]), strict=True):
        np.testing.assert_array_equal(part, whole[order])
    for start in range(0, 16, 4):
        outs = both(x[:4], KEY, rows[start : start + 4])
        for whole, part in zip(expected, outs, strict=True):
            np.testing.assert_array_equal(part, whole[start : start + 4])


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_row_keeps_its_mask_on_any_number_of_devices(count):
    x, rows = jnp.ones((16, 9)), jnp.arange(40, 56)
    expected = [np.asarray(out) for out in both(x, KEY, rows)]
    devices = jax.devices()[:count]
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    spread = jax.device_put((x, rows), NamedSharding(mesh, PartitionSpec("data")))
    parts = (x.reshape(count, -1, 9), rows.reshape(count, -1))
    mapped = jax.pmap(lambda x, rows: both(x, KEY, rows), devices=devices)
    for outs in (both(spread[0], KEY, spread[1]), mapped(*parts)):
        for whole, out in zip(expected, outs, strict=True):
            assert len(out.sharding.device_set) == count
            np.testing.assert_array_equal(np.reshape(out, whole.shape), whole)


def test_masks_of_layers_steps_and_rows_are_independent():
    x, rows = jnp.ones((64, 200)), jnp.arange(64)
    one, two = both(x, jax.random.fold_in(KEY, 0), rows)
    later, _ = both(x, jax.random.fold_in(KEY, 1), rows)
    bound = 5 * 0.5 / np.sqrt(x.size)
    for other in (two, later, np.roll(one, 1, axis=0), np.roll(one, 1, axis=1)):
        assert abs(agreement(one, other) - 0.5) < bound
    again, _ = both(x, jax.random.fold_in(KEY, 0), rows)
    np.testing.assert_array_equal(one, again)


def test_rows_with_the_same_id_have_the_same_mask():
    out = jitted(jnp.ones((3, 50)), 0.5, key=KEY, rows=jnp.array([4, 9, 4]))
    np.testing.assert_array_equal(out[0], out[2])
    assert (out[0] != out[1]).any()


def test_the_layer_is_the_function_with_the_key_of_its_place():
    class Probe(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.random.key_data(self.make_rng("dropout"))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Probe(name="one")(x)

    x, rows = jnp.ones((3, 20)), jnp.arange(3)
    words = Outer().apply({}, x, rngs={"dropout": KEY})
    expected = dropout(x, 0.5, key=jax.random.wrap_key_data(words), rows=rows)
    np.testing.assert_array_equal(both(x, KEY, rows)[0], expected)


def test_evaluation_changes_nothing_and_needs_no_key():
    x = jnp.ones((2, 3))
    one, two = Two().apply({}, x, train=False)
    assert one is x
    assert two is x


def test_training_without_a_key_is_refused():
    with pytest.raises(Exception, match="dropout"):
        Dropout(0.5).apply({}, jnp.ones((2, 3)), train=True)


def test_default_rows_are_places_in_the_global_batch():
    x = jnp.ones((16, 30))
    expected = [np.asarray(out) for out in both(x, KEY, jnp.arange(16))]

    def fun(x):
        with ops.data_axis("data"):
            return Two().apply({}, x, train=True, rngs={"dropout": KEY})

    alone = jax.jit(lambda x: Two().apply({}, x, train=True, rngs={"dropout": KEY}))(x)
    mapped = jax.pmap(fun, axis_name="data")(x.reshape(8, 2, 30))
    for whole, one, many in zip(expected, alone, mapped, strict=True):
        np.testing.assert_array_equal(one, whole)
        np.testing.assert_array_equal(np.reshape(many, whole.shape), whole)
    assert len(np.unique(np.asarray(mapped[0]).reshape(8, -1), axis=0)) == 8


def test_the_gradient_is_the_mask(x64):
    x, rows = jnp.asarray(np.random.default_rng(0).normal(size=(8, 40))), jnp.arange(8)
    mask = jitted(jnp.ones_like(x), 0.25, key=KEY, rows=rows)
    grad = jax.jit(jax.grad(lambda x: dropout(x, 0.25, key=KEY, rows=rows).sum()))(x)
    np.testing.assert_allclose(grad, mask, rtol=1e-15)
    tangent = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
    _, out = jax.jvp(lambda x: jitted(x, 0.25, key=KEY, rows=rows), (x,), (tangent,))
    np.testing.assert_allclose(out, mask * tangent, rtol=1e-15)


def test_jit_equals_eager():
    x, rows = (
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6)), jnp.float32),
        jnp.arange(4),
    )
    eager = dropout(x, 0.3, key=KEY, rows=rows)
    # The same mask; XLA multiplies by the inverse of the constant: one unit in the last place.
    np.testing.assert_array_equal(eager == 0, jitted(x, 0.3, key=KEY, rows=rows) == 0)
    np.testing.assert_allclose(jitted(x, 0.3, key=KEY, rows=rows), eager, rtol=2e-7)


def test_default_rows_in_micro_batches_are_those_of_the_whole_batch():
    layer, x = Dropout(0.5), jnp.ones((8, 5))
    rngs = {"dropout": jax.random.key(0)}
    whole = layer.apply({}, x, train=True, rngs=rngs)
    for number in range(4):
        with partition.micro_batch(number, of=4):
            part = layer.apply({}, x[number::4], train=True, rngs=rngs)
        np.testing.assert_array_equal(part, whole[number::4])
