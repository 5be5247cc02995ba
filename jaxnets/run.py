"""A run, from where it begins or goes on to its last step."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxnets import errors, resume
from jaxnets.config import RunOptions
from jaxnets.evaluation import make_evaluator
from jaxnets.feed import Unreadable, feed, resident, train_draws
from jaxnets.recipe import Recipe
from jaxnets.train import checkpoint, hooks, hosts, program_cache, sharding
from jaxnets.train.diagnosis import report_nonfinite
from jaxnets.train.hosts import say
from jaxnets.train.loop import Clock, Several, StepMetrics, fit
from jaxnets.train.metrics_log import MetricsLog
from jaxnets.train.peak import Usage, mean_usage, peak_flops
from jaxnets.train.preemption import StopOnSignal
from jaxnets.train.row_updates import step_maker
from jaxnets.train.shapes import ShapeGuard
from jaxnets.train.state import TrainState
from jaxnets.train.watchdog import Watchdog
from jaxnets.typing import LossFn


@dataclasses.dataclass
class Run:
    """What a run consists of, and its way from where it begins to its last step.

    Attributes:
        state: where it has come to.
        spent: what the earlier parts of the run have taken, and left to do.
        log: of its metrics, to be closed by whoever made this.
    """

    folder: Path
    recipe: Recipe
    options: RunOptions
    strategy: sharding.Strategy
    usages: Mapping[int, Usage]
    stop: StopOnSignal
    watchdog: Watchdog
    clock: Clock
    checkpoints: checkpoint.Checkpoints
    spent: Mapping[str, Any]
    state: TrainState

    def __post_init__(self) -> None:
        recipe, options, watchdog = self.recipe, self.options, self.watchdog
        self.first = int(self.state.step)
        self.log = MetricsLog(self.folder, step=self.first)
        self.schedule = _Schedule(recipe, options)
        if options.max_unreadable and resident(recipe.train, options) is not None:
            say("warning: the data is in memory, all of it: --max-unreadable has nothing to do")
        known = self.spent.get("unreadable", ())
        self.left_out = Unreadable(options.max_unreadable, known, step=self.first)
        evaluate = make_evaluator(
            recipe, self.strategy, options, should_stop=self.stop.is_due, beat=watchdog.beat
        )
        self.evaluation = hooks.Evaluate(
            watchdog.around("evaluate", evaluate), self.log, self.schedule.is_eval_due
        )
        self.early = hooks.StopEarly(self.log, recipe.monitor, recipe.patience, recipe.maximize)
        self.saving = hooks.SaveCheckpoint(
            self.checkpoints,
            self.log,
            self.schedule.is_save_due,
            score=lambda step: self.evaluation.results.get(step, {}).get(recipe.monitor),
            extra=self.progress,
            keep=self.schedule.keep,
        )
        self.draws = train_draws(recipe)

    @property
    def last(self) -> int:
        """The number of steps taken."""
        return int(self.state.step)

    @functools.cached_property
    def arrays(self) -> Any:
        """The data on the devices; None if it is streamed."""
        found = resident(self.recipe.train, self.options)
        return None if found is None else self.strategy.replicate(dict(found))  # once for all programs

    @functools.cached_property
    def peak(self) -> float | None:
        """Operations per second that the devices can do; measured when they have nothing to do."""
        return peak_flops(list(self.strategy.mesh.devices.flat))

    def to_the_end(self) -> Mapping[str, float | None] | None:
        """The last evaluation; None if a signal stopped the run before."""
        if self.spent.get("eval_pending") and not self._catch_up():
            return self._stopped(f"before the evaluation of step {self.first}")
        steps, several = self._compiled()
        if self.stop.is_due():
            return self._stopped(f"before step {self.first + 1}")
        try:
            reason = self._fit(steps, several)
            if self.early.is_over():
                patience = self.recipe.patience
                say(f"ended after step {self.last}: {patience} evaluations without a better one")
            elif reason and (self.last < self.recipe.num_steps or self.evaluation.pending is not None):
                self.log.sync()
                self.watchdog.beat("save")
                self.checkpoints.save(self.state, extra=self.progress())
                self.checkpoints.wait()
                return self._stopped(f"by {reason} after step {self.last}")
            row = next((row for row in reversed(self.log.rows) if "eval/count" in row), {})
            if row.get("step") != self.last:  # the run was stopped here before, or its record is gone
                if not self.evaluation.run(self.last, self.state):
                    return self._stopped(f"in the last evaluation, of step {self.last}")
                row = self.log.rows[-1]
            self.watchdog.beat("save")
            self.checkpoints.wait()
        except errors.NonFiniteError as error:
            say("replaying the step to find where that came from")
            beat = self.watchdog.beat
            say(report_nonfinite(self.folder, error, self.recipe, self.draws, beat=beat))
            raise
        return {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}

    def progress(self) -> dict[str, Any]:
        """What is kept beside the state."""
        # A step that was saved before its evaluation was done is evaluated when the run goes on.
        is_pending = self.evaluation.pending is not None
        total = resume.add(self.spent, self.clock, self.recipe, self.options)
        return total | {"eval_pending": is_pending, "unreadable": self.left_out.examples()}

    def measured(self, begun: float | None, programs: program_cache.Uses | None) -> dict[str, Any]:
        """What `result.json` says of times and speeds, over all parts of the run."""
        totals = self.progress()
        seconds = totals["train_seconds"]
        speed = totals["timed_examples"] / seconds if seconds else None
        usage = mean_usage(self.usages, self.last)
        used = self._mfu(usage, speed) if speed else None
        first_step = self.clock.first_step
        waited = None if begun is None or first_step is None else first_step - begun
        return {
            "train_seconds": round(seconds, 3),
            "compile_seconds": round(totals["compile_seconds"], 3),
            "seconds_to_first_step": None if waited is None else round(waited, 3),
            "compile_cache": programs and programs.to_json(),
            "examples_per_second": round(speed, 1) if speed else None,
            "mfu": None if used is None else round(used, 5),
            "flops_per_example": round(usage.flops_per_example),
            "peak_flops": None if self.peak is None else round(self.peak),
            "unreadable": len(totals["unreadable"]) if self.arrays is None else None,
            "data_wait_share": round(totals["data_seconds"] / seconds, 4) if seconds else None,
        }

    def _catch_up(self) -> bool:
        """Make up for an evaluation that was broken off; whether that was done."""
        if not self.evaluation.catch_up(self.first, self.state):
            return False
        self.log.sync()
        score = self.evaluation.results[self.first].get(self.recipe.monitor)
        rest = {**self.spent, "eval_pending": False}
        self.checkpoints.amend(self.first, score=score, extra=rest)
        return True

    def _compiled(self) -> tuple[dict[int, ShapeGuard], Several | None]:
        """The step of each stage by where it begins, and several of them in a call if that is wanted."""
        recipe = self.recipe

        def compiled(loss_fn: LossFn, num_steps: int = 1) -> ShapeGuard:
            make_step = partial(
                step_maker(recipe.tables),
                loss_fn,
                recipe.tx,
                weights_fn=recipe.weights_fn,
                coefficients=recipe.coefficients,
                accumulate=recipe.accumulate,
                ema_decay=recipe.ema_decay,
                on_nonfinite=recipe.on_nonfinite,
                max_spike=recipe.max_spike,
            )
            step = self.strategy.compile_step(make_step, self.arrays, num_steps=num_steps)
            lengths = recipe.lengths
            return ShapeGuard(step, num_expected=1 if lengths is None else len(lengths.buckets))

        steps = {begin: compiled(loss_fn) for begin, loss_fn in recipe.loss_fns.items()}
        if (in_call := self.options.steps_per_call) == 1:
            return steps, None
        calls = {begin: compiled(loss_fn, in_call) for begin, loss_fn in recipe.loss_fns.items()}
        several = Several(in_call, calls, self.schedule.needs_state)
        _warn_of_single_steps(several, recipe.num_steps)
        return steps, several

    def _fit(self, steps: Mapping[int, ShapeGuard], several: Several | None) -> str | None:
        """Take the steps; why it ended before the last one."""
        recipe, options = self.recipe, self.options

        def measure(*_: Any) -> None:
            """A hook: after the first step, when the devices have nothing to do."""
            self.peak  # noqa: B018

        def wait_before_save(step: int, _: Any, metrics: StepMetrics) -> None:
            """A hook: waiting for the step is limited, saving isn't."""
            if self.schedule.is_save_due(step):
                metrics.read()

        def mfu(step: int, speed: float) -> float | None:
            return self._mfu(self.usages[max(b for b in self.usages if b < step)], speed)

        with (
            feed(recipe.train, self.draws, self.strategy, options, self.left_out) as batches,
            hooks.ShowProgress(
                recipe.num_steps,
                recipe.batch_size,
                self.evaluation,
                first=self.first,
                clock=self.clock,
                mfu=mfu,
                console=Console(stderr=True, quiet=not hosts.is_first()),
            ) as show,
            hooks.Profile(self.folder / "profile", self.first + 2, options.profile_steps) as profile,
        ):
            writing = hooks.LogMetrics(
                self.log,
                options.log_every,
                recipe.num_steps,
                recipe.num_examples / recipe.batch_size,
                recipe.learning_rate,
                self.left_out.row,
            )
            if self.early.is_over():  # the run ended here before
                return None
            self.state, reason = fit(
                steps[0],
                self.state,
                batches,
                hooks=[
                    self.stop.note,
                    self.left_out,
                    measure,
                    writing,
                    self.evaluation,
                    wait_before_save,
                    self.watchdog.around("save", self.saving),
                    show,
                    profile,
                    self.early,
                    self.stop,
                ],
                beat=self.watchdog.beat,
                clock=self.clock,
                later={begin: steps[begin] for begin, _ in recipe.stages},
                several=several,
            )
        return reason

    def _mfu(self, usage: Usage, speed: float) -> float | None:
        return dataclasses.replace(usage, peak=self.peak).mfu(speed)

    def _stopped(self, where: str) -> None:
        say(f"stopped {where}; the same command goes on")


def _warn_of_single_steps(several: Several, num_steps: int) -> None:
    """Say so if most steps can't be taken several in a call."""
    seen = range(0, min(num_steps, 100 * several.num_steps), several.num_steps)
    share = sum(several.fits(i, num_steps) for i in seen) / len(seen)
    if share < 0.5:
        say(
            f"warning: only {share:.0%} of the steps are taken {several.num_steps} in a call: an "
            "evaluation or a save breaks one; choose multiples for --eval-every and --checkpoint-every"
        )


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """When to evaluate and when to save."""

    recipe: Recipe
    options: RunOptions

    def is_eval_due(self, step: int) -> bool:
        """At the end, and at every epoch's end or every `eval_every` steps."""
        if step == self.recipe.num_steps:
            return True
        if self.options.eval_every:
            return step % self.options.eval_every == 0
        drawn, size = step * self.recipe.batch_size, self.recipe.num_examples
        return drawn // size > (drawn - self.recipe.batch_size) // size

    def is_save_due(self, step: int) -> bool:
        """After each evaluation, every `checkpoint_every` steps, and before a short last batch."""
        every = self.options.checkpoint_every
        is_before_short = self._has_short_end and step == self.recipe.num_steps - 1
        return self.is_eval_due(step) or bool(every and step % every == 0) or is_before_short

    def needs_state(self, step: int) -> bool:
        """Whether something needs the state after this step."""
        return self.is_eval_due(step) or self.is_save_due(step)

    def keep(self, step: int) -> tuple[int, ...]:
        """A run with a short last batch can be made longer exactly only from before that batch."""
        is_short = self._has_short_end and step == self.recipe.num_steps
        return (step - 1,) if is_short else ()

    @property
    def _has_short_end(self) -> bool:
        return self.recipe.num_positions % self.recipe.batch_size != 0
