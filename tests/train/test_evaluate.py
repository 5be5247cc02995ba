import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import Batches
from jaxnets.metrics import Mean
from jaxnets.train import evaluate, make_eval_step, make_strategy
from jaxnets.train.state import TrainState


def eval_fn(params, model_state, batch):
    value = batch["x"] * params
    return {
        "mean": Mean.of(value, batch["mask"]),
        "odd": Mean.of(batch["id"] % 2 == 1, batch["mask"]),
    }


def state_of(params, ema=None):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, {}, (), jnp.zeros(2), ema, zero - 1)


@pytest.mark.parametrize(("name", "devices"), [("jit", 1), ("jit", 8), ("pmap", 2), ("pmap", 8)])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17, 25])
def test_every_example_counts_once(name, devices, size):
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    data = {"x": x, "id": np.arange(size, dtype=np.int32)}
    strategy = make_strategy(name, num_devices=devices)
    step = strategy.compile_eval(functools.partial(make_eval_step, eval_fn), data)
    values = evaluate(step, state_of(jnp.float32(2)), Batches(size, 8, size, shuffle=False))
    assert values["count"] == size
    assert values["odd"] == (size // 2) / size
    np.testing.assert_allclose(values["mean"], 2 * x.astype(np.float64).mean(), rtol=1e-5)


def test_averaged_parameters_are_used_where_there_are_some():
    data = {"x": np.ones(4, np.float32), "id": np.arange(4, dtype=np.int32)}
    step = make_strategy(num_devices=1).compile_eval(functools.partial(make_eval_step, eval_fn), data)
    batches = Batches(4, 4, 4, shuffle=False)
    assert evaluate(step, state_of(jnp.float32(2), jnp.float32(5)), batches)["mean"] == 5


def test_sums_of_bfloat16_keep_their_fractions():
    def eval_fn(params, model_state, batch):
        return {"part": Total(jnp.sum(batch["x"] * batch["mask"], dtype=jnp.bfloat16))}

    data = {"x": np.full(12, 0.25, np.float32), "id": np.arange(12, dtype=np.int32)}
    step = make_strategy(num_devices=1).compile_eval(functools.partial(make_eval_step, eval_fn), data)
    found = evaluate(step, state_of(jnp.float32(1)), Batches(12, 3, 12, shuffle=False))
    assert found["part"] == 3  # of four batches, 0.75 each


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Total:
    total: jax.Array

    def compute(self):
        return self.total


def test_sums_do_not_lose_digits():
    """One float32 sum over all of it would be off by 1e-4; those of batches by their own rounding."""
    size = 2**17 + 1
    x = np.full(size, 0.1, np.float32)
    data = {"x": x, "id": np.arange(size, dtype=np.int32)}
    step = make_strategy(num_devices=1).compile_eval(functools.partial(make_eval_step, eval_fn), data)
    values = evaluate(step, state_of(jnp.float32(1)), Batches(size, 1024, size, shuffle=False))
    np.testing.assert_allclose(values["mean"], np.float64(np.float32(0.1)), rtol=1e-6)
    assert values["odd"] == 2**16 / size
