"""Stopping when the machine is about to be taken away, or the user has had enough.

A handler of Python's runs only between two lines of Python, and the main thread may sit in a
compilation for minutes. So a thread reads the signals from a pipe, into which Python's C handler writes
them at once. It says that they came, and ends the process where the main thread can't.

With several processes all must stop after the same step. The notifier of JAX's coordinator sees to that:
whichever process is told, all come to the same point. It has a C handler of its own for SIGTERM, which
ours keeps and gives every signal to, Ctrl-C too.
"""

import ctypes
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jax.experimental import multihost_utils

from jaxnets.train import hosts
from jaxnets.train.loop import StepMetrics
from jaxnets.train.state import TrainState

GRACE_S = 25.0  # Kubernetes and Spot machines give 30 s by default
_SETTLE_S = 1.0  # for a loop that is about to come back by itself
_SAME_S = 0.5  # `timeout` and supervisors signal a process and its group: that is one signal
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal:
    """Stop after the step in which SIGTERM or SIGINT arrived; a second one ends the process at once.

    As a hook it comes last, and its `note` first. It may be asked elsewhere too whether to stop, as
    evaluation does before each batch; with several processes all must ask equally often.

    The process ends without coming back here, with the status 128 + n and the last checkpoint intact:

    - if a second signal arrives, half a second or more after the first;
    - if nothing is lost by it, since no step was taken since the last checkpoint, as in the first
      compilation (with one process);
    - if the loop doesn't come back within the grace time after SIGTERM.

    Args:
        grace_s: how long after SIGTERM the loop may take to come back, in seconds; 0 for no limit. It
            should be less than what the machine gives before it kills.
        saved: `saved()` is the step of the newest whole checkpoint, or None; asked from another thread,
            which it mustn't keep waiting. Without it nothing is taken for saved.

    Attributes:
        signal: the number of the signal that arrived, or None.
        saved: see the arguments; may be set later.
    """

    def __init__(
        self, *, grace_s: float = GRACE_S, saved: Callable[[], int | None] | None = None
    ) -> None:
        self.signal: int | None = None
        self.saved = saved
        self._grace_s = grace_s
        self._step: int | None = None  # the last one that was taken here
        self._is_back = threading.Event()
        self._is_due = False
        self._num_asked = 0

    def note(self, step: int, state: TrainState, metrics: StepMetrics) -> None:
        """A hook for the first place: from here on there is something to lose."""
        self._step = step

    def __call__(self, step: int, state: TrainState, metrics: StepMetrics) -> str | None:
        """The reason to stop, if a signal arrived."""
        self._step = step
        return signal.Signals(self.signal).name if self.is_due() and self.signal else None

    def is_due(self) -> bool:
        """Whether to stop here; with several processes the same for the n-th call on each of them."""
        if not self._is_due:
            self._num_asked += 1
            if hosts.count() == 1:
                self._is_due = self.signal is not None
            elif multihost_utils.reached_preemption_sync_point(self._num_asked):
                self._is_due, self.signal = True, signal.SIGTERM
        if self._is_due:
            self._is_back.set()
        return self._is_due

    @contextmanager
    def installed(self) -> Iterator["StopOnSignal"]:
        """Listen while this is open; from the main thread."""
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        native = _Native() if hosts.count() > 1 else None
        old = {number: signal.getsignal(number) for number in _SIGNALS}
        old_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        watcher = threading.Thread(
            target=self._watch, args=(read_fd, native), name="signals", daemon=True
        )
        watcher.start()
        try:
            yield self
        finally:
            for number in _SIGNALS:
                signal.signal(number, old[number])
            if native is not None:
                native.restore()
            signal.set_wakeup_fd(old_fd)
            os.write(write_fd, b"\0")
            watcher.join()
            os.close(write_fd)
            os.close(read_fd)

    def _handle(self, number: int, _: object) -> None:
        self.signal = self.signal or number  # the thread does the rest

    def _watch(self, read_fd: int, native: "_Native | None") -> None:
        first, arrived = 0, 0.0
        deadlines: dict[str, float] = {}
        while True:
            left = min(deadlines.values(), default=math.inf) - time.monotonic()
            ready, _, _ = select.select([read_fd], [], [], max(left, 0) if deadlines else None)
            if self._is_back.is_set():
                deadlines.clear()
            for number in os.read(read_fd, 64) if ready else ():
                now = time.monotonic()
                if number == 0:
                    return
                if number not in _SIGNALS:
                    continue
                if first and now - arrived >= _SAME_S:
                    self._end(number, "once more: stopped at once")
                elif not first:
                    first, arrived = number, now
                    self.signal = self.signal or number
                    _say(f"{_name(number)}: saving after this step; once more stops at once")
                    if native is not None:
                        native.notify()
                    else:
                        deadlines["settle"] = now + _SETTLE_S
                    if number == signal.SIGTERM and self._grace_s:
                        deadlines["grace"] = now + self._grace_s
            now = time.monotonic()
            over = [name for name, deadline in deadlines.items() if deadline <= now]
            for name in over:
                del deadlines[name]
            if "settle" in over and self.saved and self._step in (None, self._saved()):
                self._end(first, "nothing was trained that isn't saved: stopped at once")
            if "grace" in over:
                self._end(first, f"the step took more than {self._grace_s:g} s: stopped without a save")

    def _saved(self) -> int | None:
        with suppress(Exception):  # a folder that can't be read must not keep the process
            return self.saved() if self.saved else None
        return None

    def _end(self, number: int, why: str) -> None:
        step = self._saved()
        last = "there is no checkpoint" if step is None else f"the checkpoint of step {step} is whole"
        if self.saved is None:
            last = "the last checkpoint, if there is one, is whole"
        _say(f"{_name(number)}, {why}; {last}; the same command goes on")
        os._exit(128 + number)


class _Native:
    """What C has for handlers, so that one that Python didn't install can be called."""

    def __init__(self) -> None:
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._old = {number: self._swap(number) for number in _SIGNALS}

    def _swap(self, number: int, new: Any = None) -> Any:
        """Install what an earlier call gave, if anything; what was there before."""
        before = ctypes.create_string_buffer(1024)  # a struct sigaction is smaller everywhere
        if self._libc.sigaction(int(number), new, before):
            raise OSError(ctypes.get_errno(), "sigaction failed")
        return before

    def notify(self) -> None:
        """Let JAX's handler of SIGTERM run, once, in this thread."""
        ours = self._swap(signal.SIGTERM, self._old[signal.SIGTERM])
        try:
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # is delivered before it returns
        finally:
            self._swap(signal.SIGTERM, ours)

    def restore(self) -> None:
        """Put back what was there."""
        for number, action in self._old.items():
            self._swap(number, action)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _say(line: str) -> None:
    with suppress(OSError):  # nobody may be listening any more
        os.write(2, f"{line}\n".encode())
