"""Batches of a source that is too big for the device: read ahead, in worker processes if asked to."""

import contextlib
import fcntl
import json
import operator
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxnets import errors, registry
from jaxnets.data import worker
from jaxnets.data.batches import Batches, Part
from jaxnets.data.by_length import ByLength
from jaxnets.data.sources import Source

_MAX_THREADS = 4
_PIPE_BYTES = 1 << 20
# Like multiprocessing's spawn, but nothing of the parent's program is imported.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxnets.data import worker; "
    "worker.main(int(sys.argv[2]), int(sys.argv[3]))"
)


class Stream:
    """The batches of a run by number, as `take(arrays, batches[i])` would give them.

    `stream[i]` is the same whatever was read before and however many workers there are. After
    `stream[i]`, `stream[i + 1]` is fast; any other number starts reading anew from there. May be used
    from any thread. Close it, or use it in a `with` statement: that ends the workers. They end with
    this process in any case, however it ends.

    Args:
        source: the examples.
        batches: which of them each batch holds.
        num_workers: processes that read; worker k of W reads every W-th batch. With 0, threads of this
            process do.
        prefetch: how many batches are read ahead, over all workers; each has at least one. With 0 and
            no workers a batch is read when it is asked for.
        max_unreadable: leave out so many examples that can't be read: they keep their places in the
            batches, where `mask` is False and the arrays hold another example. With 0 such an example
            is an error.
        on_unreadable: `on_unreadable(i, {example: why})` is called before the i-th batch is given away,
            if any of its examples can't be read. What it raises is raised in place of the batch.

    Raises:
        ConfigError: if a number is negative, or the batches are of another number of examples.

    Example:
        >>> from jaxnets.data import Arrays
        >>> source = Arrays({"label": np.array([7, 8, 9])})
        >>> batches = Batches(num_examples=3, batch_size=2, num_positions=3, shuffle=False)
        >>> with Stream(source, batches, prefetch=0) as stream:
        ...     stream[1]["label"].tolist(), stream[1]["mask"].tolist()
        ([9, 7], [True, False])
    """

    def __init__(
        self,
        source: Source,
        batches: Batches | ByLength | Part,
        *,
        num_workers: int = 0,
        prefetch: int = 2,
        max_unreadable: int = 0,
        on_unreadable: Callable[[int, Mapping[int, str]], None] = lambda i, found: None,
    ):
        numbers = {
            "num_workers": num_workers,
            "prefetch": prefetch,
            "max_unreadable": max_unreadable,
        }
        for name, value in numbers.items():
            if value < 0:
                raise errors.ConfigError(f"{name} is {value}; it must be at least 0")
        if len(source) != batches.num_examples:
            raise errors.ConfigError(
                f"the batches are of {batches.num_examples} examples, the source has {len(source)}"
            )
        if batches.partners:
            raise errors.ConfigError("a stream reads no partners to mix with: keep the data in memory")
        self.source, self.batches = source, batches
        self.num_workers, self.prefetch = num_workers, prefetch
        self.max_unreadable, self._on_unreadable = max_unreadable, on_unreadable
        self._lock = threading.Lock()
        self._reader: _Threads | _Processes | None = None
        self._next = -1
        self._is_closed = False

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """The i-th batch: the source's rows, `[B, ...]` each, and `index`, `position`, `mask`.

        Raises:
            IndexError: if i is out of range.
            DataError: if an example can't be read, or a worker was killed.
        """
        i = operator.index(i)
        draw = self.batches[i]
        with self._lock:
            if self._is_closed:
                raise errors.DataError("this stream of batches is closed")
            try:
                if self._reader is None or i != self._next:
                    self._restart(i)
                assert self._reader is not None
                rows = self._reader.read(i)
            except BaseException:
                self._stop()
                raise
            self._next = i + 1
        if taken := sorted(rows.arrays.keys() & draw.keys()):
            raise errors.ConfigError(f"arrays can't be called {', '.join(taken)}: the draw has these")
        if rows.unreadable:
            self._on_unreadable(i, rows.unreadable)
            is_left_out = np.isin(draw["index"], list(rows.unreadable))
            draw = {**draw, "mask": draw["mask"] & ~is_left_out}
        return dict(rows.arrays) | draw

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """The workers' process numbers; none before the first batch was asked for."""
        return [each.pid for each in self._reader.processes] if self._reader else []

    def close(self) -> None:
        """End the workers; a thread that waits for a batch gets a DataError."""
        self._is_closed = True
        reader = self._reader
        if reader is not None:
            reader.kill()  # before the lock: who holds it may be waiting for a worker
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _restart(self, first: int) -> None:
        self._stop()
        ahead = -(-self.prefetch // max(self.num_workers, 1))
        threads = min(ahead, _MAX_THREADS)
        job = worker.Job(self.source, self.batches, first, 1, threads, ahead, self.max_unreadable)
        self._reader = _Processes(job, self.num_workers) if self.num_workers else _Threads(job)


class _Threads:
    """Reads in this process."""

    processes: Sequence[subprocess.Popen] = ()

    def __init__(self, job: worker.Job):
        self._rows = worker.read_ahead(job)

    def read(self, i: int) -> worker.Rows:
        try:
            return next(self._rows)
        except errors.UserError:
            raise
        except Exception as error:
            raise errors.DataError(worker.describe(error)) from error

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self._rows.close()  # pyright: ignore[reportAttributeAccessIssue]


class _Processes:
    """Reads in worker processes."""

    def __init__(self, job: worker.Job, num_workers: int):
        self._first = job.first
        job = job._replace(step=num_workers, ahead=max(1, job.ahead))
        content = _dumps(job)  # before any process is started, as it may fail
        self.processes: list[subprocess.Popen] = []
        self._pipes: list[BinaryIO] = []
        # Also when nobody closes the stream: at its collection, or at the interpreter's end.
        self.close = weakref.finalize(self, _end, os.getpid(), self.processes, self._pipes)
        for _ in range(num_workers):
            self._start()
        for k, process in enumerate(self.processes):
            assert process.stdin is not None
            if k:  # one at a time: a source may hold much
                content = _dumps(job._replace(first=job.first + k))
            with contextlib.suppress(BrokenPipeError):  # it died: reading from it says so
                process.stdin.write(worker.frame(content))
                process.stdin.flush()  # and stays open: its end ends the worker

    def read(self, i: int) -> worker.Rows:
        for k, process in enumerate(self.processes):
            if process.poll():  # those that are done return 0
                raise self._death(k, i)
        k = (i - self._first) % len(self.processes)
        try:
            return worker.receive_rows(self._pipes[k])
        except EOFError:
            raise self._death(k, i) from None

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def _start(self) -> None:
        read_fd, write_fd = os.pipe()
        self._pipes.append(os.fdopen(read_fd, "rb", buffering=0))
        try:
            if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux; fewer, larger reads
                with contextlib.suppress(OSError):
                    fcntl.fcntl(read_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            words = [json.dumps(sys.path), str(write_fd), str(os.getpid())]
            # Signals to the terminal's or the job's group are for the parent, which may want to finish
            # its step with the batches that it still needs: a worker has a session of its own, and what
            # arrives before it has is blocked, until the worker drops it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, worker.GROUP_SIGNALS)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, *words],
                    stdin=subprocess.PIPE,
                    stdout=2,  # what a source prints goes beside the result, not into it
                    pass_fds=[write_fd],
                    start_new_session=True,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        finally:
            os.close(write_fd)
        self.processes.append(process)

    def _death(self, k: int, i: int) -> errors.DataError:
        process = self.processes[k]
        try:
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"
        return errors.DataError(
            f"data worker {k + 1} of {len(self.processes)} (process {process.pid}) {how} before batch "
            f"{i}; the same command goes on from the last checkpoint. If memory ran out, use fewer "
            "--num-workers or less --prefetch"
        )


def _dumps(job: worker.Job) -> bytes:
    import cloudpickle  # which, unlike pickle, sends a source that the user's own script defines

    # No worker could import what a user's file was loaded as.
    for module in registry.file_modules():
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(job)
    except Exception as error:
        raise errors.DataError(
            f"the source can't be sent to a worker ({error}): use num_workers=0, or open files lazily"
        ) from error


def _end(owner: int, processes: Sequence[subprocess.Popen], pipes: Sequence[Any]) -> None:
    if os.getpid() != owner:  # a fork of this process ends: the workers aren't its own
        return
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    for pipe in pipes:
        pipe.close()
