"""Several processes of a run on one machine: they stand in for hosts."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from jaxnets import errors

SETTLE_S = 15.0
"""How long the others may go on after one has failed; they may have stacks to print."""
_SAVE_S = 120.0  # the same after one that was told to stop: they may be saving
_KILL_S = 10.0  # from SIGTERM to SIGKILL
_POLL_S = 0.05
_TOLD = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Becomes the command, after asking Linux to kill it when the launcher has ended in whatever way.
_CHILD = """
import ctypes, os, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() == parent:
    os.execvp(command[0], command)
"""


def launch(
    command: Sequence[str],
    num_processes: int,
    *,
    devices_per_process: int | None = None,
    settle_s: float = SETTLE_S,
) -> int:
    """Run a command in several processes that find one another, and wait for all of them.

    Each gets `--coordinator`, `--num-processes` and `--process-id` after its own words, and a session of
    its own: Ctrl-C reaches this process alone, which hands signals on. If one fails the others are
    ended; none outlives this process (on Linux, not even if it is killed). What they write comes out
    here, each line with the process's number before it.

    Args:
        command: a program and its words.
        num_processes: at least 1.
        devices_per_process: so many devices of the CPU in each; None leaves devices alone.
        settle_s: how long the others may go on after one has failed, in seconds.

    Returns:
        the first status that wasn't 0, 128 + n after signal n; else 0.

    Raises:
        ConfigError: if a number is below 1, or there is no such program.
    """
    if not command:
        raise errors.ConfigError(
            "what to launch? Such as: launch --num-processes 2 -- python -m experiments.digits train"
        )
    for name, value in (("num_processes", num_processes), ("devices_per_process", devices_per_process)):
        if value is not None and value < 1:
            raise errors.ConfigError(f"{name} is {value}; it must be at least 1")
    if shutil.which(command[0]) is None:
        raise errors.ConfigError(f"there is no program {command[0]}")
    received: list[int] = []
    old = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: received.append(number))
    children: list[subprocess.Popen[bytes]] = []
    try:
        where = f"127.0.0.1:{_free_port()}"
        environment = _environment(devices_per_process)
        for i in range(num_processes):
            words = [
                "--coordinator",
                where,
                "--num-processes",
                str(num_processes),
                "--process-id",
                str(i),
            ]
            children.append(_start([*command, *words], environment))
        return _wait(children, received, settle_s)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number in _SIGNALS:
            signal.signal(number, old[number])


def _start(words: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, str(os.getpid()), *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _wait(children: Sequence["subprocess.Popen[bytes]"], received: list[int], settle_s: float) -> int:
    """Hand on output and signals until all have ended; the status."""
    lock = threading.Lock()
    pumps = [
        threading.Thread(target=_pump, args=(i, source, sink, lock), daemon=True)
        for i, child in enumerate(children)
        for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    ]
    for pump in pumps:
        pump.start()
    alive, status, num_signals = dict(enumerate(children)), 0, 0
    ends: dict[int, float] = {}  # when to send which signal
    while alive:
        while received:
            number, num_signals = received.pop(0), num_signals + 1
            _send(alive, number)
            if num_signals > 1:  # they end at once, or are ended
                ends.setdefault(signal.SIGKILL, time.monotonic() + _KILL_S)
        for i, child in list(alive.items()):
            if child.poll() is None:
                continue
            del alive[i]
            code = child.returncode if child.returncode >= 0 else 128 - child.returncode
            status = status or code
            if code and alive and not ends:
                how = f"ended with {code}" if child.returncode > 0 else f"was killed by {_name(code)}"
                is_told = num_signals or (code in _TOLD and child.returncode > 0)
                left = _SAVE_S if is_told else settle_s
                _say(lock, f"process {i} {how}; the others have {left:g} s to end")
                ends[signal.SIGTERM] = time.monotonic() + left
                ends[signal.SIGKILL] = ends[signal.SIGTERM] + _KILL_S
        for number in [number for number, when in ends.items() if when <= time.monotonic()]:
            ends[number] = float("inf")
            _send(alive, number)
        time.sleep(_POLL_S)
    for pump in pumps:  # what a process of theirs still holds open isn't waited for
        pump.join(2)
    return status


def _send(alive: Mapping[int, "subprocess.Popen[bytes]"], number: int) -> None:
    for child in alive.values():
        child.send_signal(number)


def _pump(i: int, source: IO[bytes], sink: Any, lock: Any) -> None:
    for line in source:
        with lock, contextlib.suppress(OSError):  # nobody may be reading any more
            sink.buffer.write(b"[%d] %s\n" % (i, line.rstrip(b"\r\n")))
            sink.buffer.flush()


def _say(lock: Any, line: str) -> None:
    with lock, contextlib.suppress(OSError):
        print(f"launch: {line}", file=sys.stderr, flush=True)


def _name(code: int) -> str:
    return signal.Signals(code - 128).name


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
