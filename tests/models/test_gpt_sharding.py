"""Where the parameters of the language model lie, and that it computes the same there."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnets import models, registry, train
from jaxnets.models.gpt import GPT, sharding_rules
from jaxnets.ops import partition
from tests.models.tiny_gpt import QUICK, TINY, T, assert_close, batch_of, compiled, mean_loss, start


def mesh_of(*sizes):
    devices = jax.devices()[: math.prod(sizes)]
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def states_of(model, tx, use_ema=True):
    init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, T), jnp.int32))
    make = partial(train.create_state, init_fn, tx, use_ema=use_ema)
    return jax.eval_shape(lambda: make(key=jax.random.key(0)))


def test_a_device_holds_an_eighth_of_any_state():
    for name in registry.names("optimizer"):
        tx = optax.chain(optax.clip_by_global_norm(1), registry.get("optimizer", name)(0.1))
        state = states_of(models.gpt_100m(tie_embeddings=False), tx)
        whole = sum(x.size for x in jax.tree.leaves(state))
        for sizes in ((1, 8, 1), (1, 1, 8), (1, 2, 4)):
            shardings = train.shard_by_rules(state, sharding_rules(), mesh_of(*sizes))
            parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), state, shardings)
            assert sum(jax.tree.leaves(parts)) < 1.005 * whole / 8, (name, sizes)


def test_moments_and_the_average_lie_with_their_parameter():
    state = states_of(GPT(**TINY, tie_embeddings=False), optax.adamw(0.1))
    shardings = train.shard_by_rules(state, sharding_rules(), mesh_of(2, 2, 2))
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    assert specs.params == specs.ema == specs.opt_state[0].mu == specs.opt_state[0].nu
    attention = specs.params["block2"]["attention"]
    assert attention["key"]["kernel"] == P("fsdp", "tensor")  # [D, N, K]
    assert attention["out"]["kernel"] == P("tensor", None, "fsdp")  # [N, K, D]
    assert specs.params["block1"]["mlp"]["up"]["kernel"] == P("fsdp", "tensor")  # [D, F]
    assert specs.params["block1"]["mlp"]["down"]["kernel"] == P("tensor", "fsdp")  # [F, D]
    assert specs.params["token_embedding"]["embedding"] == P("tensor", "fsdp")  # [V, D]
    assert specs.params["head"]["kernel"] == P("fsdp", "tensor")  # [D, V]
    assert specs.step == specs.key == specs.guard == specs.opt_state[0].count == P()


@pytest.mark.parametrize(
    "name",
    [
        "params/strange",
        "params/block1/attention/rotary/kernel",
        "params/block1/attention/query/kernel2",
        "params/block1/adapter/mlp/up/kernel",
        "params/myblock1/mlp/up/kernel",
        "params/block1/norm3/scale",
        "params/head/kernel/0",
        "params/step",
        "opt_state/0/mu/strange",
        "params/count",
    ],
)
def test_a_parameter_without_a_rule_is_an_error(name):
    tree = np.zeros((8, 8))
    for part in reversed(name.split("/")):
        tree = {part: tree}
    with pytest.raises(ValueError, match=f"no sharding rule for {name}"):
        train.shard_by_rules(tree, sharding_rules(), mesh_of(1, 2, 2))


@pytest.mark.parametrize(
    ("sizes", "time", "fields"),
    [
        ((2, 2, 2), None, {"dropout_rate": 0.3}),
        ((1, 2, 4), "tensor", {"remat": "full", "tie_embeddings": False}),
    ],
)
def test_eight_devices_equal_one(sizes, time, fields, x64, capfd):
    tied = {name: x for name, x in fields.items() if name == "tie_embeddings"}
    # Divisible by the tensor axis, or its sequences could not be cut over it.
    batch = {name: x if x.ndim == 1 else np.tile(x, 2)[:, :8] for name, x in batch_of().items()}
    params, step = start(np.float64, **tied), compiled(**fields)
    expected = step(params, batch)
    mesh = mesh_of(*sizes)
    rows = ("data", "fsdp")
    rules = {"batch": rows, "time": time, "heads": "tensor", "hidden": "tensor", "vocabulary": "tensor"}
    shardings = train.shard_by_rules(params, sharding_rules(), mesh)

    def spread(params, batch):
        with partition.activation_rules(mesh, rules):
            mean = partial(mean_loss, **fields)
            (loss, logits), grads = jax.value_and_grad(mean, has_aux=True)(params, batch)
        return loss, jax.lax.with_sharding_constraint(grads, shardings), logits

    arguments = jax.device_put((params, batch), (shardings, NamedSharding(mesh, P(rows))))
    lowered = jax.jit(spread).lower(*arguments)
    loss, grads, logits = lowered.compile(QUICK)(*arguments)
    assert_close((loss, grads), expected, 1e-12)
    assert loss.dtype == jnp.float64
    assert logits.sharding.is_equivalent_to(NamedSharding(mesh, P(rows, None, "tensor")), 3)
    kernel = grads["block1"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16 // sizes[1], 4 // sizes[2], 4)
    # XLA says so where it finds no other way than to copy a whole array to every device.
    assert "full rematerialization" not in capfd.readouterr().err
    text = lowered.as_text()
    # What the model says of its activations, in the order of the forward pass.
    found = re.findall(r"sharding_constraint .*<@mesh, (\[.*\])>", text)
    rows = '{"data", "fsdp"}'
    residual = f'[{rows}, {{"tensor"}}, {{}}]' if time else f"[{rows}, {{}}, {{}}]"
    heads, last = f'[{rows}, {{}}, {{"tensor"}}, {{}}]', f'[{rows}, {{}}, {{"tensor"}}]'
    block = [heads] * 4 + [residual, last, residual]
    expected = ['[{"tensor"}, {}]', "[{}, {}]", residual, *block * TINY["num_layers"], last]
    assert found[: len(expected)] == expected
