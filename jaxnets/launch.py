"""Several processes of a run on one machine: they stand in for hosts."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from jaxnets import errors

SETTLE_S = 15.0
"""How long the others may go on after one has failed; they may have stacks to print."""
EXAMPLE = "launch --num-processes 2 -- python -m experiments.digits train"
_SAVE_S = 120.0  # the same after one that was told to stop: they may be saving
_KILL_S = 10.0  # from SIGTERM to SIGKILL
_POLL_S = 0.05
_TOLD = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WATCHDOG = 70  # `train.watchdog.EXIT`, without importing JAX for it
# What Gloo and absl say of a connection that was made, each time one is, and of the signal that told a
# process to stop; other warnings and errors stay.
_NOISE = re.compile(
    rb"\[Gloo\] Rank \d+ is connected to |(I|W(?=.* preemption_notifier\.cc:))\d{4} \d\d:\d\d:\d\d\.\d+ "
)
# Becomes the command, after asking Linux to kill it when the launcher has ended in whatever way.
_CHILD = """
import ctypes, os, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() == parent:
    os.execvp(command[0], command)
"""


@dataclasses.dataclass(frozen=True)
class _End:
    """How a process ended that didn't end well."""

    process: int
    returncode: int  # as `Popen` has it

    @property
    def code(self) -> int:
        """The status, 128 + n after signal n."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    @property
    def is_told(self) -> bool:
        """Whether it was told to stop, and did so by itself."""
        return self.returncode in _TOLD

    @property
    def is_accident(self) -> bool:
        """Whether the same command may well go on: a signal that nobody sent to stop it, or a hang."""
        number = self.code - 128
        return self.code == _WATCHDOG or (number > 0 and number not in _SIGNALS)

    def __str__(self) -> str:
        if self.returncode > 0:
            return f"process {self.process} ended with {self.code}"
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:
            name = f"signal {-self.returncode}"
        return f"process {self.process} was killed by {name}"


def launch(
    command: Sequence[str],
    num_processes: int,
    *,
    devices_per_process: int | None = None,
    restarts: int = 0,
    verbose: bool = False,
    settle_s: float = SETTLE_S,
) -> int:
    """Run a command in several processes that find one another, and wait for all of them.

    Each gets `--coordinator`, `--num-processes` and `--process-id` after its own words, and a session of
    its own: Ctrl-C reaches this process alone, which hands signals on. If one fails the others are
    ended; none outlives this process (on Linux, not even if it is killed). What they write comes out
    here, each line with the process's number before it. The last line says which failed first.

    Args:
        command: a program and its words; `python` is the Python that runs this, whatever PATH has.
        num_processes: at least 1.
        devices_per_process: so many devices of the CPU in each; None leaves devices alone.
        restarts: how often all are started again where the first to fail was killed, or ended by the
            watchdog. Not after a status of 1 or 2, which the next start would meet again, nor after
            SIGINT, SIGTERM or SIGHUP.
        verbose: also hand on what Gloo and absl say of each connection.
        settle_s: how long the others may go on after one has failed, in seconds.

    Returns:
        the first status that wasn't 0, 128 + n after signal n; else 0. If this process got a signal n
        and the first to end did as told, 128 + n, though JAX's processes tell one another SIGTERM.

    Raises:
        ConfigError: if a number is out of range, there is no such program, or a restart would not go on
            with the run.
    """
    if not command:
        raise errors.ConfigError(f"what to launch? Such as: {EXAMPLE}")
    for name, value, least in (
        ("num_processes", num_processes, 1),
        ("devices_per_process", devices_per_process, 1),
        ("restarts", restarts, 0),
    ):
        if value is not None and value < least:
            raise errors.ConfigError(f"{name} is {value}; it must be at least {least}")
    if restarts and "--no-resume" in command:
        raise errors.ConfigError("--no-resume begins anew at each restart: leave out one of the two")
    program, *words = command
    if program == "python":  # PATH's may well be one without jaxnets
        program = sys.executable
    if shutil.which(program) is None:
        raise errors.ConfigError(f"there is no program {program}")
    environment, lock = _environment(devices_per_process), threading.Lock()
    which = " first" if num_processes > 1 else ""
    with _signals_noted() as received:
        restart = 0
        while True:
            with _started([program, *words], num_processes, environment) as children:
                first = _wait(children, received, settle_s, lock, verbose=verbose)
            if first is None:
                return 0
            if received or restart == restarts or not first.is_accident:
                break
            restart += 1
            _say(lock, f"{first}{which}; all are started again, restart {restart} of {restarts}")
    if received and first.is_told:
        name = "Ctrl-C" if received[0] == signal.SIGINT else signal.Signals(received[0]).name
        _say(lock, f"stopped by {name}")
        return 128 + received[0]
    _say(lock, f"{first}{which}; the run ended with {first.code}")
    return first.code


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """The signals that this process gets from here on, in place of what they would do."""
    received: list[int] = []
    old = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number in _SIGNALS:
            signal.signal(number, old[number])


@contextlib.contextmanager
def _started(
    command: Sequence[str], num_processes: int, environment: Mapping[str, str]
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes; none is left afterwards."""
    where = ("--coordinator", f"127.0.0.1:{_free_port()}", "--num-processes", str(num_processes))
    children: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(num_processes):
            children.append(_start([*command, *where, "--process-id", str(i)], environment))
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def _start(words: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, str(os.getpid()), *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _wait(
    children: Sequence["subprocess.Popen[bytes]"],
    received: Sequence[int],
    settle_s: float,
    lock: Any,
    *,
    verbose: bool,
) -> _End | None:
    """Hand on output and signals until all have ended; the first one that didn't end well."""
    pumps = [
        threading.Thread(target=_pump, args=(i, source, sink, lock, verbose), daemon=True)
        for i, child in enumerate(children)
        for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    ]
    for pump in pumps:
        pump.start()
    alive, first, num_sent = dict(enumerate(children)), None, 0
    ends: dict[int, float] = {}  # when to send which signal
    while alive:
        for number in received[num_sent:]:
            _send(alive, number)
            num_sent += 1
            if num_sent > 1:  # they end at once, or are ended
                ends.setdefault(signal.SIGKILL, time.monotonic() + _KILL_S)
        for i, returncode in _ended(alive):
            del alive[i]
            end = _End(i, returncode)
            first = first or (end if returncode else None)
            if returncode and alive and not ends:
                left = _SAVE_S if num_sent or end.is_told else settle_s
                if not (num_sent and end.is_told):
                    _say(lock, f"{end}; the others have {left:g} s to end")
                ends[signal.SIGTERM] = time.monotonic() + left
                ends[signal.SIGKILL] = ends[signal.SIGTERM] + _KILL_S
        for number in [number for number, when in ends.items() if when <= time.monotonic()]:
            ends[number] = float("inf")
            _send(alive, number)
        time.sleep(_POLL_S)
    for pump in pumps:  # what a process of theirs still holds open isn't waited for
        pump.join(2)
    return first


def _ended(alive: Mapping[int, "subprocess.Popen[bytes]"]) -> list[tuple[int, int]]:
    """Who has ended since the last look, and how; the cause before what follows from it.

    A peer's death makes JAX's processes end with 1 or abort, and one may be seen before the dead one. So
    all are looked at again, and those that were killed come first, those that aborted last of them.
    """
    if all(child.poll() is None for child in alive.values()):
        return []
    codes = {i: child.poll() for i, child in alive.items()}
    found = [(i, code) for i, code in codes.items() if code is not None]
    return sorted(found, key=lambda end: (end[1] >= 0, end[1] == -signal.SIGABRT))


def _send(alive: Mapping[int, "subprocess.Popen[bytes]"], number: int) -> None:
    for child in alive.values():
        child.send_signal(number)


def _pump(i: int, source: IO[bytes], sink: Any, lock: Any, verbose: bool) -> None:
    with source:
        for line in source:
            if not verbose and _NOISE.match(line):
                continue
            with lock, contextlib.suppress(OSError):  # nobody may be reading any more
                sink.buffer.write(b"[%d] %s\n" % (i, line.rstrip(b"\r\n")))
                sink.buffer.flush()


def _say(lock: Any, line: str) -> None:
    with lock, contextlib.suppress(OSError):
        print(f"launch: {line}", file=sys.stderr, flush=True)


def _environment(devices: int | None) -> dict[str, str]:
    environment = {**os.environ}
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if devices is not None:
        flag = "--xla_force_host_platform_device_count"
        others = re.sub(rf"{flag}=\d+", "", environment.get("XLA_FLAGS", "")).split()
        environment["XLA_FLAGS"] = " ".join([*others, f"{flag}={devices}"])
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
