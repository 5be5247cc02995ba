"""A recipe trained in a run folder, from its start or from where it stopped, to its result."""

import contextlib
import functools
import itertools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from jaxnets import errors, resume
from jaxnets.config import RunOptions
from jaxnets.evaluation import keep_predictions, row_of
from jaxnets.feed import advice, check_feed
from jaxnets.recipe import Recipe
from jaxnets.report import draw_curves
from jaxnets.run import Run
from jaxnets.train import checkpoint, files, hosts, program_cache, sharding
from jaxnets.train.health import uses_health
from jaxnets.train.hosts import say
from jaxnets.train.loop import Clock
from jaxnets.train.peak import Usage, usage_of
from jaxnets.train.preemption import StopOnSignal
from jaxnets.train.state import TrainState, create_state
from jaxnets.train.watchdog import Watchdog
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
    if recipe.tables is not None and strategy.virtual_shards:
        raise errors.ConfigError(
            f"{recipe.name} updates the rows of tables, of which there is no fixed order: leave out "
            "--fixed-order"
        )
    if recipe.tables is not None and recipe.ema_decay is not None:
        raise errors.ConfigError("tables that are updated by rows have no moving average (ema_decay)")
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
    clock = Clock()
    with checkpoint.Checkpoints(
        folder / "checkpoints", maximize=recipe.maximize, num_best=options.keep_best
    ) as checkpoints:
        if hosts.count() == 1:  # of several processes all are asked together, or none
            checkpoints.latest()  # from here on `newest` is known
            stop.saved = lambda: checkpoints.newest
        state, spent = resume.start(checkpoints, recipe, strategy, folder, make_state(recipe))
        on_start()
        say(_what_runs(folder, strategy))
        watchdog = watchdog or Watchdog(0)
        run = Run(
            folder, recipe, options, strategy, usages, stop, watchdog, clock, checkpoints, spent, state
        )
        try:
            evaluated = run.to_the_end()
        finally:
            run.log.close()
        if evaluated is None:
            return None
        best = checkpoints.ranked()[: options.keep_best]
    result = _write_result(run, evaluated, best, run.measured(begun, programs))
    if not hosts.is_first():
        if options.pictures:  # of which every process computes a part
            keep_predictions(folder, recipe, strategy, options, run.state)
        return result
    # After the result, which a failing picture must not cost.
    draw_curves(run.log.rows, folder / "curves.png", title=f"{recipe.name}, {run.last} steps")
    if options.pictures:
        keep_predictions(folder, recipe, strategy, options, run.state)
    if run.arrays is None and (line := advice(clock, options)):
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
    run: Run, evaluated: Mapping[str, Any], best: Sequence[int], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `result.json`, unless nothing was trained: what an old one says was measured then."""
    recipe, strategy = run.recipe, run.strategy
    path = run.folder / "result.json"
    if run.first == run.last and path.exists():
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text())
    drawn = min(run.last * recipe.batch_size, recipe.num_positions)
    result = {
        "experiment": recipe.name,
        "steps": run.last,
        "epochs": round(drawn / recipe.num_examples, 4),
        "eval": dict(evaluated),
        "best_step": best[0] if best else None,
        "best_steps": list(best),
        **measured,
        "num_workers": run.options.num_workers if run.arrays is None else None,
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
            of_shapes = [(share, usage_of(loss_fn, state, batch | x)) for x, share in _masks(recipe)]
            mean = sum(share * usage.flops_per_example for share, usage in of_shapes)
            usages[begin] = Usage(mean)
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


def _masks(recipe: Recipe) -> list[tuple[dict[str, Any], float]]:
    """What draws hold of the lengths of sequences, for each bucket, and the share of examples in it."""
    if recipe.lengths is None:
        return [({}, 1.0)]
    buckets = sorted(recipe.lengths.buckets)
    longest = np.max(np.stack(list(recipe.lengths.train.values())), axis=0)
    places = np.searchsorted(buckets, np.minimum(longest, buckets[-1]))
    shares = np.bincount(places, minlength=len(buckets)) / len(places)
    names = [f"{name}_mask" for name in recipe.lengths.train]
    return [
        ({n: jax.ShapeDtypeStruct((recipe.batch_size, width), np.bool_) for n in names}, float(share))
        for width, share in zip(buckets, shares, strict=True)
    ]
