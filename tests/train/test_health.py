"""Steps that are skipped, by the step itself and over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import errors
from jaxnets.recipe import Recipe
from jaxnets.train import Checkpoints, create_state, health, make_strategy, make_train_step
from jaxnets.train.flops import primitives
from jaxnets.train.health import MAX_IN_A_ROW, WARM_UP, WINDOW, fresh_health, judge

TX = optax.adam(0.1)
SKIP = {"on_nonfinite": "skip"}


def init_fn(key, dtype=jnp.float32):
    return {"w": jax.random.normal(key, (3,), dtype)}, {"seen": jnp.zeros(())}


def loss_fn(params, model_state, batch, *, key):
    error = batch["x"] @ params["w"].astype(jnp.float32) - batch["y"]
    return {"loss": error**2}, {"seen": model_state["seen"] + 1}, {}


def batch_of(seed=0, rows=16):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 3)), rng.normal(size=rows)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32), "mask": np.ones(rows, bool)}


def faulty(bad=np.nan, seed=9):
    batch = batch_of(seed)
    batch["y"][5] = bad  # on one device of eight alone
    return batch


def start(strategy, use_health=True, **kwargs):
    init = functools.partial(init_fn, **kwargs)
    return strategy.init(
        lambda: create_state(init, TX, key=jax.random.key(0), use_ema=True, use_health=use_health)
    )


def compiled(strategy, num_steps=1, **options):
    make_step = functools.partial(make_train_step, loss_fn, TX, ema_decay=0.9, **options)
    return strategy.compile_step(make_step, num_steps=num_steps)


def learnt(state):
    return jax.device_get((state.params, state.opt_state, state.model_state, state.ema))


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("name", "devices", "accumulate", "bad"),
    [("jit", 1, 1, np.nan), ("jit", 8, 2, np.inf), ("pmap", 8, 1, np.nan), ("pmap", 4, 2, np.inf)],
)
def test_a_skipped_step_changes_nothing_but_the_counters(name, devices, accumulate, bad):
    strategy = make_strategy(name, num_devices=devices)
    step = compiled(strategy, accumulate=accumulate, **SKIP)
    state, metrics = step(start(strategy), batch_of(0))
    assert int(metrics["skipped"]) == 0
    before = learnt(state)
    state, metrics = step(state, faulty(bad))
    assert_same(before, learnt(state))
    assert int(metrics["skipped"]) == int(state.health.skipped) == 1
    assert int(metrics["guard"]) == int(state.guard) == -1
    assert int(state.step) == 2
    state, metrics = step(state, batch_of(2))
    assert int(state.step) == 3
    assert (int(metrics["skipped"]), int(state.health.in_a_row)) == (1, 0)
    # As if the faulty batch had not been there, but for the number of the step.
    other = step(step(start(strategy), batch_of(0))[0], batch_of(2))[0]
    assert_same(learnt(other), learnt(state))
    assert not np.array_equal(before[0]["w"], learnt(state)[0]["w"])


def test_several_steps_in_a_call_skip_the_same_ones():
    strategy = make_strategy(num_devices=2)
    batches = [batch_of(0), faulty(), batch_of(2), faulty(np.inf), faulty(), batch_of(5)]
    state, step = start(strategy), compiled(strategy, max_spike=4.0, **SKIP)
    for batch in batches:
        state, _ = step(state, batch)
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    several, metrics = compiled(strategy, 6, max_spike=4.0, **SKIP)(start(strategy), stacked)
    assert np.asarray(metrics["skipped"]).tolist() == [0, 1, 1, 2, 3, 3]
    assert int(several.step) == 6
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), learnt(state), learnt(several)
    )
    assert int(several.health.count) == int(state.health.count) == 3


def test_too_many_in_a_row_stop_the_run_with_nothing_applied():
    strategy = make_strategy(num_devices=1)
    step = compiled(strategy, **SKIP)
    state, _ = step(start(strategy), batch_of(0))
    before = learnt(state)
    for _ in range(MAX_IN_A_ROW):
        state, metrics = step(state, faulty())
        assert int(metrics["guard"]) == -1
    state, metrics = step(state, faulty())
    assert int(metrics["guard"]) == int(state.guard) == int(state.step) == 1 + MAX_IN_A_ROW
    state, _ = step(state, batch_of(1))
    assert_same(before, learnt(state))
    assert int(state.step) == 1 + MAX_IN_A_ROW
    assert int(state.health.skipped) == MAX_IN_A_ROW


@jax.jit
def judge_all(before, losses, norms):
    def one(before, seen):
        *verdict, after = judge(before, *seen, on_nonfinite="skip", max_spike=6.0)
        return after, (*verdict, after)

    return jax.lax.scan(one, before, (losses, norms))[1]


def series(length=300, level=2.0, seed=0):
    return np.random.default_rng(seed).normal(level, 0.1, length).astype(np.float32)


def test_mean_and_variance_are_those_of_the_window():
    losses, norms = series(), series(level=7.0, seed=1)
    skipped, stopped, after = judge_all(fresh_health(), losses, norms)
    assert not np.any(skipped)
    assert not np.any(stopped)
    mean, variance = np.asarray(after.mean), np.asarray(after.variance)
    for n in (1, 2, WINDOW - 1, WINDOW):  # so far all count alike
        np.testing.assert_allclose(mean[n - 1], [losses[:n].mean(), norms[:n].mean()], rtol=1e-5)
        np.testing.assert_allclose(variance[n - 1], [losses[:n].var(), norms[:n].var()], atol=1e-5)
    # Then they fade: a sum with weights that fall by 1 / WINDOW a step.
    old = np.r_[losses[:WINDOW].mean(), losses[WINDOW:]].astype(float)
    share = (1 - 1 / WINDOW) ** np.arange(len(old))[::-1]
    share[1:] /= WINDOW
    assert share.sum() == pytest.approx(1)
    np.testing.assert_allclose(mean[-1, 0], (old * share).sum(), rtol=1e-5)
    assert variance[-1, 0] == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_is_skipped_once_and_leaves_no_trace(which):
    seen = [series(), series(seed=1)]
    seen[which][100] = 2.0 + 0.1 * 20
    skipped, _, after = judge_all(fresh_health(), *seen)
    assert np.flatnonzero(skipped).tolist() == [100]
    np.testing.assert_array_equal(after.mean[100], after.mean[99])
    np.testing.assert_array_equal(after.variance[100], after.variance[99])
    assert int(after.skipped[-1]) == 1
    # What falls is no spike, nor is what isn't that far above.
    seen[which][100] = -5
    assert not np.any(judge_all(fresh_health(), *seen)[0])
    seen[which][100] = 2.0 + 0.1 * 4
    assert not np.any(judge_all(fresh_health(), *seen)[0])


def test_before_the_warm_up_nothing_is_a_spike():
    losses = series()
    losses[WARM_UP - 1] = 1e6
    assert not np.any(judge_all(fresh_health(), losses, series())[0])
    losses = series()
    losses[WARM_UP] = 1e6
    assert np.flatnonzero(judge_all(fresh_health(), losses, series())[0]).tolist() == [WARM_UP]


def test_a_new_level_is_not_skipped_for_ever():
    losses = series()
    losses[100:] += 50
    skipped, stopped, after = judge_all(fresh_health(), losses, series(seed=1))
    new = 100 + MAX_IN_A_ROW
    assert np.flatnonzero(skipped).tolist() == list(range(100, new))
    assert not np.any(stopped)
    assert after.mean[new, 0] == losses[new]  # begun anew
    assert int(after.count[new]) == 1
    assert after.mean[-1, 0] == pytest.approx(52, rel=0.01)


def test_a_loss_that_does_not_change_is_no_spike_by_rounding():
    losses = np.full(200, 0.7, np.float32)
    losses[150:] = np.nextafter(np.float32(0.7), np.float32(1))
    assert not np.any(judge_all(fresh_health(), losses, losses)[0])


def test_values_whose_square_overflows_do_not_spoil_the_statistics():
    losses = series()
    losses[3] = 3e38
    _, _, after = judge_all(fresh_health(), losses, series())
    assert np.all(np.isfinite(after.variance))


def test_non_finite_values_never_enter_the_statistics():
    losses = series()
    losses[[5, 60, 61]] = np.nan, np.inf, -np.inf
    skipped, stopped, after = judge_all(fresh_health(), losses, series(seed=1))
    assert np.flatnonzero(skipped).tolist() == [5, 60, 61]
    assert not np.any(stopped)
    assert np.all(np.isfinite(after.mean))
    assert int(after.count[99]) == 97


@pytest.mark.parametrize(("name", "devices"), [("jit", 8), ("pmap", 8)])
def test_a_spike_in_a_run(name, devices):
    strategy = make_strategy(name, num_devices=devices)
    state, step = start(strategy), compiled(strategy, max_spike=6.0)
    state = dataclasses.replace(state, health=jax.tree.map(jnp.asarray, warm()))
    state, _ = step(strategy.replicate(state), batch_of(0))
    before, count = learnt(state), int(state.health.count)
    spike = batch_of(1)
    spike["y"] *= 1000
    state, metrics = step(state, spike)
    assert_same(before, learnt(state))
    assert int(metrics["skipped"]) == 1
    assert (int(state.step), int(state.health.count)) == (2, count)
    # What isn't finite stops this run all the same.
    state, metrics = step(state, faulty())
    assert int(metrics["guard"]) == 2
    assert int(metrics["skipped"]) == 1


def warm():
    """Of a run that has had losses and norms from 0 to 100."""
    mean, variance = np.full(2, 50, np.float32), np.full(2, 900, np.float32)
    return health.Health(np.int32(0), np.int32(0), np.int32(WARM_UP), mean, variance)


def test_the_counters_survive_a_checkpoint(tmp_path):
    strategy = make_strategy(num_devices=2)
    make_state = functools.partial(
        create_state, init_fn, TX, key=jax.random.key(0), use_ema=True, use_health=True
    )
    step = compiled(strategy, max_spike=6.0, **SKIP)
    state = start(strategy)
    for batch in (batch_of(0), faulty(), batch_of(1), faulty()):
        state, _ = step(state, batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(4, strategy.abstract(make_state))
        assert (int(restored.health.skipped), int(restored.health.in_a_row)) == (2, 1)
        assert_same(jax.device_get(state.health), jax.device_get(restored.health))
        # A run may go on without, and with again.
        without = functools.partial(make_state, use_health=False)
        plain, _ = checkpoints.restore(4, strategy.abstract(without))
        assert plain.health is None
        plain, _ = compiled(strategy)(plain, batch_of(2))
        checkpoints.save(plain)
        checkpoints.wait()
        again, _ = checkpoints.restore(5, strategy.abstract(make_state))
    assert_same(learnt(plain), learnt(again))
    assert_same(jax.device_get(again.health), jax.device_get(fresh_health()))
    again, metrics = step(again, faulty())
    assert int(metrics["skipped"]) == 1
    state, _ = step(step(state, batch_of(2))[0], batch_of(3))
    restored, _ = step(step(restored, batch_of(2))[0], batch_of(3))
    assert_same(learnt(state), learnt(restored))


@pytest.mark.parametrize(("name", "devices"), [("jit", 1), ("jit", 8), ("pmap", 8)])
@pytest.mark.parametrize("options", [{}, SKIP])
def test_an_infinite_gradient_of_a_finite_loss_is_caught(name, devices, options):
    def root(params, model_state, batch, *, key):
        return {"loss": jnp.sqrt(jnp.abs(batch["x"] @ params["w"]))}, model_state, {}

    strategy = make_strategy(name, num_devices=devices)
    make_step = functools.partial(make_train_step, root, TX, ema_decay=0.9, **options)
    step, state = strategy.compile_step(make_step), start(strategy, use_health=bool(options))
    before = learnt(state)
    batch = batch_of(0)
    batch["x"][3] = 0
    state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert_same(before, learnt(state))
    assert int(metrics["guard"]) == (-1 if options else 0)
    assert int(state.step) == len(options)


def test_parameters_in_bfloat16():
    strategy = make_strategy(num_devices=2)
    state = start(strategy, dtype=jnp.bfloat16)
    step = compiled(strategy, max_spike=6.0, **SKIP)
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    for batch in (batch_of(0), faulty(), batch_of(1)):
        state, metrics = step(state, batch)
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    assert int(metrics["skipped"]) == 1
    assert int(state.health.count) == 2


def test_a_run_that_skips_nothing_pays_nothing():
    """Two looks at finiteness, one choice for each leaf of the state but the key, one for the guard."""
    tx = optax.sgd(0.1, momentum=0.9)
    state = create_state(init_fn, tx, key=jax.random.key(0), use_ema=True)
    sums = {"loss": jnp.zeros(())}, {}

    def counts(state, **options):
        apply = make_train_step(loss_fn, tx, ema_decay=0.9, **options).apply
        jaxpr = jax.make_jaxpr(apply)(state, state.params, state.model_state, sums).jaxpr
        names = list(primitives(jaxpr))
        return names.count("is_finite"), names.count("select_n")

    assert counts(state) == (2, len(jax.tree.leaves(state)))
    with_health = dataclasses.replace(state, health=fresh_health())
    assert counts(with_health, **SKIP)[1] > counts(state)[1] + 5


def test_clear_errors():
    with pytest.raises(errors.ConfigError, match="'skipp': did you mean 'skip'"):
        make_train_step(loss_fn, TX, on_nonfinite="skipp")
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(errors.ConfigError, match="standard deviations"):
            make_train_step(loss_fn, TX, max_spike=bad)
    strategy = make_strategy(num_devices=1)
    for use_health, options in ((False, SKIP), (True, {})):
        with pytest.raises(ValueError, match="a state with health"):
            compiled(strategy, **options)(start(strategy, use_health), batch_of())


def test_a_recipe_says_whether_the_state_needs_it():
    needed = (None,) * 8
    assert not Recipe("x", *needed).use_health
    assert Recipe("x", *needed, on_nonfinite="skip").use_health
    assert Recipe("x", *needed, max_spike=6.0).use_health
