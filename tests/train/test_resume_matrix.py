"""Saved on any devices, gone on with on any others: the same examples, counters and parameters."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxnets import metrics
from jaxnets.data import Batches
from jaxnets.train import Checkpoints, create_state, make_strategy, make_train_step

DRAWS = Batches(96, 16, 12 * 16 - 5, seed=3)  # six steps an epoch, the last batch short
STOPS = (4, 9, 12)  # within the first epoch, within the second, at the end
TX = optax.adam(0.003)
RULES = [
    ("dense1/kernel", P("fsdp", "tensor")),
    ("dense2/kernel", P("tensor", "fsdp")),
    (".*", P()),
]
STRATEGIES = {
    "jit": {},
    "pmap": {"name": "pmap"},
    "fsdp": {"name": "fsdp", "rules": RULES},
    "tensor": {"name": "tensor", "rules": RULES},
    "mesh": {"sizes": {"data": 2, "fsdp": 2, "tensor": 2}, "rules": RULES},
}
NUMBERS = (1, 2, 4, 8)


@functools.cache
def compiled(**options):
    options |= STRATEGIES[options.pop("strategy", "jit")]
    strategy = make_strategy(**options)
    init_fn, tiny_loss_fn = tiny.classifier("mlp")  # with dropout

    def loss_fn(params, model_state, batch, *, key):
        terms, model_state, _ = tiny_loss_fn(params, model_state, batch, key=key)
        # Whole numbers below 2**24, which add up exactly in any order.
        seen = (batch["index"] * (batch["position"] % 97)).astype(np.float32)
        return terms, model_state, {"seen": metrics.Mean.of(seen, batch["mask"])}

    def make_state():
        return create_state(init_fn, TX, key=jax.random.key(1), use_ema=True)

    make_step = functools.partial(make_train_step, loss_fn, TX, ema_decay=0.9)
    return strategy, make_state, strategy.compile_step(make_step, tiny.arrays())


def leg(folder, until, **options):
    """Go on to a step and save; what was seen on the way, and the state on the host."""
    strategy, make_state, step = compiled(**options)
    with Checkpoints(folder) as checkpoints:
        state, _, _ = tiny.restore_latest(checkpoints, strategy.abstract(make_state))
        state = strategy.init(make_state) if state is None else state
        seen = []
        for i in range(int(state.step), until):
            state, values = step(state, DRAWS[i])
            seen.append(float(values["seen"]))
        checkpoints.save(state)
        if not strategy.has_all:
            whole = jax.NamedSharding(strategy.mesh, P())
            state = jax.jit(lambda tree: tree, out_shardings=whole)(state)
        return seen, jax.device_get((*tiny.learnt(state), state.ema, state.step, state.guard))


@functools.cache
def unbroken(**options):
    strategy, make_state, step = compiled(**options)
    state, seen = strategy.init(make_state), []
    for i in range(STOPS[-1]):
        state, values = step(state, DRAWS[i])
        seen.append(float(values["seen"]))
    return seen, jax.device_get((*tiny.learnt(state), state.ema, state.step, state.guard))


def check(tmp_path, legs, *, is_exact=False, reference):
    seen = []
    for until, options in zip(STOPS, legs, strict=True):
        here, state = leg(tmp_path / "c", until, **options)
        seen += here
    expected, whole = unbroken(**reference)
    assert seen == expected
    assert len(set(seen)) == len(seen)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        if is_exact or a.dtype.kind in "iu":
            np.testing.assert_array_equal(a, b)
    assert tiny.relative_difference(whole[:3], state[:3]) < 1e-5


def pairs(quick):
    return [
        pair if pair in quick else pytest.param(*pair, marks=pytest.mark.long)
        for pair in itertools.product(NUMBERS, NUMBERS)
    ]


@pytest.mark.parametrize(("first", "then"), pairs([(8, 2)]))
def test_devices(tmp_path, first, then):
    legs = [{"num_devices": n} for n in (first, then, first)]
    check(tmp_path, legs, reference={"num_devices": 1})


@pytest.mark.parametrize(("first", "then"), pairs([(1, 2)]))
def test_devices_in_the_fixed_order(tmp_path, first, then):
    legs = [{"num_devices": n, "virtual_shards": 8} for n in (first, then, first)]
    reference = {"num_devices": 1, "virtual_shards": 8}
    check(tmp_path, legs, is_exact=True, reference=reference)


@pytest.mark.parametrize(
    "names",
    [
        ("jit", "fsdp", "tensor"),
        pytest.param(("pmap", "mesh", "pmap"), marks=pytest.mark.long),
        pytest.param(("tensor", "jit", "fsdp"), marks=pytest.mark.long),
        pytest.param(("mesh", "tensor", "jit"), marks=pytest.mark.long),
    ],
)
def test_strategies(tmp_path, names):
    check(tmp_path, [{"strategy": name} for name in names], reference={"num_devices": 1})
