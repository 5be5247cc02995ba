"""The state of a run: all of it is kept, in its own precision, on every device alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import errors, registry, runner
from jaxnets.data import Batches
from jaxnets.layers import BatchNorm
from jaxnets.train import (
    Checkpoints,
    create_state,
    fit,
    make_schedule,
    make_strategy,
    make_train_step,
    optim,
)
from tests.traps import probe

BATCHES = Batches(64, 16, 16 * 10)


def problem(where, *, tx=None, accumulate=1, dtype=None, use_ema=True):
    """`(step, make_state)` of the tiny net with batch statistics, resident data and an average."""
    init_fn, _, loss_fn = probe.normed(dtype=dtype)
    tx = tx or optim.adamw(0.01)
    make_step = functools.partial(
        make_train_step, loss_fn, tx, accumulate=accumulate, ema_decay=0.9 if use_ema else None
    )
    step = where.compile_step(make_step, probe.arrays(64))
    return step, lambda: create_state(init_fn, tx, key=jax.random.key(0), use_ema=use_ema)


@pytest.mark.parity
@pytest.mark.parametrize("momentum", [0.9, 0.6])
def test_batch_normalisation_is_pytorchs_after_ten_updates(momentum, x64):
    """Momentum the other way round, the unbiased variance in the running one only, epsilon inside."""
    import torch

    theirs = torch.nn.BatchNorm2d(3, momentum=1 - momentum, dtype=torch.float64)
    layer, rng = BatchNorm(momentum=momentum), np.random.default_rng(0)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 2, 2, 3)), train=False)
    params = {"scale": jnp.asarray([1.0, -2.0, 0.5]), "bias": jnp.asarray([0.0, 1.0, -1.0])}
    variables = {"params": params, "batch_stats": tiny.to_float(variables, jnp.float64)["batch_stats"]}
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(params["scale"])))
        theirs.bias.copy_(torch.tensor(np.asarray(params["bias"])))
    train = jax.jit(lambda v, x: layer.apply(v, x, train=True, mutable=["batch_stats"]))

    def both(x, ours):
        found = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy()
        np.testing.assert_allclose(ours, found.transpose(0, 2, 3, 1), rtol=1e-10, atol=1e-12)

    for _ in range(10):  # few elements, so that biased and unbiased differ
        x = rng.normal(size=(2, 2, 2, 3)) * [1e-3, 3.0, 0.1] + [0.0, 5.0, -2.0]
        out, changed = train(variables, jnp.asarray(x))
        variables = {**variables, **changed}
        both(x, out)
    stats = variables["batch_stats"]
    np.testing.assert_allclose(stats["mean"], theirs.running_mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(stats["var"], theirs.running_var.numpy(), rtol=1e-12)
    theirs.eval()
    both(x, layer.apply(variables, jnp.asarray(x), train=False))


@pytest.mark.parametrize(
    ("strategy", "num_devices"), [pytest.param("jit", 1, marks=pytest.mark.long), ("pmap", 2)]
)
def test_statistics_are_updated_once_a_micro_batch_frozen_or_not(strategy, num_devices):
    """One after the other, over all devices' parts of it; freezing parameters leaves that as it is."""
    where = make_strategy(strategy, num_devices=num_devices)
    tx = optim.frozen(optim.sgd(0.0), ["^norm/", "^dense/"])
    step, make_state = problem(where, tx=tx, accumulate=4, use_ema=False)
    state, draw = where.init(make_state), BATCHES[0]
    params = jax.device_get(state.params)
    state, _ = step(state, draw)
    probe.assert_same(state.params["norm"], params["norm"])
    x = probe.arrays(64)["image"][draw["index"]].reshape(16, -1) / 127.5 - 1
    x = x @ params["dense"]["kernel"].astype(np.float64) + params["dense"]["bias"]
    mean, var = np.zeros(8), np.ones(8)
    for m in range(4):
        part = x[m::4]  # the rows m, m + 4, ... of each device's part
        if num_devices == 2:
            part = np.concatenate([x[:8][m::4], x[8:][m::4]])
        mean = 0.9 * mean + 0.1 * part.mean(0)
        var = 0.9 * var + 0.1 * part.var(0, ddof=1)
    stats = state.model_state["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4)


# Of Adam with clipping and an average. A leaf more or less is a change of the format of checkpoints:
# old ones need to be read, and what is new must come back from one.
LEAVES = """
ema/dense/bias float32[8]
ema/dense/kernel float32[16, 8]
ema/head/bias float32[4]
ema/head/kernel float32[8, 4]
ema/norm/bias float32[8]
ema/norm/scale float32[8]
guard int32[]
key key<fry>[]
model_state/batch_stats/norm/mean float32[8]
model_state/batch_stats/norm/var float32[8]
opt_state/1/0/count int32[]
opt_state/1/0/mu/dense/bias float32[8]
opt_state/1/0/mu/dense/kernel float32[16, 8]
opt_state/1/0/mu/head/bias float32[4]
opt_state/1/0/mu/head/kernel float32[8, 4]
opt_state/1/0/mu/norm/bias float32[8]
opt_state/1/0/mu/norm/scale float32[8]
opt_state/1/0/nu/dense/bias float32[8]
opt_state/1/0/nu/dense/kernel float32[16, 8]
opt_state/1/0/nu/head/bias float32[4]
opt_state/1/0/nu/head/kernel float32[8, 4]
opt_state/1/0/nu/norm/bias float32[8]
opt_state/1/0/nu/norm/scale float32[8]
params/dense/bias float32[8]
params/dense/kernel float32[16, 8]
params/head/bias float32[4]
params/head/kernel float32[8, 4]
params/norm/bias float32[8]
params/norm/scale float32[8]
step int32[]
"""


def test_every_leaf_is_in_the_checkpoint_and_comes_back_to_be_used_up(tmp_path):
    """bfloat16 computes; parameters, moments, averages and statistics stay float32, also when restored.

    The restored state goes on as the one that was saved, bit for bit, and its memory with it.
    """
    where = make_strategy(num_devices=2)
    tx = optim.clipped(optim.adam(0.01), 1.0)
    step, make_state = problem(where, tx=tx, dtype=jnp.bfloat16)
    state = where.init(make_state)
    for i in range(3):
        state, _ = step(state, BATCHES[i])
    state = dataclasses.replace(state, guard=jnp.full_like(state.guard, -1))
    expected = probe.host(state)
    for path, x in jax.tree_util.tree_leaves_with_path(expected):
        assert x.dtype in (np.float32, np.int32, np.uint32), jax.tree_util.keystr(path)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
    manifest = Checkpoints(tmp_path / "c").manifest(3)
    assert {f"{name} {kind}" for name, kind in manifest.arrays.items()} == set(LEAVES.split("\n")[1:-1])
    restored, _ = Checkpoints(tmp_path / "c").restore(3, where.abstract(make_state))
    probe.assert_same(restored, expected)
    memory = pointers(restored)
    state, values = step(state, BATCHES[3])
    again, others = step(restored, BATCHES[3])
    probe.assert_same((again, others), (state, values))
    # Or the first step after a restart holds the state twice.
    assert len(memory) == 25
    assert pointers(again) == memory


def pointers(tree):
    """Where the leaves' memory is, on the first device."""
    words = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        {"params": tree.params, "ema": tree.ema, "opt_state": tree.opt_state},
    )
    return {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(words)}


def test_a_tree_of_every_dtype_and_odd_shapes_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    params = {}
    for dtype in ("float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool"):
        for shape in ((), (1,), (3, 1, 2), (257, 3)):
            values = rng.integers(0, 2 if dtype == "bool" else 100, shape)
            params[f"{dtype}{list(shape)}"] = jnp.asarray(values).astype(dtype)
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38], np.float32)
    params["odd"] = {"deep": [jnp.asarray(odd), (jnp.asarray(odd[::-1].copy()),)]}

    def make_state():
        return create_state(lambda key: (params, {}), optax.identity(), key=jax.random.key(1))

    where = make_strategy(num_devices=2)
    state = where.init(make_state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
    restored, _ = Checkpoints(tmp_path / "c").restore(0, where.abstract(make_state))
    probe.assert_same(restored, state)
    probe.assert_same(restored.params, params)


@pytest.mark.parametrize(
    ("name", "num_devices", "accumulate"),
    [*(pytest.param("jit", 8, k, marks=pytest.mark.long) for k in (1, 2)), ("pmap", 8, 2)],
)
def test_every_device_holds_the_same_bytes_after_every_step(name, num_devices, accumulate):
    """Gradients, statistics, moments and metrics are added over the devices, once."""
    where = make_strategy(name, num_devices=num_devices)
    step, make_state = problem(where, accumulate=accumulate)
    state = where.init(make_state)
    for i in range(4):
        state, values = step(state, BATCHES[i])
        for path, leaf in jax.tree_util.tree_leaves_with_path((state, values)):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
            assert len(leaf.addressable_shards) == num_devices
            assert len(copies) == 1, (i, jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "num_devices"), [("jit", 2), pytest.param("pmap", 2, marks=pytest.mark.long)]
)
def test_a_state_is_used_up_and_that_changes_no_number(name, num_devices, monkeypatch):
    """A warning that a buffer could not be used up is an error in tests."""
    results = []
    for is_donated in (True, False):
        where = make_strategy(name, num_devices=num_devices)
        with monkeypatch.context() as patch:
            if not is_donated:
                for attribute in ("jit", "pmap"):
                    made = getattr(jax, attribute)

                    def kept(fun, *args, made=made, **options):
                        return made(fun, *args, **{**options, "donate_argnums": ()})

                    patch.setattr(jax, attribute, kept)
            step, make_state = problem(where)
        state, seen = where.init(make_state), []
        for i in range(3):
            old = state
            state, values = step(state, BATCHES[i])
            seen.append(probe.host(values))
            used = {leaf.is_deleted() for leaf in jax.tree.leaves(old)}
            assert used == {is_donated}
        results.append((probe.host(state), seen))
    probe.assert_same(*results)


@pytest.mark.parametrize(
    ("name", "has_64_bits"), [("adamw", False), *((name, True) for name in registry.names("optimizer"))]
)
def test_a_step_gives_back_the_types_that_it_took(name, has_64_bits):
    """No dtype that is only weak and no float64 creeps in: the program is traced once for the run."""
    make = registry.get("optimizer", name)
    tx = optim.clipped(make(make_schedule("cosine", 0.1, 10), momentum=0.9, weight_decay=0.1), 1.0)
    init_fn, _, loss_fn = probe.normed()
    with jax.enable_x64(has_64_bits):
        step = make_train_step(loss_fn, tx, accumulate=2, ema_decay=0.9)

        def make_state():
            state = create_state(init_fn, tx, key=jax.random.key(0), use_ema=True)
            return tiny.to_float(state, jnp.float32)

        draw = BATCHES[0]
        batch = {name: x[draw["index"]] for name, x in probe.arrays(64).items()} | dict(draw)

        def types(tree):
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            return {jax.tree_util.keystr(p): (x.shape, x.dtype, x.weak_type) for p, x in leaves}

        before = jax.eval_shape(make_state)
        after, _ = jax.eval_shape(step, before, batch)
        assert types(after) == types(before)
        assert not any(is_weak for *_, is_weak in types(before).values())


def test_the_last_steps_that_32_bits_can_number():
    """Positions, keys and rates go on to step 2**31 - 1, and a run of one more is refused."""
    last = 2**31 - 1
    batches = Batches(64, 16, 16 * last, seed=3)
    schedule = make_schedule("linear", 0.5, last)
    tx = optim.sgd(schedule)
    seen = []

    def loss_fn(params, model_state, batch, *, key):
        noise = jax.random.uniform(key)
        table = {"noise": noise, "position": batch["position"][0].astype(jnp.uint32)}
        return {"loss": params * jnp.ones(16)}, model_state, {
            name: probe.Table(x) for name, x in table.items()
        }  # fmt: skip

    where = make_strategy(num_devices=1)
    step = where.compile_step(functools.partial(make_train_step, loss_fn, tx))
    state = where.init(lambda: create_state(lambda key: (jnp.float32(1), {}), tx, key=jax.random.key(0)))
    late = jax.tree.map(lambda x: jnp.full_like(x, last - 3), (state.step, state.opt_state))
    state = dataclasses.replace(state, step=late[0], opt_state=late[1])

    def hook(number, state, metrics):
        seen.append((number, int(state.step), metrics.read()["noise"], metrics.read()["position"]))

    state, reason = fit(step, state, batches, hooks=[hook])
    assert reason is None
    assert [row[:2] for row in seen] == [(i, i) for i in range(last - 2, last + 1)]
    assert [row[3] for row in seen] == [16 * i % 2**32 for i in range(last - 3, last)]
    assert len({row[2] for row in seen}) == 3
    assert int(state.step) == last
    assert schedule(last - 1) == pytest.approx(0.5 / last, rel=1e-12)
    assert np.isfinite(float(state.params))
    recipe = probe.recipe(batch_size=16)
    runner.check_recipe(dataclasses.replace(recipe, num_positions=16 * last), where)
    with pytest.raises(errors.ConfigError, match=f"more than {last} steps"):
        runner.check_recipe(dataclasses.replace(recipe, num_positions=16 * last + 1), where)
