"""Real signals to real processes, in whatever they are doing."""

import contextlib
import functools
import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest

from jaxnets.data import Batches
from jaxnets.train import create_state, fit, make_strategy, make_train_step
from jaxnets.train.checkpoint import Checkpoints
from jaxnets.train.evaluate import evaluate
from jaxnets.train.hooks import Evaluate, LogMetrics, SaveCheckpoint
from jaxnets.train.metrics_log import MetricsLog
from jaxnets.train.preemption import StopOnSignal

START = """
import os, signal, threading, time
import jax, jax.numpy as jnp, numpy as np
from jaxnets.train.loop import StepMetrics
from jaxnets.train.preemption import StopOnSignal

def step_of(stop, step):
    return stop(step, None, StepMetrics(step, {}))

"""
COMPILE = """
def slow(x):
    for i in range(1500):
        x = jnp.tanh(x @ x + i).T
    return x

with StopOnSignal(saved=lambda: None).installed():
    lowered = jax.jit(slow).lower(np.ones((8, 8), np.float32))
    print("ready", flush=True)
    lowered.compile()
print("compiled", flush=True)
"""
WORKERS = """
from jaxnets.data import Arrays, Batches, Stream

stream = Stream(Arrays({"x": np.zeros((100, 1000))}), Batches(100, 8, 80_000), num_workers=2)
stream[0], stream[1]
print(*stream.worker_pids, flush=True)
"""
HANG = """
with StopOnSignal(grace_s=1, saved=lambda: 7).installed() as stop:
    step_of(stop, 9)
    print("ready", flush=True)
    threading.Event().wait()
"""
SAVE = """
import pathlib, sys, tempfile
from jaxnets.train import checkpoint, files
from jaxnets.train.state import TrainState

def state(step):
    x = jnp.full(1000, step)
    return TrainState(jnp.int32(step), x, {}, {}, jax.random.key(0), None, jnp.int32(-1))

write = files.write_atomically

def stuck(path, content):
    if b"00000002" in os.fsencode(path):
        print("ready", flush=True)
        threading.Event().wait()
    write(path, content)

files.write_atomically = stuck
checkpoints = checkpoint.Checkpoints(os.environ["FOLDER"])
with StopOnSignal(grace_s=1, saved=lambda: checkpoints.newest).installed() as stop:
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    step_of(stop, 2)
    checkpoints.wait()
"""
AT_ONCE = (
    "nothing was trained that isn't saved: stopped at once; there is no checkpoint; the same command"
)
LATE = "the step took more than 1 s: stopped without a save; the checkpoint of step 7 is whole; the same"
TWICE = "once more: stopped at once; the checkpoint of step 7 is whole"
ALONE = {
    # name: script, signals, what it says at last
    "compile": (WORKERS + COMPILE, [signal.SIGTERM], AT_ONCE),
    "compile, Ctrl-C": (COMPILE, [signal.SIGINT], AT_ONCE),
    "hang": (HANG, [signal.SIGTERM], LATE),
    "hang, Ctrl-C twice": (HANG, [signal.SIGINT, signal.SIGINT], TWICE),
    "save": (SAVE, [signal.SIGTERM], "the checkpoint of step 1 is whole"),
}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def has_ended(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def test_a_signal_while_the_main_thread_cannot_answer(tmp_path):
    with contextlib.ExitStack() as stack:
        children = {
            name: stack.enter_context(
                processes.Processes(START + script, 1, joined=False, env={"FOLDER": str(tmp_path)})
            )
            for name, (script, *_) in ALONE.items()
        }
        for name, (_, signals, *_) in ALONE.items():
            children[name].wait_for(0, "ready", timeout=150)
            children[name].send(0, signals[0])
        for name, (_, signals, *_) in ALONE.items():
            if len(signals) > 1:
                time.sleep(2.5)  # beyond the grace time, which isn't for Ctrl-C
                children[name].send(0, signals[1])
        for name, (script, signals, last) in ALONE.items():
            (ended,) = children[name].wait(60)
            assert ended.code == 128 + signals[0], (name, ended)
            first = f"{signals[0].name}: saving after this step; once more stops at once"
            assert first in ended.err, name
            assert f"{signals[0].name}, " in ended.err.splitlines()[-1], name
            assert last in ended.err.splitlines()[-1], (name, ended.err)
            assert "compiled" not in ended.out
            if "Stream" in script:  # the workers that read its data have ended with it
                assert has_ended([int(pid) for pid in ended.out.splitlines()[0].split()])
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    assert checkpoints.clean() == ["00000002"]  # what was being saved isn't taken for a checkpoint


DATA = {"x": np.arange(12, dtype=np.float32)}
TX = optax.sgd(0.01)
NUM_STEPS = 8


def loss_fn(params, model_state, batch, *, key):
    return {"loss": params * batch["x"]}, model_state, {}


def make_state():
    return create_state(lambda key: (jnp.float32(1), {}), TX, key=jax.random.key(0))


@functools.cache
def compiled():
    strategy = make_strategy(num_devices=1)
    return strategy, strategy.compile_step(functools.partial(make_train_step, loss_fn, TX), DATA)


class Score:
    """A metric of an evaluation: sums, and `compute`."""

    def __init__(self, total):
        self.total = total

    def compute(self):
        return self.total


jax.tree_util.register_dataclass(Score, ["total"], [])


def train(folder, signals=()):
    """A small run with everything that a stop concerns; signals are (what, step, batch)."""
    strategy, step = compiled()
    state = strategy.init(make_state)
    asked = {}

    def send(what, number, batch=None):
        if (what, number, batch) in signals:
            os.kill(os.getpid(), signal.SIGTERM)

    with (
        Checkpoints(folder / "checkpoints", num_best=2) as checkpoints,
        StopOnSignal(saved=lambda: checkpoints.newest).installed() as stop,
    ):
        spent = {}
        if (latest := checkpoints.latest()) is not None:
            state, manifest = checkpoints.restore(latest, strategy.abstract(make_state))
            spent = manifest.extra
        first = int(state.step)
        log = MetricsLog(folder, step=first)

        def eval_step(state, i):
            send("evaluation", int(state.step), i)
            return {"score": Score(-jnp.abs(state.params - 0.7)), "count": jnp.int32(1)}

        def should_stop():
            asked[int(current[0])] = asked.get(int(current[0]), 0) + 1
            return stop.is_due()

        current = [first]

        def evaluate_all(state):
            current[0] = state.step
            return evaluate(eval_step, state, range(5), should_stop=should_stop)

        evaluation = Evaluate(evaluate_all, log, lambda step: step % 2 == 0)

        def score(step):
            return evaluation.results.get(step, {}).get("score")

        def extra():
            return {} if evaluation.pending is None else {"eval_pending": evaluation.pending}

        saving = SaveCheckpoint(checkpoints, log, lambda step: step % 2 == 0, score, extra)
        reason = None
        if spent.get("eval_pending") == first:
            if evaluation.catch_up(first, state):
                log.sync()
                checkpoints.amend(first, score=score(first), extra=extra())
            else:
                reason = "SIGTERM"
        if not reason:
            hooks = [
                LogMetrics(log, 1, NUM_STEPS, 3),
                lambda step, *_: send("step", step),
                evaluation,
                saving,
                stop,
            ]
            state, reason = fit(step, state, Batches(12, 4, 4 * NUM_STEPS), hooks=hooks)
        if reason:
            checkpoints.save(state, extra=extra())
        checkpoints.wait()
        log.close()
        scores = {step: checkpoints.manifest(step).score for step in checkpoints.steps()}
        extras = {step: checkpoints.manifest(step).extra for step in checkpoints.steps()}
    return reason, int(state.step), float(state.params), scores, extras, asked


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def written(folder):
    return [(folder / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")]


@pytest.mark.parametrize(
    ("signals", "stops"),
    [
        ([("step", 3, None)], [3]),
        ([("evaluation", 4, 1)], [4]),
        ([("evaluation", 8, 0)], [8]),  # the last step's
        ([("step", 2, None)], [2]),  # its evaluation doesn't begin
        ([("evaluation", 6, 4)], [6]),  # its last batch: it is done
    ],
)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, whole, signals, stops):
    folder, ended = whole
    assert ended[:2] == (None, NUM_STEPS)
    (what, at, batch), *_ = signals
    reason, step, _, scores, extras, asked = train(tmp_path, signals)
    assert (reason, step) == ("SIGTERM", stops[0])
    if what == "evaluation" and batch < 4:
        assert asked[at] == batch + 2  # not one batch more
    if at % 2 == 0 and batch != 4:
        assert scores[at] is None
        assert extras[at] == {"eval_pending": at}
    assert train(tmp_path)[:5] == ended[:5]
    assert written(tmp_path) == written(folder)


def test_a_stop_while_a_pending_evaluation_is_made_up_for(tmp_path, whole):
    """And a kill between the evaluation and what is written of it into the checkpoint."""
    folder, ended = whole
    assert train(tmp_path, [("evaluation", 4, 1)])[:2] == ("SIGTERM", 4)
    assert train(tmp_path, [("evaluation", 4, 2)])[:2] == ("SIGTERM", 4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == 4 and "eval/score" in row]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert train(tmp_path)[:5] == ended[:5]
    assert written(tmp_path) == written(folder)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopOnSignal().installed() as stop:
        assert signal.getsignal(signal.SIGTERM) not in before
        assert not stop.is_due()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_comes_twice_at_once_is_one():
    """`timeout` sends it to the process and to its group."""
    with StopOnSignal().installed() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
        assert stop.is_due()
        time.sleep(0.1)
    assert stop.signal == signal.SIGTERM


TOGETHER = """
import os, signal, time
from jaxnets.train.loop import StepMetrics
from jaxnets.train.preemption import StopOnSignal

with StopOnSignal().installed() as stop:
    reason = None
    for step in range(1, 3000):
        time.sleep(0.004 if hosts.is_first() else 0.006)
        if step % 4 == 0:  # an evaluation
            batch = next((i for i in range(3) if stop.is_due()), None)
            if batch is not None:
                print("in evaluation", batch)
        reason = stop(step, None, StepMetrics(step, {}))
        if step == 20:
            print("ready", flush=True)
        if reason:
            break
    print(step, reason, stop.signal, flush=True)
if hosts.index() == 1:  # what JAX had installed is there again: without it this would be the end
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
hosts.barrier("end")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number):
    with processes.Processes(TOGETHER, 2, devices=1) as both:
        for index in range(2):
            both.wait_for(index, "ready")
        both.send(1, number)
        first, second = both.wait(60)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out == second.out
    step, *rest = first.out.splitlines()[-1].split()
    assert rest == ["SIGTERM", "15"]
    assert int(step) > 20
    assert f"{number.name}: saving after this step" in second.err
    assert "saving after this step" not in first.err
