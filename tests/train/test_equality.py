"""One device equals eight, and micro-batches equal the batch: the promises that the rest rests on."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import registry
from jaxnets.data import Batches, load

MODELS = [
    name if name == "mlp" else pytest.param(name, marks=pytest.mark.long)
    for name in registry.names("model")
    if name in tiny.TINY
]
# 50 steps of 16 rows from 96 examples, the last one short: shuffled epochs, padding and masks.
FIFTY = Batches(96, 16, 50 * 16 - 5, seed=3)


@pytest.mark.parametrize("name", MODELS)
def test_float64_after_50_steps(name, x64):
    init_fn, loss_fn = tiny.classifier(name)
    data, draws = tiny.arrays(), tiny.draws(FIFTY)
    one, losses = tiny.run(init_fn, loss_fn, draws, data, dtype=jnp.float64)
    assert losses[-1] < losses[0]
    for strategy in ("jit", "pmap"):
        eight, others = tiny.run(
            init_fn, loss_fn, draws, data, strategy=strategy, num_devices=8, dtype=jnp.float64
        )
        assert tiny.relative_difference(tiny.learnt(one), tiny.learnt(eight)) < 1e-9, strategy
        np.testing.assert_allclose(others, losses, rtol=1e-9)


@pytest.mark.parametrize(
    "name",
    [name if name == "mlp" else pytest.param(name, marks=pytest.mark.long) for name in tiny.TINY],
)
def test_float32(name):
    """After one step for every model; after 50 for those without batch statistics.

    With BatchNorm float32 rounding grows exponentially over steps, so the next test prints it; the
    float64 test above shows that the computation is the same. Real images at a rate that learns, since
    a ReLU or a maximum that rounding tips over moves a run by more than rounding (4e-4 was seen at ten
    times the rate).
    """
    init_fn, loss_fn = tiny.classifier(name, size=32, num_classes=10)
    digits = load("digits", progress=False).train
    digits = {key: x[:96] for key, x in digits.items()}
    draws = tiny.draws(FIFTY)[: 1 if name in tiny.HAS_BATCH_STATISTICS else 50]
    tx = optax.sgd(0.001, momentum=0.9)
    one, _ = tiny.run(init_fn, loss_fn, draws, digits, tx=tx)
    for strategy in ("jit", "pmap"):
        eight, _ = tiny.run(init_fn, loss_fn, draws, digits, tx=tx, strategy=strategy, num_devices=8)
        # SpeedNet's biases start at 0, so a step leaves them as large as a sum in which much cancels.
        bound = 3e-5 if name == "speednet" else 1e-5
        assert tiny.relative_difference(one.params, eight.params) < bound, strategy


@pytest.mark.long
@pytest.mark.parametrize("name", tiny.HAS_BATCH_STATISTICS)
def test_float32_drift_with_batch_statistics_is_printed(name, record_property):
    init_fn, loss_fn = tiny.classifier(name)
    tx, draws = optax.sgd(0.001, momentum=0.9), tiny.draws(FIFTY)
    one, eight = (
        tiny.run(init_fn, loss_fn, draws, tiny.arrays(), tx=tx, num_devices=n)[0] for n in (1, 8)
    )
    drift = tiny.relative_difference(one.params, eight.params)
    assert np.isfinite(drift)
    record_property("figure", f"float32 drift of {name} on 8 devices after 50 steps: {drift:.1e}")


@pytest.mark.parametrize(
    "name",
    [name if name == "mlp" else pytest.param(name, marks=pytest.mark.long) for name in tiny.TINY],
)
def test_micro_batches_equal_the_batch(name, x64):
    """1 x 64 = 8 x 8 = 2 devices x 4 x 8; with BatchNorm the micro-batch over all devices counts."""
    init_fn, loss_fn = tiny.classifier(name)
    data = tiny.arrays(num_examples=128)
    draws = tiny.draws(Batches(128, 64, 3 * 64 - 20, seed=5))
    runs = {
        (accumulate, devices, strategy): tiny.run(
            init_fn,
            loss_fn,
            draws,
            data,
            accumulate=accumulate,
            num_devices=devices,
            strategy=strategy,
            dtype=jnp.float64,
        )
        for accumulate, devices, strategy in [
            (1, 1, "jit"),
            (8, 1, "jit"),
            (4, 2, "jit"),
            (4, 2, "pmap"),
            (4, 1, "jit"),
        ]
    }

    def difference(a, b):
        assert np.allclose(runs[a][1], runs[b][1], rtol=1e-10)
        return tiny.relative_difference(tiny.learnt(runs[a][0]), tiny.learnt(runs[b][0]))

    assert difference((4, 1, "jit"), (4, 2, "jit")) < 1e-9
    assert difference((4, 1, "jit"), (4, 2, "pmap")) < 1e-9
    if name not in tiny.HAS_BATCH_STATISTICS:  # whose statistics are those of a micro-batch
        assert difference((1, 1, "jit"), (8, 1, "jit")) < 1e-9
        assert difference((1, 1, "jit"), (4, 2, "jit")) < 1e-9


def test_dropout_is_on_in_these_runs(x64):
    """Or the equalities above would say nothing about it."""
    data, draws = tiny.arrays(), tiny.draws(FIFTY)[:2]
    init_fn, loss_fn = tiny.classifier("mlp")
    state, _ = tiny.run(init_fn, loss_fn, draws, data, dtype=jnp.float64)
    moved = [{**draw, "index": draw["index"][::-1], "mask": draw["mask"][::-1]} for draw in draws]
    same, _ = tiny.run(init_fn, loss_fn, moved, data, dtype=jnp.float64)
    assert tiny.relative_difference(state.params, same.params) < 1e-12

    def other_rows(params, model_state, batch, *, key):
        return loss_fn(params, model_state, {**batch, "index": batch["index"] + 1}, key=key)

    other, _ = tiny.run(init_fn, other_rows, draws, data, dtype=jnp.float64)
    assert tiny.relative_difference(state.params, other.params) > 1e-4
