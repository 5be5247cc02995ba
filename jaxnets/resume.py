"""The state that a run goes on from, what it has spent so far, and the state that a reader asks for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxnets import errors
from jaxnets.config import RunOptions
from jaxnets.recipe import Recipe
from jaxnets.train import step_folder, stored_model
from jaxnets.train.checkpoint import Checkpoints
from jaxnets.train.hosts import say
from jaxnets.train.loop import Clock
from jaxnets.train.manifest import MANIFEST, damaged, read_manifest
from jaxnets.train.metrics_log import read_rows
from jaxnets.train.sharding import Strategy
from jaxnets.train.state import TrainState
from jaxnets.train.verdict import by_first
from jaxnets.typing import Params, PyTree

T = TypeVar("T")


def start(
    checkpoints: Checkpoints,
    recipe: Recipe,
    strategy: Strategy,
    folder: Path,
    make_state: Callable[[], TrainState],
) -> tuple[TrainState, Mapping[str, Any]]:
    """The state to go on from, and what the run has spent so far."""
    for name in checkpoints.clean():
        say(f"removed the unfinished checkpoint {name}")
    num_steps = recipe.num_steps
    latest, lines = checkpoints.newest_whole()
    for line in lines:
        say(f"warning: {line}")
    taken = latest
    if latest is not None:
        ended = checkpoints.manifest(latest).extra.get("num_positions", 0)
        is_short = latest * recipe.batch_size > ended
        if is_short and recipe.num_positions > ended:
            if checkpoints.is_whole(latest - 1):
                say(f"step {latest} had a short batch; going on from before it")
                taken = latest - 1
            else:
                say(
                    f"warning: step {latest} had a short batch, and the checkpoint before it is gone: "
                    "the run is not what it would be if it had been so long from the start"
                )
    if latest is None or taken is None:
        if read_rows(folder / "metrics.jsonl"):
            say("warning: there are metrics but no checkpoint; the run begins anew")
        return strategy.init(make_state), {}
    if latest > num_steps:
        raise errors.ConfigError(
            f"the run in {folder} is at step {latest} already, and this one would end at {num_steps}"
        )
    state, manifest = checkpoints.restore(taken, strategy.abstract(make_state))
    if taken != latest:
        checkpoints.discard(latest)
    say(f"resuming at step {taken} of {num_steps}")
    before = manifest.extra.get("fixed_order", 0)
    if before != strategy.virtual_shards:
        say(
            f"warning: this run had --fixed-order {before} so far: going on in another order, it is the "
            "same to rounding, but not if the model has batch normalisation"
        )
    return state, manifest.extra


def read(checkpoints: Checkpoints, chosen: str, abstract: TrainState) -> tuple[int, TrainState]:
    """The step and the state that someone asks for who only reads; nothing in the folder is changed.

    Args:
        checkpoints: of a run, which may still go on.
        chosen: "latest", the newest whole one; "best"; or the number of a step.
        abstract: shapes, dtypes and shardings of the state, as of `Strategy.abstract`.

    Raises:
        ConfigError: if `chosen` is none of these.
        CheckpointError: if there is no such checkpoint, or it isn't this recipe's.
        DamagedError: if that of "best" or of a number isn't whole, with those that are.
    """
    return _read(checkpoints, chosen, lambda step: checkpoints.restore(step, abstract)[0])


def read_model(checkpoints: Checkpoints, chosen: str) -> tuple[int, Params, PyTree]:
    """The step, the parameters and the model's own state, of any model; otherwise as `read`."""
    step, (params, model_state) = _read(
        checkpoints, chosen, lambda step: stored_model.read_model(checkpoints, step)
    )
    return step, params, model_state


def _read(checkpoints: Checkpoints, chosen: str, restore: Callable[[int], T]) -> tuple[int, T]:
    if chosen == "latest":
        step, lines = checkpoints.newest_whole(set_aside=False)
        for line in lines:
            say(f"warning: {line}")
    elif chosen == "best":
        for line in by_first("resume/unranked", lambda: _unranked(checkpoints.folder)):
            say(f"warning: {line}; it may have been the best")
        step = checkpoints.best()
    elif chosen.isdigit():
        step = int(chosen)
    else:
        raise errors.unknown("checkpoint", chosen, ("latest", "best", "the number of a step"))
    if step is None:
        raise errors.CheckpointError(f"{checkpoints.folder.parent} has no {chosen} checkpoint yet")
    try:
        return step, restore(step)
    except errors.DamagedError as error:
        whole = [str(other) for other in checkpoints.steps() if checkpoints.is_whole(other)]
        raise errors.DamagedError(f"{error} (whole are: {', '.join(whole) or 'none'})") from error


def _unranked(folder: Path) -> list[str]:
    """What is wrong with the steps whose scores can't be known."""
    lines = []
    for path in step_folder.numbered(folder):
        try:
            if not step_folder.is_left_over(path):
                read_manifest(path)
        except FileNotFoundError:
            lines.append(str(damaged(int(path.name), path / MANIFEST)))
        except errors.CheckpointError as error:
            lines.append(str(error))
    return lines


def add(spent: Mapping[str, Any], clock: Clock, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """What the run has spent in all; the number of positions says how long it was meant to be."""
    here = {
        "train_seconds": clock.train,
        "data_seconds": clock.data,
        "compile_seconds": clock.compile,
        "timed_examples": clock.steps * recipe.batch_size,
    }
    total = {name: spent.get(name, 0) + value for name, value in here.items()}
    return {**total, "num_positions": recipe.num_positions, "fixed_order": options.fixed_order}
