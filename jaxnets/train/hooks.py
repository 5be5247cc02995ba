"""Hooks: what happens beside the steps. Each is called as `hook(step, state, metrics)`."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxnets.errors import NonFiniteError, first_line
from jaxnets.train.checkpoint import Checkpoints
from jaxnets.train.evaluate import Stopped
from jaxnets.train.files import Staged
from jaxnets.train.loop import Clock, StepMetrics
from jaxnets.train.metrics_log import MetricsLog
from jaxnets.train.state import TrainState


@dataclasses.dataclass
class LogMetrics:
    """Write the step's metrics every so many steps, and those of the last step.

    Attributes:
        log: where to.
        every: steps between two lines, at least 1.
        num_steps: of the whole run.
        steps_per_epoch: to say in which epoch a step lies.
        learning_rate: `learning_rate(step)` of the step that is numbered so from 0; None if unknown.
        more: `more()` is written beside.
    """

    log: MetricsLog
    every: int
    num_steps: int
    steps_per_epoch: float
    learning_rate: Callable[[int], float] | None = None
    more: Callable[[], Mapping[str, float]] = dict

    def __call__(self, step: int, state: TrainState, metrics: StepMetrics) -> None:
        """Write if this is such a step."""
        if step % self.every == 0 or step == self.num_steps:
            row = {"epoch": round(step / self.steps_per_epoch, 6), **metrics.read()}
            if self.learning_rate is not None:
                # The optimizer's schedule waits for steps that are skipped.
                applied = step - 1 - int(row.get("skipped") or 0)
                row["learning_rate"] = float(self.learning_rate(max(applied, 0)))
            self.log.write(step, row | dict(self.more()))


@dataclasses.dataclass
class Evaluate:
    """Evaluate every so many steps, and after the last one.

    Attributes:
        evaluate: `evaluate(state) -> {name: value}`.
        log: where the values are written, as "eval/NAME".
        is_due: `is_due(step)`.
        results: of the evaluations so far, by step.
        seconds: how long they took.
        pending: the step whose evaluation was broken off, or None; it is due when the run goes on.
    """

    evaluate: Callable[[TrainState], Mapping[str, float]]
    log: MetricsLog
    is_due: Callable[[int], bool]
    results: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    pending: int | None = None

    def __call__(self, step: int, state: TrainState, metrics: StepMetrics) -> None:
        """Evaluate if this is such a step."""
        if not self.is_due(step):
            return
        metrics.read()  # a state that a faulty step left as it was is not this step's state
        self.run(step, state)

    def run(self, step: int, state: TrainState) -> bool:
        """Evaluate this step; whether it was done to the end."""
        start = time.perf_counter()
        try:
            values = dict(self.evaluate(state))
        except Stopped:
            self.pending = step
            return False
        self.pending = None
        self.results[step] = values
        self.log.write(step, {f"eval/{name}": value for name, value in values.items()})
        self.seconds += time.perf_counter() - start
        return True

    def catch_up(self, step: int, state: TrainState) -> bool:
        """Evaluate a step that was saved before its evaluation; whether it was done to the end."""
        rows = [row for row in self.log.rows if row["step"] == step and "eval/count" in row]
        if not rows:
            return self.run(step, state)
        # The run was stopped between the evaluation and what `amend` does.
        self.results[step] = {
            name.removeprefix("eval/"): math.nan if value is None else value
            for name, value in rows[-1].items()
            if name.startswith("eval/")
        }
        return True


@dataclasses.dataclass
class SaveCheckpoint:
    """Save every so many steps, and after the last one.

    Attributes:
        checkpoints: where to.
        log: made safe on the disk before each save, so that no row before a checkpoint is lost.
        is_due: `is_due(step)`.
        score: `score(step)` is that step's value of the monitored metric, or None.
        extra: `extra()` is saved beside the state.
        keep: `keep(step)` are steps to keep beside this one, the latest, and the best ones.
    """

    checkpoints: Checkpoints
    log: MetricsLog
    is_due: Callable[[int], bool]
    score: Callable[[int], float | None]
    extra: Callable[[], Mapping[str, Any]]
    keep: Callable[[int], Sequence[int]] = lambda step: ()

    def __call__(self, step: int, state: TrainState, metrics: StepMetrics) -> None:
        """Save if this is such a step; raise the error of an earlier save that has failed."""
        self.checkpoints.check()
        if self.is_due(step):
            metrics.read()
            self.log.sync()
            self.checkpoints.save(
                state, score=self.score(step), extra=self.extra(), keep=self.keep(step)
            )


@dataclasses.dataclass
class StopEarly:
    """Stop when evaluation has not become better for a while.

    It remembers nothing: the log says how evaluation went, also before a resume.

    Attributes:
        log: with the rows of `Evaluate`, which must come before this hook.
        monitor: the metric that counts.
        patience: evaluations without a better one after which to stop; 0 is never.
        maximize: whether a greater value is better.
    """

    log: MetricsLog
    monitor: str
    patience: int
    maximize: bool = True

    def __call__(self, step: int, state: TrainState, metrics: StepMetrics) -> str | None:
        """The reason to stop, if there is one."""
        return f"{self.patience} evaluations without a better one" if self.is_over() else None

    def is_over(self) -> bool:
        """Whether patience has run out."""
        if not self.patience:
            return False
        name = f"eval/{self.monitor}"
        worst = -math.inf if self.maximize else math.inf
        found = [row[name] for row in self.log.rows if name in row]
        values = [worst if value is None else value for value in found]
        if not values:
            return False
        best = values.index((max if self.maximize else min)(values))  # the first of equal ones
        return len(values) - 1 - best >= self.patience


class Profile:
    """Record a profile of some steps, for TensorBoard or Perfetto; use it in a `with` statement.

    Args:
        folder: where to.
        start: the step after which recording begins.
        num_steps: how many are recorded; 0 is none. A run that ends before ends the recording.

    A profile that can't be written is a warning.
    """

    def __init__(self, folder: Path, start: int, num_steps: int):
        self._folder, self._start, self._num_steps = folder, start, num_steps
        self._is_recording = False
        self._stop: int | None = None  # the step after which recording ends

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_recording:
            self._is_recording = False
            self._try(self._end)

    def __call__(self, step: int, state: TrainState, metrics: StepMetrics) -> None:
        """Begin or end, with all steps up to this one done."""
        if not metrics.is_last:  # of a call, which is recorded whole
            return
        if self._num_steps and self._stop is None and step >= self._start:
            metrics.read()
            self._stop = step + self._num_steps
            self._is_recording = self._try(self._begin)
        elif self._is_recording and self._stop is not None and step >= self._stop:
            metrics.read()
            self.__exit__()

    def _begin(self) -> None:
        self._staged = Staged(self._folder)
        jax.profiler.start_trace(str(self._staged.path))

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._staged.close()

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:
            why = f"the profile can't be written to {self._folder}: {first_line(error)}"
            warnings.warn(f"{why}; the run goes on without it", UserWarning, stacklevel=3)
            return False
        return True


class ShowProgress:
    """A progress bar on a terminal, plain lines otherwise.

    Args:
        num_steps: of the whole run.
        batch_size: examples in a step.
        evaluate: whose newest results are shown.
        unit: what an example is called.
        every_s: seconds between plain lines.
        first: the step that the run goes on from.
        clock: of the loop; with it the share of the time that went into waiting for data is shown.
        mfu: `mfu(step, examples_per_second)` is shown, unless it is None.
        console: where to; standard error by default.
    """

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        evaluate: Evaluate,
        *,
        unit: str = "examples",
        every_s: float = 5.0,
        first: int = 0,
        clock: Clock | None = None,
        mfu: Callable[[int, float], float | None] = lambda step, examples_per_second: None,
        console: Console | None = None,
    ):
        self._num_steps, self._batch_size, self._unit = num_steps, batch_size, unit
        self._evaluate, self._clock, self._mfu = evaluate, clock or Clock(), mfu
        self._times = 0.0, 0.0  # on data and on all of training, when it was last shown
        self._console = console or Console(stderr=True)
        self._every_s = 0.2 if self._console.is_terminal else every_s
        self._mark: tuple[float, int, float] | None = None
        self._compiled = 0.0  # seconds of the clock's, at the mark
        self._printed = -1
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        status = "compiling" if first < num_steps else "done"
        self._task = self._bar.add_task("train", total=num_steps, completed=first, status=status)

    def __enter__(self) -> "ShowProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, step: int, state: TrainState, metrics: StepMetrics) -> None:
        """Show the step, if there is news or the last showing is old enough."""
        if not metrics.is_last:  # the steps of a call are done together
            return
        now = time.perf_counter()
        self._print_evaluations()
        if self._mark is None or self._clock.compile != self._compiled:
            # The first step of a program compiles it: the clock starts behind it.
            self._mark, self._compiled = (now, step, self._evaluate.seconds), self._clock.compile
            self._bar.update(self._task, completed=step)
            return
        then, before, evaluating = self._mark
        if now - then < self._every_s and step < self._num_steps:
            return
        seconds = max(now - then - (self._evaluate.seconds - evaluating), 1e-9)
        speed = (step - before) * self._batch_size / seconds
        try:
            loss = metrics.read()["loss"]
        except NonFiniteError:
            return  # the loop is about to raise it, after the same step on every host: no clock decides
        left = (self._num_steps - step) * self._batch_size / max(speed, 1e-9)
        status = f"loss {loss:.4f}  {speed:,.0f} {self._unit}/s{self._shares(step, speed)}"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal:
            self._say(f"step {step}/{self._num_steps}  {status}  {left:.0f} s left")
        self._mark = (now, step, self._evaluate.seconds)

    def _shares(self, step: int, speed: float) -> str:
        """Model FLOPs utilisation and the wait for data since the last showing."""
        mfu, times = self._mfu(step, speed), (self._clock.data, self._clock.train)
        data, train = (now - before for now, before in zip(times, self._times, strict=True))
        self._times = times
        text = "" if mfu is None else f"  MFU {mfu:.1%}"
        return text + (f"  data wait {data / train:.0%}" if train > 0 else "")

    def _print_evaluations(self) -> None:
        for step in [s for s in self._evaluate.results if s > self._printed]:
            values = self._evaluate.results[step]
            shown = "  ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4f}"
                for name, value in values.items()
            )
            self._say(f"step {step}/{self._num_steps}  evaluation: {shown}")
            self._printed = step

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
