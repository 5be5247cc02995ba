"""Reading ahead with Grain, in this process or in workers of which this is the program.

A worker is a fresh Python process that imports neither JAX nor the user's program, so it starts in
about a second, takes some 60 MB beside its batches and needs no `if __name__ == "__main__"`. It gets
its job by its standard input, sends batches through a pipe, and ends when its standard input does: the
system closes that whenever and however the parent ends. (Grain's own workers import JAX and the main
module, and were seen to live on for hours after a parent that died of SIGTERM or SIGKILL.)

Messages in the pipe: the length of a pickled header, the header, then the arrays' bytes.
"""

import contextlib
import logging
import os
import pickle
import select
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxnets import errors
from jaxnets.data.batches import Batches, Part
from jaxnets.data.by_length import ByLength
from jaxnets.data.sources import Source, read_rows, read_rows_leaving_out

GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal or a supervisor sends to a whole group, blocked while a worker starts."""
_LENGTH = struct.Struct("<Q")
_CHECK_S = 1.0


class Job(NamedTuple):
    """What a worker reads: batches first, first + step, first + 2 step, ... to the end."""

    source: Source
    batches: Batches | ByLength | Part
    first: int
    step: int
    num_threads: int
    ahead: int  # batches
    max_unreadable: int = 0


class Rows(NamedTuple):
    """What was read of a batch: `{name: [B, ...]}`, and why which examples couldn't be."""

    arrays: Mapping[str, np.ndarray]
    unreadable: Mapping[int, str]


class _Rows:
    """The batches of a job by number, for Grain to index."""

    def __init__(self, job: Job):
        self._job = job

    def __len__(self) -> int:
        return len(range(self._job.first, len(self._job.batches), self._job.step))

    def __getitem__(self, k: int) -> Rows:
        job = self._job
        index = job.batches[job.first + int(k) * job.step]["index"]
        if not job.max_unreadable:
            return Rows(read_rows(job.source, index), {})
        return Rows(*read_rows_leaving_out(job.source, index, job.max_unreadable))


def read_ahead(job: Job) -> Iterator[Rows]:
    """The rows of a job's batches in order, read by Grain's threads ahead of their use."""
    grain = _import_grain()
    options = grain.ReadOptions(
        num_threads=job.num_threads if job.ahead else 0, prefetch_buffer_size=job.ahead
    )
    reader = iter(grain.MapDataset.source(_Rows(job)).to_iter_dataset(options))
    try:
        yield from reader
    finally:
        reader.close()


def main(write_fd: int, parent: int) -> None:
    """The program of a worker.

    Args:
        write_fd: the pipe to write batches to.
        parent: the process that this one must not outlive.
    """
    for number in GROUP_SIGNALS:  # ignoring one drops what has arrived of it
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    with os.fdopen(write_fd, "wb", buffering=0) as pipe:
        try:
            job_bytes = bytearray(_LENGTH.unpack(_read(sys.stdin.buffer, _LENGTH.size))[0])
            read_into(sys.stdin.buffer, memoryview(job_bytes))
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
            _import_grain(without_jax=True)
            job = pickle.loads(job_bytes)
            del job_bytes
            for rows in read_ahead(job):
                send_rows(pipe, rows)
        except (EOFError, BrokenPipeError):  # nobody listens any more
            pass
        except BaseException as error:
            _send_error(pipe, error)
    os._exit(0)  # at once: Grain's threads may be in the middle of batches that nobody wants


def send_rows(pipe: BinaryIO, rows: Rows) -> None:
    """Write a batch; the other end is `receive_rows`."""
    arrays = {name: np.ascontiguousarray(array) for name, array in rows.arrays.items()}
    spec = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    _send(pipe, (spec, rows.unreadable))
    for array in arrays.values():
        if array.size:
            _write(pipe, array.reshape(-1).view(np.uint8).data)


def receive_rows(pipe: BinaryIO) -> Rows:
    """Read a batch.

    Raises:
        EOFError: if the pipe ends before or in it.
        DataError: if the worker met an error.
    """
    header = pickle.loads(_read(pipe, _LENGTH.unpack(_read(pipe, _LENGTH.size))[0]))
    if isinstance(header, str):
        message, _, notes = header.partition("\n")
        error = errors.DataError(message)
        if notes:
            error.add_note(notes)
        raise error
    spec, unreadable = header
    arrays = {name: np.empty(shape, kind) for name, (kind, shape) in spec.items()}
    for array in arrays.values():
        if array.size:
            read_into(pipe, array.reshape(-1).view(np.uint8).data)
    return Rows(arrays, unreadable)


def read_into(pipe: BinaryIO, view: memoryview) -> None:
    """Fill a buffer, or raise EOFError."""
    done = 0
    while done < len(view):
        count = pipe.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise EOFError
        done += count


def frame(content: bytes) -> bytes:
    """Content with its length before it."""
    return _LENGTH.pack(len(content)) + content


def describe(error: BaseException) -> str:
    """One line about an error that a source's own code raised."""
    return f"reading the data failed with {type(error).__name__}: {error}".splitlines()[0]


def _send(pipe: BinaryIO, header: Any) -> None:
    _write(pipe, memoryview(frame(pickle.dumps(header))))


def _send_error(pipe: BinaryIO, error: BaseException) -> None:
    message = str(error)
    if not isinstance(error, errors.UserError):
        message = f"{describe(error)}\nin a data worker:\n{''.join(traceback.format_exception(error))}"
    with contextlib.suppress(BrokenPipeError):
        _send(pipe, message)


def _read(pipe: BinaryIO, size: int) -> bytearray:
    content = bytearray(size)
    read_into(pipe, memoryview(content))
    return content


def _write(pipe: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[pipe.write(view) :]


def _end_with(parent: int) -> None:
    """End this process when the parent has ended.

    Its end of our standard input closes then. Should a child that it forked hold that open, its death
    still shows in whose child we are.
    """
    while os.getppid() == parent:
        if select.select([0], [], [], _CHECK_S)[0] and not os.read(0, 1):
            break
    os._exit(0)


def _import_grain(*, without_jax: bool = False) -> Any:
    """Import Grain, which does without JAX and Orbax if it doesn't find them."""
    blocked = [name for name in ("jax", "orbax") if without_jax and name not in sys.modules]
    logger = logging.getLogger("absl")
    level = logger.level
    try:
        if without_jax:
            logger.setLevel(logging.ERROR)  # it warns that there is no profiler
        sys.modules.update(dict.fromkeys(blocked))  # pyright: ignore[reportArgumentType, reportCallIssue]
        import grain
    finally:
        for name in blocked:
            del sys.modules[name]
        logger.setLevel(level)
    return grain
