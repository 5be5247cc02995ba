"""Ending a run that no longer gets on, with the stacks of what it hangs in, instead of waiting for ever.

A thread looks at how long the loop has been where it is. It needs the interpreter, but not the main
thread, which may hang in a collective whose other side is gone. Should something keep the interpreter
itself, a thread of C's prints the stacks.
"""

import faulthandler
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, ParamSpec, TypeVar

from jaxnets import errors
from jaxnets.train import hosts

EXIT = 70
"""The status of a process that the watchdog has ended: "internal software error" of sysexits.h."""
LIMIT_S = 600.0
LIMITED = ("data", "step", "evaluate")
"""The sections that have a limit unless told otherwise; "evaluate" is each batch but the first."""
_POLL_S = 1.0
_SETTLE_S = 5.0  # another process's error is often ours too, and then we say it ourselves
_KEY = "jaxnets/watchdog"
_is_ending = threading.Event()
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Watchdog:
    """Ends the process, and with it the run, if a section takes longer than its limit.

    The loop says where it is by `beat`; time counts from the last beat. Waiting for data, steps and the
    batches of an evaluation is limited, compilation and saving aren't unless a limit is given for them.
    A process that was stopped as a whole, as by Ctrl-Z, begins its section anew.

    With several processes the one whose time is up tells the others, so that each prints its own stacks;
    it tells them too when it leaves by an exception. All then end with the status `EXIT`.

    Args:
        limit_s: for each of the sections in `LIMITED`, in seconds; 0 switches everything off.
        limits: for other sections, or other limits, by section; 0 for none.
        poll_s: how often to look.

    Example:
        >>> with Watchdog(600) as watchdog:
        ...     for i in range(3):
        ...         watchdog.beat("step")
    """

    def __init__(
        self,
        limit_s: float = LIMIT_S,
        *,
        limits: Mapping[str, float] | None = None,
        poll_s: float = _POLL_S,
    ) -> None:
        if limit_s < 0 or any(limit < 0 for limit in (limits or {}).values()):
            raise errors.ConfigError("the watchdog's limits are seconds, at least 0")
        self._limit_s, self._poll_s = limit_s, poll_s
        self._limits = {**dict.fromkeys(LIMITED, limit_s), **(limits or {})}
        self._now = ("start", time.monotonic())
        self._awake = 0.0  # when the thread last found that it had slept
        self._is_over = threading.Event()

    def beat(self, section: str) -> None:
        """Say what begins here."""
        self._now = (section, time.monotonic())

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Be in a section; afterwards the one before it begins anew."""
        before, _ = self._now
        self.beat(name)
        try:
            yield
        finally:
            self.beat(before)

    def around(self, section: str, call: Callable[_P, _R]) -> Callable[_P, _R]:
        """The same call, such as a hook, in a section."""

        @functools.wraps(call, updated=())
        def within(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with self.section(section):
                return call(*args, **kwargs)

        return within

    def __enter__(self) -> "Watchdog":
        if self._limit_s:
            self._start(self._check, "watchdog")
            if hosts.count() > 1:
                self._start(self._listen, "watchdog of the others")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._is_over.set()
        if not self._limit_s:
            return
        faulthandler.cancel_dump_traceback_later()
        if error is not None and hosts.count() > 1:
            _tell(f"{_who()} ended by {errors.named_line(error)}", is_hung=False)

    def _start(self, target: Callable[[], None], name: str) -> None:
        threading.Thread(target=target, name=name, daemon=True).start()

    def _check(self) -> None:
        looked = time.monotonic()
        while True:
            # Only a run of several processes is ended by it: it can't tell a hang from Ctrl-Z.
            faulthandler.dump_traceback_later(
                max(self._limit_s, 3 * self._poll_s), exit=hosts.count() > 1, file=2
            )
            if self._is_over.wait(self._poll_s):
                faulthandler.cancel_dump_traceback_later()
                return
            now = time.monotonic()
            if now - looked > self._poll_s + max(_POLL_S, self._limit_s / 10):
                self._awake = now
            looked = now
            section, since = self._now
            limit, seconds = self._limits.get(section, 0.0), now - max(since, self._awake)
            if limit and seconds > limit:
                why = f"{_who()} has been in {section!r} for {seconds:.0f} s; the limit is {limit:g} s"
                self._end(why, is_first_to_know=True)

    def _listen(self) -> None:
        while not self._is_over.wait(self._poll_s):
            heard = _heard()
            if heard is None or heard["process"] == hosts.index():
                continue
            if not heard["is_hung"] and self._is_over.wait(_SETTLE_S):
                return
            self._end(heard["why"], is_first_to_know=False)

    def _end(self, why: str, *, is_first_to_know: bool) -> None:
        _is_ending.set()
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            here = "" if is_first_to_know else f" Here, in {_who()}, it was {self._now[0]!r}."
            os.write(2, f"watchdog: {why}.{here} The stacks of all threads:\n".encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
            os.write(2, b"watchdog: ended; the same command goes on from the last checkpoint\n")
        if hosts.count() > 1:
            if is_first_to_know:
                # In a thread, as the coordinator may be what hangs. Then wait until the others have
                # heard it, or they would see a broken connection first.
                threading.Thread(target=_tell, args=(why,), daemon=True).start()
                time.sleep(3 * self._poll_s)
            if hosts.is_first():  # who is left without the coordinator, JAX aborts
                time.sleep(4 * self._poll_s)
        os._exit(EXIT)


def _who() -> str:
    return f"process {hosts.index()} of {hosts.count()}" if hosts.count() > 1 else "this process"


def _tell(why: str, *, is_hung: bool = True) -> None:
    message = {"process": hosts.index(), "why": why, "is_hung": is_hung}
    with suppress(Exception):  # somebody else was first, or there is no coordinator any more
        hosts.client().key_value_set(_KEY, json.dumps(message))


def _heard() -> dict[str, Any] | None:
    with suppress(Exception):  # there is nothing, or no coordinator any more
        return json.loads(hosts.client().key_value_try_get(_KEY))
    return None


def leave(status: int) -> NoReturn:
    """End this one of several processes, after an error, without waiting for the others.

    At the interpreter's end JAX would wait for them until they are taken for dead, and then abort.
    """
    if _is_ending.is_set():  # of which the error is a consequence
        time.sleep(60)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    if hosts.is_first():  # the coordinator is here: the others shall hear first why it ends
        time.sleep(3 * _POLL_S)
    os._exit(status)
