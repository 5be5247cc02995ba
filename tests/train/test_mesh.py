import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxnets import errors
from jaxnets.data import Batches
from jaxnets.train import create_state, make_strategy, make_train_step
from jaxnets.train.mesh import CUT_LARGEST, Largest, make_mesh, read_sizes, shard_by_rules

TEN = Batches(96, 16, 10 * 16 - 5, seed=3)
# Columns, then rows, as Megatron cuts two layers in a row; the head is whole.
MLP_RULES = (
    ("dense1/kernel", P("fsdp", "tensor")),
    ("dense1/bias", P("tensor")),
    ("dense2/kernel", P("tensor", "fsdp")),
    ("dense2/bias", P()),
    ("head/", P()),
    (r"^(step|key|guard|opt_state/\d+/count)$", P()),
)


def train(strategy, name="mlp"):
    init_fn, loss_fn = tiny.classifier(name)
    tx = optax.adam(0.003)

    def make_state():
        return tiny.to_float(create_state(init_fn, tx, key=jax.random.key(1)), jnp.float64)

    step = strategy.compile_step(functools.partial(make_train_step, loss_fn, tx), tiny.arrays())
    state, losses = strategy.init(make_state), []
    for draw in tiny.draws(TEN):
        state, values = step(state, draw)
        losses.append(float(values["loss"]))
    return state, losses


@pytest.mark.parametrize(
    ("name", "model", "options"),
    [
        ("fsdp", "mlp", {"rules": MLP_RULES}),
        ("tensor", "mlp", {"rules": MLP_RULES}),
        ("jit", "mlp", {"sizes": {"data": 2, "fsdp": 2, "tensor": 2}, "rules": MLP_RULES}),
        pytest.param("fsdp", "mlp", {}, marks=pytest.mark.long),
        pytest.param("fsdp", "convnet", {}, marks=pytest.mark.long),
        pytest.param("jit", "convnet", {"sizes": {"data": 4, "fsdp": 2}}, marks=pytest.mark.long),
    ],
)
def test_every_strategy_trains_as_one_device_does(name, model, options, x64):
    one, losses = train(make_strategy(num_devices=1), model)
    state, others = train(make_strategy(name, **options), model)
    np.testing.assert_allclose(others, losses, rtol=1e-9)
    assert tiny.relative_difference(tiny.learnt(one), tiny.learnt(state)) < 1e-9
    assert losses[-1] != losses[0]
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(state.params) if x.ndim > 1]
    assert any(x.addressable_shards[0].data.size < x.size for x in kernels), "nothing was cut"


def test_fsdp_keeps_an_eighth_of_parameters_and_moments():
    init_fn, _ = tiny.classifier("mlp", size=32, num_classes=8)
    strategy = make_strategy("fsdp")
    state = strategy.init(lambda: create_state(init_fn, optax.adam(0.1), key=jax.random.key(0)))
    for tree in (state.params, state.opt_state):
        whole = sum(x.nbytes for x in jax.tree.leaves(tree))
        for device in strategy.mesh.devices.flat:
            parts = [s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards
                     if s.device == device]  # fmt: skip
            assert sum(parts) / whole == pytest.approx(1 / 8, rel=0.05)


def test_the_state_is_born_cut(monkeypatch):
    """No device ever holds all of it: the compiled start has no output of the whole size."""
    seen = []
    jit = jax.jit

    def spy(fn, **options):
        seen.append(options.get("out_shardings"))
        return jit(fn, **options)

    monkeypatch.setattr(jax, "jit", spy)
    init_fn, _ = tiny.classifier("mlp")
    make_strategy("fsdp").init(lambda: create_state(init_fn, optax.sgd(1.0), key=jax.random.key(0)))
    assert any("fsdp" in str(shardings) for shardings in seen)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((16, 8), P("fsdp")), ((4, 24), P(None, "fsdp")), ((8, 8), P("fsdp")), ((7, 9), P()), ((), P())],
)
def test_the_longest_axis_that_divides_is_cut(shape, spec):
    assert Largest().spec(shape, make_mesh(sizes={"fsdp": 8})) == spec
    assert Largest().spec(shape, make_mesh(8)) == P()


def test_a_parameter_without_a_rule_or_an_even_part_is_an_error():
    mesh = make_mesh(sizes={"tensor": 8})
    tree = {"params": {"odd": jax.ShapeDtypeStruct((12,), jnp.float32)}}
    with pytest.raises(errors.ConfigError, match="no sharding rule for params/odd"):
        shard_by_rules(tree, MLP_RULES, mesh)
    with pytest.raises(errors.ConfigError, match=r"cuts params/odd \(12,\) into 8 parts over tensor"):
        shard_by_rules(tree, [("odd", P("tensor"))], mesh)
    assert shard_by_rules(tree, CUT_LARGEST, mesh)["params"]["odd"].spec == P()


@pytest.mark.parametrize("text", ["data", "data=0", "data=x", "data=2,data=2", "data=-1", "=2", ""])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(errors.ConfigError, match=r"is written as|unknown mesh axis"):
        read_sizes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {"data": 3, "fsdp": 3}}, "9 devices asked for; there are 8"),
        ({"sizes": {"data": 2}, "num_devices": 4}, "a mesh of data=2 has 2 devices, not 4"),
        ({"name": "fsdp", "sizes": {"data": 2}}, "in place of the strategy 'fsdp'"),
        ({"name": "tensor"}, "needs sharding rules"),
        ({"virtual_shards": 8, "num_devices": 3}, "3 devices don't divide the 8 shards"),
        ({"virtual_shards": 8, "name": "fsdp"}, "the fixed order takes the strategy 'jit'"),
        ({"virtual_shards": -8}, "has -8 shards"),
    ],
)
def test_meshes_that_cannot_be(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        make_strategy(**options)


def test_activations_are_cut_where_a_model_names_their_axes():
    strategy = make_strategy(sizes={"data": 2, "tensor": 4}, rules=[(".*", P())])
    seen = {}

    def look(name, x):
        jax.debug.inspect_array_sharding(
            x, callback=lambda s: seen.setdefault(name, s.shard_shape(x.shape))
        )

    from jaxnets.layers import constrain

    def make_step(axis_name):
        def step(state, batch):
            look("hidden", constrain(batch["x"] * 2, "batch", None, "hidden"))
            look("time", constrain(batch["x"] * 3, "batch", "time", None))
            look("odd", constrain(batch["x"][:, :3] * 4, "batch", "time", None))  # 3 don't make 4 parts
            return jnp.sum(batch["x"])

        return step

    strategy.compile_eval(make_step)({}, {"x": np.ones((4, 8, 16), np.float32)})
    assert seen == {"hidden": (2, 8, 4), "time": (2, 2, 16), "odd": (2, 3, 16)}
