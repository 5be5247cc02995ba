"""The commands that every experiment has: train, eval and duel, written once against `Recipe`."""

import dataclasses
import json
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxnets import errors
from jaxnets.config import RunOptions, from_json, parse_flags, preset_of, to_json
from jaxnets.data import Batches
from jaxnets.recipe import Recipe
from jaxnets.report import draw_curves
from jaxnets.train import checkpoint, hooks, run_folder, sharding
from jaxnets.train.evaluate import evaluate, make_eval_step
from jaxnets.train.loop import Clock, fit
from jaxnets.train.metrics_log import MetricsLog
from jaxnets.train.state import TrainState, create_state
from jaxnets.train.step import make_train_step
from jaxnets.version import __version__

COMMANDS = ("train", "eval", "duel")
MakeRecipe = Callable[[Any, RunOptions], Recipe]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an experiment module hands to `main`.

    Attributes:
        name: as in `python -m experiments.NAME`.
        about: one line for the help.
        config: the default config, a flat frozen dataclass.
        make_recipe: `make_recipe(config, options) -> Recipe`.
        presets: other configs, by name.
        closing: printed at the end of training.
    """

    name: str
    about: str
    config: Any
    make_recipe: MakeRecipe
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    closing: str = ""


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run a command of an experiment.

    Args:
        experiment: which.
        argv: the words of the command line; those of this process by default.

    Returns:
        the exit status: 0, 1 if parity fails, 2 for a user's mistake, 128 + n after signal n.
    """
    warnings.showwarning = _show_warning
    try:
        return _run(experiment, list(sys.argv[1:] if argv is None else argv))
    except errors.ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a folder that went away
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(experiment: Experiment, argv: list[str]) -> int:
    prog = f"python -m experiments.{experiment.name}"
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "--help"
    if command == "--help":
        presets = f" Presets (--preset): {', '.join(experiment.presets)}." if experiment.presets else ""
        print(f"usage: {prog} {{{','.join(COMMANDS)}}} [FLAGS]\n\n{experiment.about}{presets}")
        return 0 if argv else 2
    if command not in COMMANDS:
        raise errors.unknown("command", command, COMMANDS)
    preset, words = preset_of(argv, experiment.presets)
    default = experiment.presets[preset] if preset else experiment.config
    folder = Path("runs") / (f"{experiment.name}-{preset}" if preset else experiment.name)
    parse = partial(parse_flags, words, prog=f"{prog} {command}", about=experiment.about)
    config, options = parse(default)
    folder = options.run_dir or folder
    options = dataclasses.replace(options, run_dir=folder)
    if command == "eval":
        # The run says what it was trained with; flags may still change where and on what.
        stored = run_folder.read_config(folder)
        if stored["experiment"] != experiment.name:
            raise errors.ConfigError(
                f"{folder} holds a run of {stored['experiment']}, not of {experiment.name}"
            )
        config, _ = parse(from_json(type(default), stored["config"]))
        return _eval(experiment, config, options, folder)
    if command == "duel":
        from jaxnets.interop.duel import run_duel  # the only command that needs PyTorch

        recipe = experiment.make_recipe(config, options)
        return run_duel(experiment.name, recipe, config, options)
    return _train(experiment, config, options, folder)


def _train(experiment: Experiment, config: Any, options: RunOptions, folder: Path) -> int:
    for name in ("log_every", "eval_every", "checkpoint_every"):
        if getattr(options, name) < (1 if name == "log_every" else 0):
            raise errors.ConfigError(f"{name} is {getattr(options, name)}; it counts steps")
    strategy = _strategy(options)
    recipe = experiment.make_recipe(config, options)
    sharding.check_divides(recipe.batch_size, strategy.num_devices, recipe.accumulate)
    opened = run_folder.open_run(
        folder,
        experiment.name,
        to_json(config),
        resume=options.resume,
        allow_change=options.allow_change,
    )
    with opened, hooks.StopOnSignal().installed() as stop:
        result = _train_in(folder, recipe, options, strategy, stop)
        if stop.signal is not None:
            return 128 + stop.signal
    if result is not None:
        values = result["eval"]
        print(
            f"test {recipe.monitor} {values[recipe.monitor]:.4f} on {values['count']:,} examples after "
            f"{result['epochs']:g} epochs; {result['train_seconds']:.1f} s of training, "
            f"{result['compile_seconds']:.1f} s of compilation\n"
            f"everything is in {folder}: result.json, curves.png, metrics.csv, checkpoints, tensorboard"
        )
        if experiment.closing:
            print(experiment.closing)
    return 0


def _train_in(
    folder: Path,
    recipe: Recipe,
    options: RunOptions,
    strategy: sharding.Strategy,
    stop: hooks.StopOnSignal,
) -> dict[str, Any] | None:
    """Train in an open run folder; the result, or None if a signal stopped the run."""
    make_state = _make_state(recipe)
    num_steps = recipe.num_steps
    batches = Batches(recipe.num_examples, recipe.batch_size, recipe.num_positions, seed=recipe.seed)
    clock, before = Clock(), {"train_seconds": 0.0, "examples": 0}
    with (
        checkpoint.Checkpoints(folder / "checkpoints", maximize=recipe.maximize) as checkpoints,
    ):
        for name in checkpoints.clean():
            _say(f"removed the unfinished checkpoint {name}")
        latest = checkpoints.latest()
        if latest is None:
            state = strategy.init(make_state)
        else:
            state, manifest = checkpoints.restore(latest, strategy.abstract(make_state))
            before |= manifest.extra
            _say(f"resuming at step {latest} of {num_steps}")
        first = int(state.step)
        log = MetricsLog(folder, step=first)
        _check_record(log.rows, first, options.log_every)

        def is_eval_due(step: int) -> bool:
            if step == num_steps or not options.eval_every:
                drawn, size = step * recipe.batch_size, recipe.num_examples
                return step == num_steps or drawn // size > (drawn - recipe.batch_size) // size
            return step % options.eval_every == 0

        def is_save_due(step: int) -> bool:
            every = options.checkpoint_every
            return is_eval_due(step) or bool(every and step % every == 0)

        def progress() -> dict[str, float]:
            done = int(clock.steps) * recipe.batch_size
            return {
                "train_seconds": before["train_seconds"] + clock.train,
                "examples": before["examples"] + done,
            }

        evaluation = hooks.Evaluate(_evaluator(recipe, strategy), log, is_eval_due)
        saving = hooks.SaveCheckpoint(
            checkpoints,
            log,
            is_save_due,
            score=lambda step: evaluation.results.get(step, {}).get(recipe.monitor),
            extra=progress,
        )
        train_step = strategy.compile_step(
            partial(
                make_train_step,
                recipe.loss_fn,
                recipe.tx,
                weights_fn=recipe.weights_fn,
                coefficients=recipe.coefficients,
                accumulate=recipe.accumulate,
            ),
            recipe.train,
        )
        steps_per_epoch = recipe.num_examples / recipe.batch_size
        try:
            with hooks.ShowProgress(num_steps, recipe.batch_size, evaluation) as show:
                writing = hooks.LogMetrics(log, options.log_every, num_steps, steps_per_epoch)
                state, reason = fit(
                    train_step,
                    state,
                    batches,
                    hooks=[writing, evaluation, saving, show, stop],
                    clock=clock,
                )
            if reason:
                log.sync()
                checkpoints.save(state, extra=progress())
                checkpoints.wait()
                _say(f"stopped by {reason} after step {int(state.step)}; the same command goes on")
                return None
            checkpoints.wait()
        finally:
            log.close()
        draw_curves(log.rows, folder / "curves.png", title=f"{recipe.name}, {num_steps} steps")
    row = next(row for row in reversed(log.rows) if "eval/count" in row)
    totals = progress()
    result = {
        "experiment": recipe.name,
        "steps": int(state.step),
        "epochs": round(recipe.num_positions / recipe.num_examples, 4),
        "eval": {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")},
        "best_step": checkpoints.best(),
        "train_seconds": round(totals["train_seconds"], 3),
        "compile_seconds": round(clock.compile, 3),
        "examples_per_second": round(totals["examples"] / max(totals["train_seconds"], 1e-9), 1),
        "data_wait_share": round(clock.data_wait_share, 4),
        "num_devices": strategy.num_devices,
        "strategy": strategy.name,
        "device": strategy.mesh.devices.flat[0].device_kind,
        "versions": versions(),
    }
    checkpoint.write_atomically(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _eval(experiment: Experiment, config: Any, options: RunOptions, folder: Path) -> int:
    strategy = _strategy(options)
    recipe = experiment.make_recipe(config, options)
    chosen = options.checkpoint
    with checkpoint.Checkpoints(folder / "checkpoints", maximize=recipe.maximize) as checkpoints:
        if chosen in ("latest", "best"):
            step = checkpoints.latest() if chosen == "latest" else checkpoints.best()
        elif chosen.isdigit():
            step = int(chosen)
        else:
            raise errors.unknown("checkpoint", chosen, ("latest", "best", "the number of a step"))
        if step is None:
            raise errors.CheckpointError(f"{folder} has no {chosen} checkpoint yet")
        state, _ = checkpoints.restore(step, strategy.abstract(_make_state(recipe)))
    values = _evaluator(recipe, strategy)(state)
    print(json.dumps({"step": step, "eval": values}))
    return 0


def _strategy(options: RunOptions) -> sharding.Strategy:
    return sharding.make_strategy(options.strategy, num_devices=options.num_devices, use_jit=options.jit)


def _make_state(recipe: Recipe) -> Callable[[], TrainState]:
    return lambda: create_state(recipe.init_fn, recipe.tx, key=jax.random.key(recipe.seed))


def _evaluator(recipe: Recipe, strategy: sharding.Strategy) -> Callable[[TrainState], dict]:
    """`evaluate(state) -> {name: value}` on the recipe's test set."""
    size = len(next(iter(recipe.test.values())))
    devices = strategy.num_devices
    batch_size = -(-min(recipe.eval_batch_size, size) // devices) * devices
    batches = Batches(size, batch_size, size, shuffle=False)
    step = strategy.compile_eval(partial(make_eval_step, recipe.eval_fn), recipe.test)
    return lambda state: evaluate(step, state, batches)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "jaxnets": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _check_record(rows: Sequence[Mapping[str, Any]], step: int, log_every: int) -> None:
    """Warn if rows are missing before the step that a run goes on from."""
    newest = max((row["step"] for row in rows), default=0)
    if step - newest > log_every:
        _say(f"warning: metrics.jsonl ends at step {newest}, before the checkpoint of step {step}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show_warning(message: Any, category: type, filename: str, lineno: int, *_: Any) -> None:
    if category is UserWarning:
        _say(f"warning: {message}")
