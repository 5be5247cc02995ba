"""Sources: random access to examples that needn't be in memory, read one by one by their number.

A source is whatever has `len(source)` and `source[i] -> {name: array}`; it never shuffles, since the
order is somebody else's job (see `order`). It is sent to worker processes by pickling: open files
lazily, on first use in a process. `source[i]` is called from several threads at once.
"""

import contextlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxnets import errors


class Source(Protocol):
    """Examples by number. `take(index) -> {name: [B, ...]}` beside these reads a batch at once."""

    def __len__(self) -> int:
        """N, how many examples there are."""
        ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]:
        """The i-th example, `{name: [...]}`: numbers only, shapes and dtypes alike for all examples."""
        ...


@runtime_checkable
class _Takes(Protocol):
    def take(self, index: np.ndarray, /) -> Mapping[str, np.ndarray]: ...


class Arrays:
    """Arrays in memory as a source, so that one set can go either way.

    Each worker process gets a copy of its own.

    Args:
        arrays: `{name: [N, ...]}`.

    Raises:
        ConfigError: if there are none, or their lengths differ.

    Example:
        >>> Arrays({"label": np.array([7, 8, 9])})[1]["label"].item()
        8
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = dict(arrays)
        lengths = {len(array) for array in self._arrays.values()}
        if len(lengths) != 1:
            raise errors.ConfigError(f"a source's arrays have lengths {sorted(lengths)}; expected one")

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: array[i] for name, array in self._arrays.items()}

    def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of `index [B]`, `[B, ...]` each."""
        return {name: np.take(array, index, axis=0) for name, array in self._arrays.items()}


class ArrayRecords:
    """The records of ArrayRecord files, one after another.

    Args:
        paths: of the files, in the order that numbers the examples.
        decode: `decode(record) -> {name: array}`; what `write_array_records` wrote by default.

    Raises:
        DataError: if there are no files or no records, or a file can't be read.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        *,
        decode: "Callable[[bytes], Mapping[str, Any]] | None" = None,
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._paths = [str(path) for path in paths]
        self._decode = decode or decode_example
        if not self._paths:
            raise errors.DataError("no ArrayRecord files were given")
        for path in self._paths:
            if not Path(path).is_file():
                raise errors.DataError(f"{path}: there is no such file")
        # Named one by one: what the library says of several leaves out which.
        ends = [0]
        for path in self._paths:
            try:
                ends.append(ends[-1] + len(ArrayRecordDataSource(path)))
            except Exception as error:
                reason = errors.first_line(error)
                raise errors.DataError(f"{path}: not an ArrayRecord file ({reason})") from error
        self._ends = ends
        self._files = ArrayRecordDataSource(self._paths)
        if not ends[-1]:
            raise errors.DataError(f"{', '.join(self._paths)}: no records")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        try:
            return self._decode(self._files[i])
        except Exception as error:
            file = int(np.searchsorted(self._ends, i, side="right")) - 1
            what = f"{self._paths[file]}: record {i - self._ends[file]} can't be read"
            raise errors.DataError(f"{what} ({type(error).__name__}: {error})") from error


def write_array_records(path: str | Path, examples: Iterable[Mapping[str, Any]]) -> int:
    """Write an ArrayRecord file that `ArrayRecords` reads.

    Args:
        path: of the file; what is there is replaced once all examples are written.
        examples: `{name: array}` each.

    Returns:
        how many records were written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # Groups of one, since examples are read one by one and out of order.
    temporary, count = Path(f"{path}.tmp"), 0
    try:
        with contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1")) as writer:
            for example in examples:
                writer.write(encode_example(example))
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there only after an error
    return count


def encode_example(example: Mapping[str, Any]) -> bytes:
    """Named arrays as bytes: the length of a JSON header, the header, then the arrays' bytes.

    Example:
        >>> decode_example(encode_example({"label": np.int32(3)}))["label"].item()
        3
    """
    arrays = {name: np.asarray(value) for name, value in example.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biufc":
            raise errors.DataError(f"{name} is {array.dtype}; an example holds numbers only")
    header = json.dumps(
        {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    ).encode()
    parts = [struct.pack("<I", len(header)), header, *(array.tobytes() for array in arrays.values())]
    return b"".join(parts)


def decode_example(record: bytes) -> dict[str, np.ndarray]:
    """What `encode_example` was given.

    Raises:
        ValueError: if these aren't such bytes.
    """
    (size,) = struct.unpack_from("<I", record)
    example, start = {}, 4 + size
    for name, (kind, shape) in json.loads(record[4:start]).items():
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(record, np.dtype(kind), count, start)
        example[name] = array.reshape(shape)
        start += array.nbytes
    if start != len(record):
        raise ValueError(f"{len(record)} bytes, expected {start}")
    return example


def read_rows(source: Source, index: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Read the examples of a batch and stack them.

    Args:
        source: the examples.
        index: `[B]`.

    Returns:
        `{name: [B, ...]}`.

    Raises:
        DataError: if names, shapes or dtypes differ between examples, or one isn't of numbers.
    """
    if isinstance(source, _Takes):
        return dict(source.take(np.asarray(index)))
    # A padded row repeats example 0: read it once.
    return _stack([int(i) for i in index], {i: source[i] for i in dict.fromkeys(map(int, index))})


def read_rows_leaving_out(
    source: Source, index: Sequence[int] | np.ndarray, max_unreadable: int
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """The same of a source of which some examples can't be read.

    Args:
        source: the examples.
        index: `[B]`.
        max_unreadable: how many such there may be.

    Returns:
        `{name: [B, ...]}`, and why which examples couldn't be read. In their place is the next one that
        can be: what it holds follows from the source alone, and is to be masked.

    Raises:
        DataError: as above, or if more examples in a row than that can't be read.
    """
    numbers = [int(i) for i in index]
    if isinstance(source, _Takes):
        try:
            return read_rows(source, index), {}
        except Exception:  # of which example isn't known
            pass
    read: dict[int, Mapping[str, Any]] = {}
    unreadable: dict[int, str] = {}
    for i in dict.fromkeys(numbers):
        read[i], why = read_example(source, i, max_unreadable)
        if why is not None:
            unreadable[i] = why
    return _stack(numbers, read), unreadable


def read_example(
    source: Source, i: int, max_unreadable: int = 0
) -> tuple[Mapping[str, Any], str | None]:
    """The i-th example and None, or the next one that can be read and why the i-th can't.

    Args:
        source: the examples.
        i: which.
        max_unreadable: with 0 what reading the example raises is raised.

    Raises:
        DataError: if more examples in a row than that can't be read.
    """
    why = None
    for k in range(max_unreadable + 1):
        try:
            return source[(i + k) % len(source)], why
        except MemoryError:
            raise
        except Exception as error:
            if not max_unreadable:
                raise
            say = errors.first_line if isinstance(error, errors.UserError) else errors.named_line
            why = why or say(error)
    raise errors.DataError(
        f"{max_unreadable + 1} examples in a row can't be read, more than the {max_unreadable} that may "
        f"be left out; the first, example {i}: {why}"
    )


def _stack(numbers: Sequence[int], found: Mapping[int, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    read = {i: {name: np.asarray(x) for name, x in row.items()} for i, row in found.items()}
    first = _spec(read[numbers[0]])
    for i, example in read.items():
        if _spec(example) != first:
            raise errors.DataError(
                f"example {i} is {_show(_spec(example))} and example {numbers[0]} {_show(first)}; the "
                "examples of a source must be alike"
            )
    if not_numbers := [name for name, (kind, _) in first.items() if kind.kind not in "biufcV"]:
        raise errors.DataError(f"{', '.join(not_numbers)} of example {numbers[0]} is not of numbers")
    return {name: np.stack([read[i][name] for i in numbers]) for name in first}


def _spec(example: Mapping[str, np.ndarray]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (array.dtype, array.shape) for name, array in example.items()}


def _show(spec: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {kind} {shape}" for name, (kind, shape) in spec.items())
