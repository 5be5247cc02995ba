"""Batches of sequences of like length: little padding, and few shapes to compile a step for."""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxnets import errors
from jaxnets.data import order
from jaxnets.data.batches import Batches
from jaxnets.data.buckets import bucket_of

_SHUFFLE = 2**61  # added to a run's seed, which is smaller
_LONGEST_STRETCH = 64  # batches


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """How long the sequences of a data set are.

    Args:
        train: int `[N]` by the name of a sequence, such as {"tokens": ...}, at least 0.
        test: the same of M examples.
        buckets: the lengths that batches have; a sequence longer than the greatest is cut there.

    Raises:
        ConfigError: if there are no buckets, or one is below 1.
        DataError: if the lengths' own sizes or types don't fit together.
    """

    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    buckets: Sequence[int]

    def __post_init__(self) -> None:
        if not self.buckets or min(self.buckets) < 1:
            raise errors.ConfigError(f"buckets are lengths of at least 1, not {list(self.buckets)}")
        for part in (self.train, self.test):
            if sorted(part) != sorted(self.train) or not part:
                raise errors.DataError(f"lengths are of {sorted(part)} and of {sorted(self.train)}")
            for name, length in part.items():
                if length.dtype.kind not in "iu" or length.ndim != 1 or length.min(initial=0) < 0:
                    raise errors.DataError(f"lengths of {name} are counts [N], not {length.dtype}")
            if len({len(length) for length in part.values()}) != 1:
                raise errors.DataError("lengths of different numbers of examples")


@dataclasses.dataclass(frozen=True, eq=False)
class ByLength:
    """`Batches` whose rows are of like length.

    In each stretch of so many batches the rows are sorted by length, and the batches that come of it are
    shuffled. Batch i still follows from i alone. Stretches end with an epoch, so that each epoch sees
    all examples; a run that ends elsewhere takes a part of the last one. One that is not shuffled, as
    evaluation, has a single stretch of all batches.

    Args:
        batches: the draws.
        lengths: int `[N]` by the name of a sequence; the longest one of an example decides.
        buckets: the lengths that batches have.
        stretch: how many batches; by default a sixteenth of an epoch, from 1 to 64.

    Example:
        >>> batches = Batches(num_examples=4, batch_size=2, num_positions=4, shuffle=False)
        >>> draws = ByLength(batches, {"tokens": np.array([3, 9, 1, 8])}, buckets=(4, 8))
        >>> [draws[i]["index"].tolist() for i in (0, 1)], [draws[i]["tokens_mask"].shape for i in (0, 1)]
        ([[2, 0], [3, 1]], [(2, 4), (2, 8)])
        >>> draws[0]["tokens_mask"].tolist()
        [[True, False, False, False], [True, True, True, False]]
    """

    batches: Batches
    lengths: Mapping[str, np.ndarray]
    buckets: Sequence[int]
    stretch: int | None = None

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return self.batches.num_examples

    @property
    def batch_size(self) -> int:
        """B."""
        return self.batches.batch_size

    @property
    def num_positions(self) -> int:
        """How many examples are drawn in all."""
        return self.batches.num_positions

    @property
    def partners(self) -> bool:
        """Never: an example's partner would have another length."""
        return False

    def __post_init__(self) -> None:
        if self.batches.partners:
            raise errors.ConfigError("sequences can't be mixed with partners of another length")
        for name, length in self.lengths.items():
            if len(length) != self.num_examples:
                raise errors.ConfigError(
                    f"{len(length)} lengths of {name} for {self.num_examples} examples"
                )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """The i-th draw: as of `Batches`, and for each sequence `NAME_mask`, bool `[B, L]`.

        It is true where the example has a token, and L is the bucket that holds all of them.

        Raises:
            IndexError: if i is out of range.
        """
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        first, end = self._stretch_of(i)
        draws = _stretch(self.batches, _Once(self._longest), first, end)
        draw = {name: x[i - first] for name, x in draws.items()}
        num_real = self.num_positions - i * self.batch_size
        if num_real < self.batch_size:
            draw["mask"] = draw["mask"] & (np.arange(self.batch_size) < num_real)
        rows = draw["index"]
        sizes = {name: np.where(draw["mask"], x[rows], 0) for name, x in self.lengths.items()}
        longest = min(max(int(size.max()) for size in sizes.values()), max(self.buckets))
        (width,) = bucket_of(max(longest, 1), self.buckets)
        places = np.arange(width)
        masks = {f"{name}_mask": places < size[:, None] for name, size in sizes.items()}
        return draw | masks

    def _stretch_of(self, i: int) -> tuple[int, int]:
        """The first batch of the stretch that a batch is in, and the one behind it.

        Stretches end with an epoch, so that each is a pass over all examples; a batch with some of two
        epochs is a stretch by itself.
        """
        if not self.batches.shuffle:
            return 0, len(self)
        epoch = i * self.batch_size // self.num_examples
        first = -(-epoch * self.num_examples // self.batch_size)
        end = (epoch + 1) * self.num_examples // self.batch_size  # of those within the epoch
        if i >= end:
            return i, i + 1
        first += (i - first) // self._stretch * self._stretch
        return first, min(first + self._stretch, end)

    @functools.cached_property
    def _stretch(self) -> int:
        if self.stretch is not None:
            return max(1, self.stretch)
        return min(max(1, self.num_examples // (16 * self.batch_size)), _LONGEST_STRETCH)

    @functools.cached_property
    def _longest(self) -> np.ndarray:
        return np.max(np.stack(list(self.lengths.values())), axis=0)


class _Once:
    """An array by its identity, for a cache."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __hash__(self) -> int:
        return id(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once) and self.array is other.array


@functools.lru_cache(maxsize=8)
def _stretch(batches: Batches, longest: _Once, first: int, end: int) -> dict[str, np.ndarray]:
    """The draws of a stretch, `[R, B]` each."""
    count, size = batches.batch_size, end - first
    # Whole also where the run ends within it, or a longer run's first steps would be others.
    whole = dataclasses.replace(batches, num_positions=end * count) if batches.shuffle else batches
    draws = [whole[first + k] for k in range(size)]
    flat = {name: np.concatenate([draw[name] for draw in draws]) for name in draws[0]}
    # What only fills up stays at the end, and of a batch of two epochs the next one's.
    by_length = np.zeros_like(flat["index"]) if size == 1 else longest.array[flat["index"]]
    sorted_ = np.lexsort((by_length, ~flat["mask"]))
    made = {name: x[sorted_].reshape(size, count) for name, x in flat.items()}
    if batches.shuffle:
        places = order.index(int(batches.seed) + _SHUFFLE + first, np.arange(size), size)
        made = {name: x[places] for name, x in made.items()}
    for x in made.values():
        x.flags.writeable = False
    return made
