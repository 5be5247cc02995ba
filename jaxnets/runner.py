"""A recipe trained in a run folder, from its start or from where it stopped, to its result."""

import contextlib
import dataclasses
import functools
import itertools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from rich.console import Console

from jaxnets import errors, resume
from jaxnets.config import RunOptions
from jaxnets.data import Batches
from jaxnets.evaluation import keep_predictions, make_evaluator, row_of
from jaxnets.feed import Unreadable, advice, check_feed, feed, resident
from jaxnets.recipe import Recipe
from jaxnets.report import draw_curves
from jaxnets.train import checkpoint, files, hooks, hosts, program_cache, sharding
from jaxnets.train.diagnosis import report_nonfinite
from jaxnets.train.health import uses_health
from jaxnets.train.hosts import say
from jaxnets.train.loop import Clock, Several, StepMetrics, fit
from jaxnets.train.metrics_log import MetricsLog
from jaxnets.train.peak import Usage, mean_usage, peak_flops, usage_of
from jaxnets.train.preemption import StopOnSignal
from jaxnets.train.shapes import ShapeGuard
from jaxnets.train.state import TrainState, create_state
from jaxnets.train.step import make_train_step
from jaxnets.train.watchdog import Watchdog
from jaxnets.typing import LossFn
from jaxnets.version import __version__

_MAX = 2**31 - 1  # steps and seeds are 32-bit integers


def check_recipe(
    recipe: Recipe, strategy: sharding.Strategy, options: RunOptions | None = None
) -> dict[int, Usage]:
    """Refuse what can't run, before anything is written.

    Returns:
        what training asks of the devices, by the step from which it does.

    Raises:
        ConfigError: if the batch doesn't divide, a number is out of range, the model doesn't fit the
            data or what a stage makes of it, or the data is more than may be kept on a device.
    """
    options = options or RunOptions()
    check_feed(recipe, options)
    uses_health(recipe.on_nonfinite, recipe.max_spike)
    parts = "shards of the fixed order" if strategy.virtual_shards else "devices"
    sharding.check_divides(recipe.batch_size, strategy.num_parts, recipe.accumulate, parts=parts)
    if not 0 <= recipe.seed <= _MAX:
        raise errors.ConfigError(f"the seed must lie in [0, {_MAX}], not {recipe.seed}")
    if recipe.num_positions > _MAX * recipe.batch_size:
        raise errors.ConfigError(f"the run has more than {_MAX} steps; choose fewer epochs")
    try:
        state = jax.eval_shape(make_state(recipe))
    except errors.ConfigError:
        raise
    except ValueError as error:
        raise errors.ConfigError(f"the model does not fit the data: {error}") from error
    begins = [0, *(begin for begin, _ in recipe.stages), recipe.num_steps]
    if recipe.stages and any(a >= b for a, b in itertools.pairwise(begins)):
        raise errors.ConfigError(f"stages must begin one after another within the run, not at {begins}")
    return _usages(recipe, state, options.max_unreadable)


def make_state(recipe: Recipe) -> Callable[[], TrainState]:
    """What makes the state before the first step; the same function again for the same recipe."""
    use_ema = recipe.ema_decay is not None
    return _make_state(recipe.init_fn, recipe.tx, recipe.seed, use_ema, recipe.use_health)


@functools.lru_cache(maxsize=1)  # what JAX has traced of it once it need not trace again
def _make_state(
    init_fn: Any, tx: Any, seed: int, use_ema: bool, use_health: bool
) -> Callable[[], TrainState]:
    return lambda: create_state(
        init_fn, tx, key=jax.random.key(seed), use_ema=use_ema, use_health=use_health
    )


def train(
    folder: Path,
    recipe: Recipe,
    options: RunOptions,
    strategy: sharding.Strategy,
    usages: Mapping[int, Usage],
    *,
    stop: StopOnSignal,
    watchdog: Watchdog | None = None,
    on_start: Callable[[], None] = lambda: None,
    begun: float | None = None,
    programs: program_cache.Uses | None = None,
) -> dict[str, Any] | None:
    """Train in a run folder that is open.

    Args:
        folder: of the run.
        recipe: what to train.
        options: how often to log, evaluate and save.
        strategy: on which devices.
        usages: as `check_recipe` gives them.
        stop: listens for signals.
        watchdog: is told what the run is at; without one nobody watches.
        on_start: called once the state is there and nothing more can be refused.
        begun: when the command was given, in seconds of `time.perf_counter`, for the record.
        programs: of the cache of compiled programs, if one is open, for the record.

    Returns:
        what `result.json` holds, or None if a signal stopped the run.

    Raises:
        CheckpointError: if the checkpoint can't be gone on with.
        ConfigError: if the run is further than the recipe goes.
        NonFiniteError: if the loss or the gradients of a step weren't finite.
    """
    num_steps = recipe.num_steps
    watchdog = watchdog or Watchdog(0)
    clock = Clock()
    with checkpoint.Checkpoints(
        folder / "checkpoints", maximize=recipe.maximize, num_best=options.keep_best
    ) as checkpoints:
        if hosts.count() == 1:  # of several processes all are asked together, or none
            stop.saved = checkpoints.latest
        state, spent = resume.start(checkpoints, recipe, strategy, folder, make_state(recipe))
        on_start()
        first = int(state.step)
        say(_what_runs(folder, strategy))
        log = MetricsLog(folder, step=first)
        schedule = _Schedule(recipe, options)
        left_out = Unreadable(options.max_unreadable, spent.get("unreadable", ()), step=first)
        evaluate = make_evaluator(recipe, strategy, options, should_stop=stop.is_due, beat=watchdog.beat)
        evaluation = hooks.Evaluate(watchdog.around("evaluate", evaluate), log, schedule.is_eval_due)
        early = hooks.StopEarly(log, recipe.monitor, recipe.patience, recipe.maximize)

        @functools.cache
        def peak() -> float | None:
            return peak_flops(list(strategy.mesh.devices.flat))

        def measure(*_: Any) -> None:
            """A hook: after the first step, when the devices have nothing to do."""
            peak()

        def wait_before_save(step: int, _: Any, metrics: StepMetrics) -> None:
            """A hook: waiting for the step is limited, saving isn't."""
            if schedule.is_save_due(step):
                metrics.read()

        def mfu(usage: Usage, speed: float) -> float | None:
            return dataclasses.replace(usage, peak=peak()).mfu(speed)

        def progress() -> dict[str, Any]:
            # A step that was saved before its evaluation was done is evaluated when the run goes on.
            is_pending = evaluation.pending is not None
            total = resume.add(spent, clock, recipe, options) | {"eval_pending": is_pending}
            return total | {"unreadable": left_out.examples()}

        saving = hooks.SaveCheckpoint(
            checkpoints,
            log,
            schedule.is_save_due,
            score=lambda step: evaluation.results.get(step, {}).get(recipe.monitor),
            extra=progress,
            keep=schedule.keep,
        )
        if spent.get("eval_pending"):
            if not evaluation.catch_up(first, state):
                say(f"stopped before the evaluation of step {first}; the same command goes on")
                log.close()
                return None
            log.sync()
            rest = {**spent, "eval_pending": False}
            checkpoints.amend(first, score=evaluation.results[first].get(recipe.monitor), extra=rest)
        arrays = resident(recipe.train, options)
        if arrays is not None:
            arrays = strategy.replicate(dict(arrays))  # once for all programs

        def compiled(loss_fn: LossFn, num_steps: int = 1) -> ShapeGuard:
            make_step = partial(
                make_train_step,
                loss_fn,
                recipe.tx,
                weights_fn=recipe.weights_fn,
                coefficients=recipe.coefficients,
                accumulate=recipe.accumulate,
                ema_decay=recipe.ema_decay,
                on_nonfinite=recipe.on_nonfinite,
                max_spike=recipe.max_spike,
            )
            return ShapeGuard(strategy.compile_step(make_step, arrays, num_steps=num_steps))

        steps = {begin: compiled(loss_fn) for begin, loss_fn in recipe.loss_fns.items()}
        several = None
        if (in_call := options.steps_per_call) > 1:
            calls = {begin: compiled(loss_fn, in_call) for begin, loss_fn in recipe.loss_fns.items()}
            several = Several(in_call, calls, schedule.needs_state)
            _warn_of_single_steps(several, num_steps)
        if stop.is_due():
            say(f"stopped before step {first + 1}; the same command goes on")
            log.close()
            return None
        draws = Batches(
            recipe.num_examples,
            recipe.batch_size,
            recipe.num_positions,
            seed=recipe.seed,
            partners=recipe.partners,
        )
        try:
            with (
                feed(recipe.train, draws, strategy, options, left_out) as batches,
                hooks.ShowProgress(
                    num_steps,
                    recipe.batch_size,
                    evaluation,
                    first=first,
                    clock=clock,
                    mfu=lambda step, speed: mfu(usages[max(b for b in usages if b < step)], speed),
                    console=Console(stderr=True, quiet=not hosts.is_first()),
                ) as show,
                hooks.Profile(folder / "profile", first + 2, options.profile_steps) as profile,
            ):
                writing = hooks.LogMetrics(
                    log,
                    options.log_every,
                    num_steps,
                    recipe.num_examples / recipe.batch_size,
                    recipe.learning_rate,
                    left_out.row,
                )
                reason = None
                if not early.is_over():  # or the run ended here before
                    state, reason = fit(
                        steps[0],
                        state,
                        batches,
                        hooks=[
                            stop.note,
                            left_out,
                            measure,
                            writing,
                            evaluation,
                            wait_before_save,
                            watchdog.around("save", saving),
                            show,
                            profile,
                            early,
                            stop,
                        ],
                        beat=watchdog.beat,
                        clock=clock,
                        later={begin: steps[begin] for begin, _ in recipe.stages},
                        several=several,
                    )
            last = int(state.step)
            if early.is_over():
                say(f"ended after step {last}: {recipe.patience} evaluations without a better one")
            elif reason and (last < num_steps or evaluation.pending is not None):
                log.sync()
                watchdog.beat("save")
                checkpoints.save(state, extra=progress())
                checkpoints.wait()
                say(f"stopped by {reason} after step {last}; the same command goes on")
                return None
            row = next((row for row in reversed(log.rows) if "eval/count" in row), {})
            if row.get("step") != last:  # the run was stopped here before, or its record is gone
                if not evaluation.run(last, state):
                    say(f"stopped in the last evaluation, of step {last}; the same command goes on")
                    return None
                row = log.rows[-1]
            watchdog.beat("save")
            checkpoints.wait()
        except errors.NonFiniteError as error:
            say("replaying the step to find where that came from")
            say(report_nonfinite(folder, error, recipe, draws, beat=watchdog.beat))
            raise
        finally:
            log.close()
        best = checkpoints.ranked()[: options.keep_best]
    totals = progress()
    seconds = totals["train_seconds"]
    speed = totals["timed_examples"] / seconds if seconds else None
    usage = mean_usage(usages, last)
    used = mfu(usage, speed) if speed else None
    waited = None if begun is None or clock.first_step is None else clock.first_step - begun
    measured = {
        "train_seconds": round(seconds, 3),
        "compile_seconds": round(totals["compile_seconds"], 3),
        "seconds_to_first_step": None if waited is None else round(waited, 3),
        "compile_cache": programs and programs.to_json(),
        "examples_per_second": round(speed, 1) if speed else None,
        "mfu": None if used is None else round(used, 5),
        "flops_per_example": round(usage.flops_per_example),
        "peak_flops": None if (most := peak()) is None else round(most),
        "unreadable": len(totals["unreadable"]) if arrays is None else None,
        "data_wait_share": round(totals["data_seconds"] / seconds, 4) if seconds else None,
    }
    evaluated = {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
    result = _write_result(
        folder, recipe, options, strategy, last, evaluated, best, measured, is_new=first != last
    )
    if not hosts.is_first():
        if options.pictures:  # of which every process computes a part
            keep_predictions(folder, recipe, strategy, options, state)
        return result
    # After the result, which a failing picture must not cost.
    draw_curves(log.rows, folder / "curves.png", title=f"{recipe.name}, {last} steps")
    if options.pictures:
        keep_predictions(folder, recipe, strategy, options, state)
    if arrays is None and (line := advice(clock, options)):
        say(line)
    return result


def _what_runs(folder: Path, strategy: sharding.Strategy) -> str:
    """A line for the beginning, before the wait for the compiler."""
    mesh = ", ".join(f"{name}={size}" for name, size in strategy.mesh.shape.items() if size > 1)
    order = (
        f", in the fixed order of {strategy.virtual_shards} shards" if strategy.virtual_shards else ""
    )
    processes = f" in {hosts.count()} processes" if hosts.count() > 1 else ""
    devices = f"{strategy.num_devices} x {strategy.mesh.devices.flat[0].device_kind}{processes}"
    return f"{folder}: on {devices}{f' ({mesh})' if mesh else ''}{order}; compiling the first step"


def _write_result(
    folder: Path,
    recipe: Recipe,
    options: RunOptions,
    strategy: sharding.Strategy,
    last: int,
    evaluated: Mapping[str, Any],
    best: Sequence[int],
    measured: Mapping[str, Any],
    *,
    is_new: bool,
) -> dict[str, Any]:
    """Write `result.json`, unless nothing was trained: what an old one says was measured then."""
    path = folder / "result.json"
    if not is_new and path.exists():
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text())
    result = {
        "experiment": recipe.name,
        "steps": last,
        "epochs": round(min(last * recipe.batch_size, recipe.num_positions) / recipe.num_examples, 4),
        "eval": dict(evaluated),
        "best_step": best[0] if best else None,
        "best_steps": list(best),
        **measured,
        "num_workers": options.num_workers if resident(recipe.train, options) is None else None,
        "num_devices": strategy.num_devices,
        "num_processes": hosts.count(),
        "strategy": strategy.name,
        "fixed_order": strategy.virtual_shards or None,
        "mesh": {name: size for name, size in strategy.mesh.shape.items() if size > 1},
        "device": strategy.mesh.devices.flat[0].device_kind,
        "versions": versions(),
    }
    if hosts.is_first():
        files.write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "jaxnets": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


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


def _usages(recipe: Recipe, state: TrainState, max_unreadable: int) -> dict[int, Usage]:
    size = recipe.batch_size
    rows = {"index": np.int32, "position": np.uint32, "mask": np.bool_}
    batch: dict[str, Any] = {name: jax.ShapeDtypeStruct((size,), dtype) for name, dtype in rows.items()}
    data = {
        name: jax.ShapeDtypeStruct((size, *np.shape(x)), np.asarray(x).dtype)
        for name, x in row_of(recipe.train, 0, max_unreadable).items()
    }
    batch |= data | ({"partner": data | {"index": batch["index"]}} if recipe.partners else {})
    usages = {}
    for begin, loss_fn in recipe.loss_fns.items():
        try:
            usages[begin] = usage_of(loss_fn, state, batch)
        except errors.UserError:
            raise
        except (FlaxError, TypeError, ValueError) as error:
            if isinstance(error, TypeError) and not begin:  # a mistake in code, not in a size
                raise
            raise errors.ConfigError(
                f"the model does not fit what it is trained on from step {begin} on: "
                f"{errors.first_line(error)}"
            ) from error
    return usages
