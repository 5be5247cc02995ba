import functools
import io
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jaxnets import errors, models, registry
from jaxnets.data import Batches
from jaxnets.ops import onednn
from jaxnets.train import (
    Clock,
    Several,
    StepMetrics,
    create_state,
    fit,
    make_strategy,
    make_train_step,
    programs,
)
from jaxnets.train.hooks import Evaluate, LogMetrics, Profile, ShowProgress
from jaxnets.train.metrics_log import MetricsLog
from jaxnets.train.preemption import StopOnSignal

DATA = {"x": np.arange(12, dtype=np.float32)}
TX = optax.sgd(0.01)


def loss_fn(params, model_state, batch, *, key):
    return {"loss": params * batch["x"]}, model_state, {}


def start():
    strategy = make_strategy(num_devices=1)
    state = strategy.init(
        lambda: create_state(lambda key: (jnp.float32(1), {}), TX, key=jax.random.key(0))
    )
    return strategy.compile_step(functools.partial(make_train_step, loss_fn, TX), DATA), state


def test_hooks_see_every_step_with_its_own_state_and_metrics():
    step, state = start()
    batches = Batches(12, 4, 36, seed=1)
    seen = []

    def hook(number, state, metrics):
        seen.append((number, int(state.step), metrics.step, metrics.read()["loss"]))

    clock = Clock()
    state, reason = fit(step, state, batches, hooks=[hook], clock=clock)
    assert reason is None
    assert [row[:3] for row in seen] == [(i, i, i) for i in range(1, 10)]
    # The loss of step i is that of the parameters before it.
    params = 1.0
    for i, (*_, loss) in enumerate(seen):
        mean = DATA["x"][batches[i]["index"]].mean()
        np.testing.assert_allclose(loss, params * mean, rtol=1e-5)
        params -= 0.01 * mean
    assert clock.steps == 8  # the first one is compilation
    assert clock.train > 0
    assert clock.compile > 0


def test_waiting_for_a_step_is_training_time_whoever_waits():
    """A hook that reads every step must not make training look free."""
    step, _ = start()

    def slow(state, draw):
        state, values = step(state, draw)

        def late(x):
            time.sleep(0.02)
            return x

        guard = jax.pure_callback(late, jax.ShapeDtypeStruct((), jnp.int32), values["guard"])
        return state, {**values, "guard": guard}

    for hooks in ([lambda number, state, metrics: metrics.read() and None], []):
        clock = Clock()
        fit(slow, start()[1], Batches(12, 4, 36), hooks=hooks, clock=clock)
        assert clock.train > 0.8 * 8 * 0.02, clock
        assert clock.hooks < 0.5 * clock.train, clock


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_later_programs_take_over_at_their_step_and_after_a_resume(stop_at):
    step, state = start()
    batches = Batches(12, 4, 36, seed=1)
    called = []

    def program(name, seconds=0.0):
        def run(state, draw):
            called.append((name, int(state.step)))
            time.sleep(seconds)
            return step(state, draw)

        return run

    clock, later = Clock(), {3: program("b", 0.05), 7: program("c")}
    fit(program("a"), state, batches, clock=clock, later=later)
    assert called == [(name, i) for i, name in enumerate("aaabbbbcc")]
    assert clock.steps == 6  # without the first of each program, where it compiles
    assert clock.compile > 0.05
    called.clear()
    step, state = start()
    state, _ = fit(
        program("a"),
        state,
        batches,
        hooks=[lambda i, *_: "enough" if i == stop_at else None],
        later=later,
    )
    fit(program("a"), state, batches, later=later)
    assert called == [(name, i) for i, name in enumerate("aaabbbbcc")]


def several_of(num_steps, needs_state=lambda step: False, begins=(0,), called=None):
    strategy = make_strategy(num_devices=1)
    program = strategy.compile_step(
        functools.partial(make_train_step, loss_fn, TX), DATA, num_steps=num_steps
    )

    def run(state, draws):
        if called is not None:
            called.append((int(state.step), num_steps))
        return program(state, draws)

    return Several(num_steps, dict.fromkeys(begins, run), needs_state)


def counted(step, called):
    def run(state, draw):
        called.append((int(state.step), 1))
        return step(state, draw)

    return run


def test_several_steps_in_a_call_are_the_same_steps():
    batches = Batches(12, 4, 44, seed=1)
    rows = {}
    for several in (None, several_of(4)):
        step, state = start()
        seen = rows[several is None] = []

        def hook(number, state, metrics, seen=seen):
            seen.append((number, metrics.step, metrics.read()))

        clock = Clock()
        state, _ = fit(step, state, batches, hooks=[hook], clock=clock, several=several)
        seen.append(float(state.params))
        assert int(state.step) == len(batches) == 11
        assert clock.steps == (10 if several is None else 6)  # without the first call of a program
    *ours, last = rows[False]
    *theirs, expected = rows[True]
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for (*_, found), (*_, single) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(single, rel=1e-6)
    assert last == pytest.approx(expected, rel=1e-6)


def test_where_the_state_is_needed_steps_are_single():
    """And by the number of the step alone, wherever the run was stopped."""
    batches = Batches(12, 4, 4 * 15)
    expected = [(0, 4), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)]
    expected += [(13, 1), (14, 1)]
    for stop_at in (None, 3, 5, 12):
        called = []
        # The state after 6 steps is needed, and the program changes after 9.
        several = several_of(4, lambda step: step in (6, 8), begins=(0, 9), called=called)
        step, state = start()
        single = counted(step, called)

        def hook(number, *_, stop_at=stop_at):
            return "enough" if number == stop_at else None

        later = {9: single}
        state, reason = fit(single, state, batches, hooks=[hook], several=several, later=later)
        if stop_at:
            assert reason == "enough"
            assert int(state.step) == max(stop_at, 4)  # a call is done to its end
            fit(single, state, batches, several=several, later=later)
        assert called == expected


@pytest.mark.parametrize("at", [5, 6, 8])
def test_a_non_finite_loss_within_a_call_is_named(at):
    step, state = start()
    batches = [dict(draw) for draw in Batches(12, 4, 32, seed=1)]
    wrong = batches[at - 1]["index"] + 100  # out of range: NaN
    batches[at - 1]["index"] = wrong
    seen = []

    def hook(number, state, metrics):
        seen.append(metrics.read()["loss"])

    with pytest.raises(errors.NonFiniteError) as error:
        fit(step, state, batches, hooks=[hook], several=several_of(4))
    shown = ", ".join(map(str, wrong))
    assert f"step {at} was not applied: its loss is nan" in str(error.value)
    assert f"its batch has the examples {shown}" in str(error.value)
    assert len(seen) == at - 1
    # Nobody reads: the loop itself finds it, with the call after.
    with pytest.raises(errors.NonFiniteError, match=f"step {at} was not applied") as error:
        fit(step, start()[1], batches, several=several_of(4))
    assert f"its batch has the examples {shown}" in str(error.value)


@pytest.mark.parametrize(
    ("model", "num_devices", "unroll"),
    [("lenet", 1, 1), ("resnet18", 1, 1 if onednn.is_known() else 3), ("resnet18", 2, 3)],
)
def test_a_convolution_of_xlas_own_does_not_end_up_in_a_loop(model, num_devices, unroll):
    init_fn, apply_fn = models.functional(
        registry.get("model", model)(num_classes=3), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    )
    params, model_state = jax.eval_shape(init_fn, jax.random.key(0))

    def program(params, model_state, draws):
        return programs.in_a_row(
            lambda carry, draw: (carry, apply_fn(params, model_state, draw["image"], train=False)[0]),
            (),
            draws,
            num_devices,
        )

    draws = {"image": jax.ShapeDtypeStruct((3, 4, 16, 16, 3), jnp.float32)}
    jaxpr = jax.make_jaxpr(program)(params, model_state, draws)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert (scan.params["length"], scan.params["unroll"]) == (3, unroll)


def test_a_call_is_shown_and_recorded_whole(tmp_path):
    step, state = start()
    console = Console(file=io.StringIO(), force_terminal=False)
    evaluation = Evaluate(lambda state: {}, None, lambda step: False)
    with (
        ShowProgress(12, 4, evaluation, every_s=0.0, console=console) as show,
        Profile(tmp_path / "profile", 2, 3) as profile,
    ):
        fit(step, state, Batches(12, 4, 48), hooks=[show, profile], several=several_of(4))
    shown = [line.split()[1] for line in console.file.getvalue().splitlines()]
    assert shown == ["8/12", "12/12"]  # the first call compiles
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("name", ["start_trace", "stop_trace"])
def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, name):
    step, state = start()
    work = getattr(jax.profiler, name)

    def full(*args):
        if name == "stop_trace":
            work()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, name, full)
    with (
        pytest.warns(UserWarning, match="profile can't be written to .*No space left.*goes on") as told,
        Profile(tmp_path / "profile", 2, 3) as profile,
    ):
        state, _ = fit(step, state, Batches(12, 4, 36), hooks=[profile])
    assert int(state.step) == 9
    assert len(told) == 1


def test_the_progress_never_ends_a_run():
    """It goes by a clock, which is another on each host: the loop ends all after the same step."""
    show = ShowProgress(9, 4, Evaluate(lambda state: {}, None, lambda step: False), every_s=0.0)
    bad = {"loss": np.float32(np.nan), "grad_norm": np.float32(1), "guard": np.int32(1)}
    for step, values in enumerate([{"loss": np.float32(1)}, bad], start=1):
        show(step, None, StepMetrics(step, values))


def test_several_steps_take_jit():
    make_step = functools.partial(make_train_step, loss_fn, TX)
    for strategy in (make_strategy("pmap", num_devices=1), make_strategy(use_jit=False)):
        with pytest.raises(ValueError, match="4 steps in a call take the strategy 'jit', compiled"):
            strategy.compile_step(make_step, DATA, num_steps=4)


def test_a_hook_can_stop_the_run_and_it_can_be_gone_on_with():
    step, state = start()
    batches = Batches(12, 4, 36, seed=1)
    whole, _ = fit(step, start()[1], batches)
    state, reason = fit(
        step, state, batches, hooks=[lambda number, *_: "enough" if number == 4 else None]
    )
    assert (int(state.step), reason) == (4, "enough")
    state, reason = fit(step, state, batches)
    assert (int(state.step), reason) == (9, None)
    assert float(state.params) == float(whole.params)


@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_non_finite_loss_stops_the_run_with_nothing_written(tmp_path, at):
    step, state = start()
    batches = [dict(draw) for draw in Batches(12, 4, 36, seed=1)]

    def faulty(state, draw):
        if int(state.step) == at - 1:
            state = jax.tree.map(jnp.copy, state)
            state.params.block_until_ready()
            draw = {**draw, "index": draw["index"] + 100}  # out of range: NaN
        return step(state, draw)

    log = MetricsLog(tmp_path, step=0)
    hooks = [LogMetrics(log, every=1, num_steps=9, steps_per_epoch=3)]
    message = rf"step {at} was not applied: its loss is nan"
    with pytest.raises(errors.NonFiniteError, match=message) as error:
        fit(faulty, state, batches, hooks=hooks)
    assert "examples" in str(error.value)
    log.close()
    assert [row["step"] for row in log.rows] == list(range(1, at))


def test_a_signal_stops_after_the_step():
    step, state = start()
    with StopOnSignal().installed() as stop:

        def send(number, *_):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        state, reason = fit(step, state, Batches(12, 4, 36), hooks=[send, stop])
    assert (int(state.step), reason) == (3, "SIGTERM")


def test_evaluation_does_not_change_training(tmp_path):
    step, state = start()
    plain, _ = fit(step, start()[1], Batches(12, 4, 36))
    log = MetricsLog(tmp_path, step=0)
    evaluation = Evaluate(lambda state: {"p": float(state.params)}, log, lambda n: n % 2 == 0)
    state, _ = fit(step, state, Batches(12, 4, 36), hooks=[evaluation])
    log.close()
    assert float(state.params) == float(plain.params)
    assert sorted(evaluation.results) == [2, 4, 6, 8]


def test_the_learning_rate_of_a_row_is_that_of_its_step(tmp_path):
    """Step n, counted from 1, was taken with the rate of n - 1 updates before."""
    log = MetricsLog(tmp_path, step=0)
    hook = LogMetrics(log, 2, 5, 1.0, learning_rate=lambda step: 0.1 * step)
    for step in range(1, 6):
        hook(step, None, StepMetrics(step, {"loss": np.float32(1)}))
    log.close()
    rates = {row["step"]: row["learning_rate"] for row in log.rows}
    assert rates == {2: pytest.approx(0.1), 4: pytest.approx(0.3), 5: pytest.approx(0.4)}


def test_the_progress_shows_what_the_time_went_into(monkeypatch):
    now, text = [0.0], io.StringIO()
    monkeypatch.setattr("jaxnets.train.hooks.time.perf_counter", lambda: now[0])
    clock = Clock()
    evaluation = Evaluate(lambda state: {}, None, lambda step: False)
    show = ShowProgress(
        3, 10, evaluation, every_s=1.0, clock=clock, mfu=lambda step, speed: speed / 100,
        console=Console(file=text),
    )  # fmt: skip
    for step in (1, 2, 3):
        now[0] += 2.0
        clock.data, clock.dispatch = 0.5 * (step - 1) ** 2, 1.0 * (step - 1)
        show(step, None, StepMetrics(step, {"loss": np.float32(1), "guard": np.int32(-1)}))
    first, second = text.getvalue().splitlines()
    assert "5 examples/s  MFU 5.0%  data wait 33%" in first  # 0.5 of 1.5 s
    assert "MFU 5.0%  data wait 60%" in second  # 1.5 of 2.5 s since then
