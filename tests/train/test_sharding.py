import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxnets import errors
from jaxnets.train import check_divides, create_state, make_strategy, shard_by_rules
from jaxnets.train.mesh import REPLICATED, make_mesh


def make_state():
    def init_fn(key):
        kernel = jax.random.normal(key, (16, 8))
        return {"dense1": {"kernel": kernel, "bias": jnp.zeros(8)}}, {}

    return create_state(init_fn, optax.adam(0.1), key=jax.random.key(0))


def test_the_first_rule_that_is_found_in_the_path_counts():
    mesh = make_mesh(4)
    rules = [("dense1/kernel", P("data")), ("bias", P()), (".*", P())]
    shardings = shard_by_rules(jax.eval_shape(make_state), rules, mesh)
    assert shardings.params["dense1"]["kernel"].spec == P("data")
    assert shardings.params["dense1"]["bias"].spec == P()
    # The optimizer's moments have the same path further down, so they follow their parameter.
    assert shardings.opt_state[0].mu["dense1"]["kernel"].spec == P("data")
    assert shardings.step.spec == P()


def test_state_spread_by_rules_trains_as_one_that_is_not():
    def loss_fn(params, model_state, batch, *, key):
        y = batch["x"] @ params["dense1"]["kernel"] + params["dense1"]["bias"][None]
        return {"loss": jnp.sum(y**2, -1)}, model_state, {}

    from functools import partial

    from jaxnets.train import make_train_step

    batch = {"x": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)}
    batch["mask"] = np.ones(8, bool)
    results = []
    for rules in (REPLICATED, [("kernel", P("data")), (".*", P())]):
        strategy = make_strategy(num_devices=4, rules=rules)
        state = strategy.init(make_state)
        step = strategy.compile_step(partial(make_train_step, loss_fn, optax.adam(0.1)))
        for _ in range(3):
            state, _ = step(state, batch)
        results.append(state)
    kernel = results[1].params["dense1"]["kernel"]
    assert kernel.sharding.spec == P("data")
    assert kernel.addressable_shards[0].data.shape == (4, 8)
    np.testing.assert_allclose(kernel, results[0].params["dense1"]["kernel"], rtol=1e-5, atol=1e-6)


def test_rules_that_cannot_be():
    mesh = make_mesh(2)
    shapes = jax.eval_shape(make_state)
    with pytest.raises(ValueError, match="no sharding rule for step"):
        shard_by_rules(shapes, [("kernel", P())], mesh)
    with pytest.raises(ValueError, match=r"gives params/dense1/bias \(8,\)"):
        shard_by_rules(shapes, [("params/dense1/bias", P(None, "data")), (".*", P())], mesh)


def test_the_state_is_the_same_however_it_is_made():
    states = [
        make_strategy(name, num_devices=n).init(make_state)
        for name, n in [("jit", 1), ("jit", 8), ("pmap", 3)]
    ]
    for other in states[1:]:
        same = jax.tree.map(
            lambda a, b: np.array_equal(a, b),
            (states[0].params, jax.random.key_data(states[0].key)),
            (other.params, jax.random.key_data(other.key)),
        )
        assert jax.tree.all(same)


def test_a_mesh_takes_the_first_devices():
    assert list(make_mesh(3).devices.flat) == jax.devices()[:3]
    assert make_mesh().size == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_devices": 9}, "9 devices asked for; there are 8"),
        ({"num_devices": 0}, "0 devices asked for"),
        ({"name": "pmpa"}, "did you mean 'pmap'"),
        ({"name": "pmap", "use_jit": False}, "without jit"),
        ({"use_jit": False, "num_devices": 2}, "without jit"),
        ({"name": "pmap", "rules": [(".*", P("data"))]}, "takes no rules"),
    ],
)
def test_strategies_that_cannot_be(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        make_strategy(**options)


@pytest.mark.parametrize(("batch", "devices", "accumulate"), [(64, 8, 8), (6, 3, 2), (1, 1, 1)])
def test_batches_that_divide(batch, devices, accumulate):
    check_divides(batch, devices, accumulate)


@pytest.mark.parametrize(("batch", "devices", "accumulate"), [(4, 8, 1), (64, 8, 3), (8, 1, 0)])
def test_batches_that_do_not_divide(batch, devices, accumulate):
    with pytest.raises(errors.ConfigError, match=r"not divisible|at least 1"):
        check_divides(batch, devices, accumulate)
