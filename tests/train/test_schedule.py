import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxnets import errors
from jaxnets.data import Batches
from jaxnets.train import create_state, make_schedule, make_strategy, make_train_step, optim


def test_corners():
    rate = make_schedule("linear", 0.5, 100, warmup=0.1, end=0.2)
    for step, expected in [(0, 0), (5, 0.25), (10, 0.5), (55, 0.3), (100, 0.1), (200, 0.1)]:
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)
    cosine = make_schedule("cosine", 0.5, 100)
    for step, expected in [(0, 0.5), (25, 0.25 * (1 + np.sqrt(0.5))), (50, 0.25), (100, 0)]:
        np.testing.assert_allclose(cosine(step), expected, rtol=1e-6, atol=1e-8)
    constant = make_schedule("constant", 0.5, 100, warmup=0.5)
    for step, expected in [(0, 0), (25, 0.25), (50, 0.5), (100, 0.5)]:
        np.testing.assert_allclose(constant(step), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(55)), rate(55))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("cosin", 0.1, 10), {}, "did you mean 'cosine'"),
        (("cosine", float("inf"), 10), {}, "finite"),
        (("cosine", -0.1, 10), {}, "at least 0"),
        (("cosine", 0.1, 0), {}, "at least 1 step"),
        (("cosine", 0.1, 10), {"warmup": 1.0}, "warmup"),
        (("cosine", 0.1, 10), {"end": 1.5}, "share of the peak"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(errors.ConfigError, match=message):
        make_schedule(*arguments, **options)


def test_the_optimizer_follows_the_schedule_across_a_restart():
    """With a gradient of 1 each update is the rate; a state taken out and put back goes on."""
    rate = make_schedule("linear", 0.8, 8, warmup=0.25)
    tx = optim.sgd(rate)
    params = {"w": jnp.zeros(())}
    opt_state, seen = tx.init(params), []
    for step in range(8):
        if step == 5:
            leaves, structure = jax.tree.flatten(opt_state)
            opt_state = structure.unflatten([jnp.asarray(np.asarray(x)) for x in leaves])
        updates, opt_state = tx.update({"w": jnp.ones(())}, opt_state, params)
        seen.append(-float(updates["w"]))
    np.testing.assert_allclose(seen, [float(rate(t)) for t in range(8)], rtol=1e-6)


def test_the_average_equals_its_closed_form(x64):
    init_fn, loss_fn = tiny.classifier("mlp")
    tx = optim.sgd(0.1)
    make = make_train_step(loss_fn, tx, ema_decay=0.7)
    where = make_strategy(num_devices=1)
    step = where.compile_step(lambda axis_name: make, tiny.arrays())
    state = where.init(lambda: create_state(init_fn, tx, key=jax.random.key(0), use_ema=True))
    history = [jax.device_get(state.params)]
    for draw in tiny.draws(Batches(96, 16, 5 * 16)):
        state, _ = step(state, draw)
        history.append(jax.device_get(state.params))
    weights = [0.7**5] + [0.3 * 0.7 ** (5 - i) for i in range(1, 6)]
    assert abs(sum(weights) - 1) < 1e-12
    expected = jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)), *history
    )
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_an_average_needs_both_ends():
    init_fn, loss_fn = tiny.classifier("mlp")
    tx = optim.sgd(0.1)
    batch = {**tiny.arrays(8), "index": np.arange(8), "mask": np.ones(8, bool)}
    for decay, use_ema in ((0.9, False), (None, True)):
        state = create_state(init_fn, tx, key=jax.random.key(0), use_ema=use_ema)
        with pytest.raises(ValueError, match="ema_decay"):
            jax.eval_shape(make_train_step(loss_fn, tx, ema_decay=decay), state, batch)
    with pytest.raises(ValueError, match="lies in"):
        make_train_step(loss_fn, tx, ema_decay=1.0)
