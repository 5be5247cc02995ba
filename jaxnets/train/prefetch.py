"""Batches put on the devices while the steps before them run."""

import contextlib
import operator
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from jaxnets.typing import Indexed

_CHECK_S = 0.1


class Prefetch:
    """The same batches, already on the devices; `prefetch[i]` then `prefetch[i + 1]` is fast.

    A thread fetches and puts them. Another number than the next one starts anew from there. To be read
    by one thread; close it, or use it in a `with` statement.

    Args:
        batches: by number, on the host; closed with this, if they have `close()`.
        put: puts one on the devices, such as `Strategy.put_batch`.
        depth: how many lie ready on the devices beside the one in use. With 0 there is no thread, and
            a batch is fetched when it is asked for.

    Example:
        >>> with Prefetch([1, 2, 3], put=lambda batch: 10 * batch) as batches:
        ...     [batches[i] for i in range(len(batches))]
        [10, 20, 30]
    """

    def __init__(
        self, batches: Indexed, put: Callable[[Mapping[str, Any]], Any], *, depth: int = 2
    ) -> None:
        self._batches, self._put, self._depth = batches, put, depth
        self._next = -1
        self._ready: queue.Queue[Any] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> Any:
        """The i-th batch; raises what fetching it raised."""
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        if self._depth == 0:
            return self._put(self._batches[i])
        if self._thread is None or i != self._next:
            self._start(i)
        batch, error = self._ready.get()
        if error is not None:
            self._halt()
            raise error
        self._next = i + 1
        return batch

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop fetching, and close the batches."""
        self._stop.set()
        if close := getattr(self._batches, "close", None):
            close()  # first, as the thread may be waiting for them
        self._halt()

    def _start(self, first: int) -> None:
        self._halt()
        # One is in the thread's hands while the queue is full.
        self._ready, self._stop = queue.Queue(max(self._depth - 1, 1)), threading.Event()
        arguments = (self._batches, self._put, first, self._ready, self._stop)
        self._thread = threading.Thread(target=_fill, args=arguments, name="prefetch", daemon=True)
        weakref.finalize(self, self._stop.set)  # the thread doesn't hold this object
        self._thread.start()

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _fill(
    batches: Indexed,
    put: Callable[[Mapping[str, Any]], Any],
    first: int,
    ready: "queue.Queue[Any]",
    stop: threading.Event,
) -> None:
    item: Any = None
    for i in range(first, len(batches)):
        try:
            item = put(batches[i]), None
        except BaseException as error:
            item = None, error
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_CHECK_S)
                break
        if stop.is_set() or item[1] is not None:
            return
