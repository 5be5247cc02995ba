import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import metrics
from jaxnets.data import Arrays, Batches, Stream
from jaxnets.train import (
    Prefetch,
    create_state,
    evaluate,
    make_eval_step,
    make_strategy,
    make_train_step,
)

BATCHES = Batches(96, 32, 4 * 32 - 7, seed=3)
TX = optax.adam(0.01)


def run(
    num_devices, *, virtual_shards=8, name="mlp", accumulate=1, is_streamed=False, dtype=jnp.float32
):
    strategy = make_strategy(num_devices=num_devices, virtual_shards=virtual_shards)
    init_fn, loss_fn = tiny.classifier(name)

    def make_state():
        return tiny.to_float(create_state(init_fn, TX, key=jax.random.key(1)), dtype)

    make_step = functools.partial(make_train_step, loss_fn, TX, accumulate=accumulate)
    data = tiny.arrays()
    step = strategy.compile_step(make_step, None if is_streamed else data)
    state, losses = strategy.init(make_state), []
    stream = Stream(Arrays(data), BATCHES, prefetch=0)
    with Prefetch(stream, strategy.put_batch, depth=0) as fed:
        for i in range(len(BATCHES)):
            state, values = step(state, fed[i] if is_streamed else BATCHES[i])
            losses.append(float(values["loss"]))

    def eval_fn(params, model_state, batch):
        terms, _, _ = loss_fn(params, model_state, batch, key=jax.random.key(0))
        return {"loss": metrics.Mean.of(terms["loss"], batch["mask"])}

    eval_step = strategy.compile_eval(functools.partial(make_eval_step, eval_fn), data)
    return state, losses, evaluate(eval_step, state, Batches(96, 40, 96, shuffle=False))


def assert_same_bits(one, two):
    for a, b in zip(
        jax.tree.leaves(tiny.learnt(one[0])), jax.tree.leaves(tiny.learnt(two[0])), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert one[1:] == two[1:]


@pytest.mark.parametrize("name", ["mlp", pytest.param("convnet", marks=pytest.mark.long)])
def test_bits_do_not_depend_on_the_number_of_devices(name):
    one = run(1, name=name)
    assert one[1][-1] < one[1][0]
    assert one[2]["count"] == 96
    assert_same_bits(one, run(4, name=name))


@pytest.mark.long
@pytest.mark.parametrize("num_devices", [2, 8])
def test_bits_on_other_numbers_of_devices(num_devices):
    assert_same_bits(run(1), run(num_devices))


@pytest.mark.long
def test_without_the_fixed_order_they_do():
    """Or the test above would hold anyway."""
    one, eight = (jax.tree.leaves(run(n, virtual_shards=0)[0].params) for n in (1, 8))
    assert not all(np.array_equal(a, b) for a, b in zip(one, eight, strict=True))


def test_it_computes_what_a_step_does(x64):
    """Dropout, masks and moments too; a model without batch statistics."""
    fixed, plain = run(2, dtype=jnp.float64), run(1, virtual_shards=0, dtype=jnp.float64)
    assert tiny.relative_difference(tiny.learnt(plain[0]), tiny.learnt(fixed[0])) < 1e-12
    np.testing.assert_allclose(fixed[1], plain[1], rtol=1e-12)
    assert fixed[2] == pytest.approx(plain[2], rel=1e-12)


@pytest.mark.long
def test_streams_and_micro_batches():
    assert_same_bits(run(2), run(4, is_streamed=True))
    assert_same_bits(run(1, accumulate=2), run(4, accumulate=2))


def test_running_statistics_are_the_mean_of_the_shards():
    strategy = make_strategy(num_devices=1, virtual_shards=4)

    def loss_fn(params, model_state, batch, *, key):
        changed = {"sum": jnp.sum(batch["x"]), "count": model_state["count"] + 1}
        return {"loss": batch["x"] * params}, changed, {}

    first = {"sum": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    tx = optax.sgd(0.0)
    state = strategy.init(
        lambda: create_state(lambda _: (jnp.ones(()), first), tx, key=jax.random.key(0))
    )
    step = strategy.compile_step(functools.partial(make_train_step, loss_fn, tx))
    batch = {"x": np.arange(8, dtype=np.float32), "index": np.arange(8), "mask": np.ones(8, bool)}
    state, values = step(state, batch)
    assert float(state.model_state["sum"]) == 28 / 4
    assert int(state.model_state["count"]) == 1
    assert float(values["loss"]) == 28 / 8
