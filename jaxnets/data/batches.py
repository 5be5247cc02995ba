"""Batches as indices: which examples each step sees. Gathering their arrays is somebody else's job.

Batch i is positions [i B, (i + 1) B) of one stream over the epochs (see `order`), so it follows
from i alone. Nothing is dropped at the end of an epoch; only a run's last batch can be short.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxnets import errors
from jaxnets.data import order

# Draws made ahead at a time: enough that NumPy's cost per call is spread thin over small batches,
# few enough that a block takes about a millisecond and stays in the cache.
_BLOCK_POSITIONS = 16384
_PARTNERS = 2**62  # added to a run's seed, which is smaller


@dataclasses.dataclass(frozen=True)
class Batches:
    """The draws of a run, by number: `batches[i]` for i in 0..len(batches) - 1.

    A value: equal fields mean equal draws, in any order of access and from any thread or process.

    Args:
        num_examples: N, how many examples there are, 1..2**31 - 1.
        batch_size: B, examples a step over all devices together.
        num_positions: how many examples are drawn in all, over all epochs.
        seed: of the order.
        shuffle: False draws the examples in their own order, again and again (evaluation:
            `num_positions=num_examples`).
        partners: whether each example gets another one to be mixed with, from a shuffled stream of
            its own.

    Raises:
        ConfigError: if a size isn't an integer, or is below 1.

    Example:
        >>> batches = Batches(num_examples=5, batch_size=4, num_positions=10, shuffle=False)
        >>> [batches[i]["index"].tolist() for i in range(len(batches))]
        [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 0]]
        >>> batches[2]["mask"].tolist()
        [True, True, False, False]
    """

    num_examples: int
    batch_size: int
    num_positions: int
    seed: int = 0
    shuffle: bool = True
    partners: bool = False

    def __post_init__(self) -> None:
        for name in ("num_examples", "batch_size", "num_positions"):
            value = _integer(name, getattr(self, name))
            if value < 1:
                raise errors.ConfigError(f"{name} is {value}; it must be at least 1")
        _integer("seed", self.seed)
        if self.num_examples > order.MAX_EXAMPLES:
            raise errors.ConfigError(f"num_examples is {self.num_examples}; at most 2**31 - 1")

    def __len__(self) -> int:
        return -(-self.num_positions // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """The i-th draw.

        Args:
            i: 0..len(self) - 1; counting from the end isn't offered.

        Returns:
            `index`, int32 `[B]`: the examples; `position`, uint32 `[B]`: where in the stream they
            stand, modulo 2**32; `mask`, bool `[B]`: False where the run's last batch is padded
            (there the index is 0 and the position runs on); with partners also `partner`, int32
            `[B]`: examples, over an epoch's positions each of them once. The arrays are read-only.

        Raises:
            IndexError: if i is out of range.
        """
        i = operator.index(i)
        num_batches = len(self)
        if not 0 <= i < num_batches:
            raise IndexError(f"batch {i} of {num_batches}")
        rows_per_block = max(1, _BLOCK_POSITIONS // self.batch_size)
        block, row = divmod(i, rows_per_block)
        index, position, full = _block(
            self.num_examples, self.batch_size, self.seed, self.shuffle, rows_per_block, block
        )
        draw = {"index": index[row], "position": position[row], "mask": full}
        if self.partners:
            draw["partner"] = _partners(
                self.num_examples, self.seed, i * self.batch_size, self.batch_size
            )
        num_real = self.num_positions - i * self.batch_size
        return draw if num_real >= self.batch_size else _pad(draw, num_real)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of every draw, for one of several processes; otherwise as `Batches`.

    Args:
        batches: the whole draws.
        rows: which of their rows, in order.

    Example:
        >>> part = Part(Batches(num_examples=5, batch_size=4, num_positions=8, shuffle=False), (2, 3))
        >>> part[0]["index"].tolist()
        [2, 3]
    """

    batches: Any  # Batches, or another order of them
    rows: tuple[int, ...]

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return self.batches.num_examples

    @property
    def partners(self) -> bool:
        """Whether each example gets another one to be mixed with."""
        return self.batches.partners

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """These rows of the i-th draw."""
        rows = list(self.rows)
        return {name: x[rows] for name, x in self.batches[i].items()}


def take(arrays: Mapping[str, np.ndarray], draw: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Gather the rows of a draw, for a loop that feeds from the host.

    Args:
        arrays: `[N, ...]` each.
        draw: what `Batches` gives: `index`, `position`, `mask`, `[B]` each.

    Returns:
        The arrays' rows, `[B, ...]` each, and the arrays of the draw; where it has partners, their
        rows and their index are `batch["partner"]`. Padded rows hold example 0: use the mask.

    Raises:
        ConfigError: if an array has the name of a part of the draw.

    Example:
        >>> draw = Batches(num_examples=3, batch_size=2, num_positions=3, shuffle=False)[1]
        >>> take({"label": np.array([7, 8, 9])}, draw)["label"].tolist()
        [9, 7]
    """
    if taken := sorted(arrays.keys() & draw.keys()):
        raise errors.ConfigError(f"arrays can't be called {', '.join(taken)}: the draw has these")

    def rows(index: np.ndarray) -> dict[str, Any]:
        return {name: np.take(array, index, axis=0) for name, array in arrays.items()}

    batch = rows(draw["index"]) | dict(draw)
    if "partner" in draw:
        batch["partner"] = rows(draw["partner"]) | {"index": draw["partner"]}
    return batch


# Cached by value, not in the object, so that `Batches` stays a plain value and threads can share
# it: at worst two of them compute the same block. Eight, so that training and evaluation, each
# read by threads on both sides of a block's edge, don't push one another out.
@functools.lru_cache(maxsize=8)
def _block(
    num_examples: int, batch_size: int, seed: int, shuffle: bool, num_rows: int, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Many draws at once: `index [R, B]`, `position [R, B]` and the mask `[B]` of a full one."""
    size = num_rows * batch_size
    position_RB = np.arange(block * size, (block + 1) * size).reshape(num_rows, batch_size)
    index_RB = order.index(seed, position_RB, num_examples) if shuffle else position_RB % num_examples
    made = index_RB.astype(np.int32), position_RB.astype(np.uint32), np.ones(batch_size, bool)
    for array in made:
        array.flags.writeable = False
    return made


def _partners(num_examples: int, seed: int, first: int, size: int) -> np.ndarray:
    """The examples at positions first, first + 1, ... of a second stream."""
    positions = np.arange(first, first + size)
    partner = order.index(int(seed) + _PARTNERS, positions, num_examples).astype(np.int32)
    partner.flags.writeable = False
    return partner


def _pad(draw: dict[str, np.ndarray], num_real: int) -> dict[str, np.ndarray]:
    mask = np.arange(draw["index"].size) < num_real
    index = np.where(mask, draw["index"], np.int32(0))
    index.flags.writeable = mask.flags.writeable = False
    return {**draw, "index": index, "mask": mask}


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise errors.ConfigError(f"{name} is {value!r}; it must be an integer")
    return int(value)
