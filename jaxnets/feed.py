"""How a recipe's data reaches the step: kept on the devices, or streamed there as it is needed."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxnets import errors
from jaxnets.config import RunOptions
from jaxnets.data import Arrays, Batches, ByLength, Part, Stream
from jaxnets.recipe import Recipe, count_examples
from jaxnets.train import hosts
from jaxnets.train.loop import Clock
from jaxnets.train.mesh import Overlapping, without_overlap
from jaxnets.train.prefetch import Prefetch
from jaxnets.train.sharding import Strategy
from jaxnets.typing import Indexed

if TYPE_CHECKING:
    import numpy as np

_ON_DEVICE = 2  # batches, at most, that wait there for their step
_MUCH_WAITING = 0.1  # of the training time


def resident(
    data: "Mapping[str, np.ndarray] | Indexed", options: RunOptions
) -> "Mapping[str, np.ndarray] | None":
    """The arrays to keep on the devices; None if the data is streamed.

    That is what `Strategy.compile_step` and `compile_eval` take beside the step.
    """
    return data if isinstance(data, Mapping) and not options.stream else None


def check_feed(recipe: Recipe, options: RunOptions) -> None:
    """Refuse options that can't be, and more data than may be kept on a device.

    Raises:
        ConfigError: if so.
    """
    for name in ("num_workers", "prefetch", "max_unreadable"):
        if getattr(options, name) < 0:
            raise errors.ConfigError(f"{name} is {getattr(options, name)}; it must be at least 0")
    num_steps = options.steps_per_call
    if num_steps < 1:
        raise errors.ConfigError(f"steps_per_call is {num_steps}; it must be at least 1")
    if num_steps > 1 and (
        resident(recipe.train, options) is None
        or options.strategy == "pmap"
        or not options.jit
        or options.fixed_order
    ):
        raise errors.ConfigError(
            "several steps in a call take data that is kept in memory, a compiled step, and neither "
            "--strategy pmap nor --fixed-order"
        )
    if recipe.lengths is not None and num_steps > 1:
        raise errors.ConfigError(
            "several steps in a call take batches of one shape, not of many lengths"
        )
    if recipe.partners and resident(recipe.train, options) is None:
        raise errors.ConfigError("examples are mixed with others only where the data is kept in memory")
    parts = [resident(part, options) or {} for part in (recipe.train, recipe.test)]
    size = sum(_num_bytes(array) for part in parts for array in part.values()) / 1e9
    if size > options.max_resident_gb:
        raise errors.ConfigError(
            f"the data takes {size:.3g} GB of each device, more than the {options.max_resident_gb:g} GB "
            "that may be kept there: use --stream, or a higher --max-resident-gb"
        )


def _num_bytes(array: "np.ndarray") -> int:
    """What an array takes on a device."""
    kept = without_overlap(array)
    return (kept.whole if isinstance(kept, Overlapping) else kept).nbytes


def train_draws(recipe: Recipe) -> Batches | ByLength:
    """Which examples each step of a run sees."""
    draws = Batches(
        recipe.num_examples,
        recipe.batch_size,
        recipe.num_positions,
        seed=recipe.seed,
        partners=recipe.partners,
    )
    lengths = recipe.lengths
    return draws if lengths is None else ByLength(draws, lengths.train, lengths.buckets)


def test_draws(recipe: Recipe, batch_size: int) -> Batches | ByLength:
    """The test set, each example once."""
    size = count_examples(recipe.test)
    draws = Batches(size, batch_size, size, shuffle=False)
    lengths = recipe.lengths
    return draws if lengths is None else ByLength(draws, lengths.test, lengths.buckets)


@contextlib.contextmanager
def feed(
    data: "Mapping[str, np.ndarray] | Indexed",
    draws: Batches | ByLength,
    strategy: Strategy,
    options: RunOptions,
    unreadable: "Unreadable | None" = None,
) -> Iterator[Indexed]:
    """What the loop draws from: the draws alone for resident data, otherwise batches on the devices.

    Args:
        data: arrays `{name: [N, ...]}` or a source.
        draws: which examples each batch holds.
        strategy: on which devices.
        options: `stream`, `num_workers` and `prefetch` count.
        unreadable: of examples that may be left out; by default none may.
    """
    if resident(data, options) is not None:
        yield draws
        return
    source = Arrays(data) if isinstance(data, Mapping) else data
    rows = tuple(strategy.rows(draws.batch_size).tolist())
    mine = draws if len(rows) == draws.batch_size else Part(draws, rows)
    unreadable = unreadable or Unreadable(0)
    stream = Stream(
        source,
        mine,
        num_workers=options.num_workers,
        prefetch=options.prefetch,
        max_unreadable=unreadable.limit,
        on_unreadable=unreadable.note,
    )
    with Prefetch(stream, strategy.put_batch, depth=min(options.prefetch, _ON_DEVICE)) as batches:
        yield batches


class Unreadable:
    """The training examples that can't be read and are left out.

    It is a hook: what it counts is of the steps that are done, whatever was read ahead. So a run that
    goes on counts as one that was never broken off.

    Args:
        limit: how many there may be; with 0 each is an error where it is read.
        known: those that were found before.
        step: the step that the run goes on from.
    """

    def __init__(self, limit: int, known: Iterable[int] = (), *, step: int = 0):
        self.limit = limit
        self._known = set(known)
        self._step = step
        self._found: dict[int, set[int]] = {}  # by batch
        self._told: set[int] = set()

    def __call__(self, step: int, state: Any, metrics: Any) -> None:
        """Count to this step."""
        self._step = step

    def note(self, i: int, found: Mapping[int, str]) -> None:
        """Tell of those in batch i that weren't told of yet.

        Raises:
            DataError: if there are more than may be.
        """
        self._found[i] = set(found)
        for example in sorted(found.keys() - self._told):
            self._told.add(example)
            line = f"warning: training example {example} is left out: {found[example]}"
            print(line, file=sys.stderr, flush=True)
        self._check(self._known.union(*self._found.values()))

    def examples(self) -> list[int]:
        """Those in the steps that are done, of all processes; every process must ask.

        Raises:
            DataError: if there are more than may be.
        """
        if not self.limit:
            return sorted(self._known)
        done = list(self._found.items())  # another thread adds to it
        mine = self._known.union(*(found for i, found in done if i < self._step))
        everyone = set().union(*hosts.gather("feed/unreadable", sorted(mine)))
        self._check(everyone)
        return sorted(everyone)

    def row(self) -> dict[str, int]:
        """Their number, for the record of metrics; nothing where none may be."""
        return {"unreadable": len(self.examples())} if self.limit else {}

    def _check(self, found: set[int]) -> None:
        if len(found) > self.limit:
            raise errors.DataError(
                f"{len(found)} training examples can't be read, more than the {self.limit} of "
                f"--max-unreadable: {', '.join(map(str, sorted(found)[:8]))}"
                f"{', ...' if len(found) > 8 else ''}; the lines above say why"
            )


def advice(clock: Clock, options: RunOptions) -> str | None:
    """What to do about waiting for streamed data; None if there was little of it."""
    share = clock.data_wait_share
    if share <= _MUCH_WAITING:
        return None
    return (
        f"input is the limit: {share:.0%} of the training time went by waiting for data; try more "
        f"--num-workers (there were {options.num_workers}, this machine has {os.cpu_count()} cores)"
    )
