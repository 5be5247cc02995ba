"""Nobody else writes into a folder: neither another process of this host, nor another host.

On one host the kernel's own lock decides, which goes with its process, however that ends. Not every
shared file system carries it to other hosts. So the owner touches the lock file every few seconds, and
on another host a lock counts until it has been silent for a minute. Times are those that the file system
itself gives to two files; no clock of a host is looked at. Who comes meanwhile waits for a beat, or for
the end of that minute: a run that was killed is started again sooner than that.

An object store has no locks, but writes on condition: the lock is an object that is made only if it
isn't there, and that its owner writes again and again, each time only if nobody else has. It is a lease:
an owner that can't write it ends before it counts as silent.
"""

import contextlib
import fcntl
import io
import json
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from jaxnets import errors
from jaxnets.remote import ObjectPath
from jaxnets.train import hosts

LOCK = ".lock"
NOW = ".lock.now"
BEAT_S = 5.0
SILENT_S = 60.0
# An owner that a store hasn't answered for so long ends. What is left to SILENT_S is for requests
# that are on their way, for a thread that is late, and for clocks that don't run alike.
LEASE_S = 45.0
_CALL_S = 10.0  # of a call about a lock: several fit into a lease
_POLL_S = 1.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder while this is open; a lock that may be a dead process's is waited for, for a minute.

    Raises:
        ConfigError: if somebody else has locked it.
        OSError: if it can't be written.
    """
    path = folder / LOCK
    if isinstance(path, ObjectPath):
        with _locked_object(path.within(_CALL_S)):
            yield
        return
    with path.open("a+") as file:
        is_decided = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _is_used(folder, _owner(file)) from None
        except OSError:  # a file system without locks
            is_decided = False
        owner, here = _owner(file), _here()
        is_from_here = all(owner.get(key) == here[key] for key in ("host", "boot"))
        if owner and not (is_decided and is_from_here) and _is_alive(owner) is not False:
            _outlast(folder, owner, lambda: _seen(path), lambda: _silence(path))
        me = _me()
        _write(file, json.dumps(me))
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, me, stop), name="lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            with contextlib.suppress(OSError):
                if _owner(file).get("run") == me["run"]:
                    _write(file, "")


def _beat(path: Path, me: dict[str, Any], stop: threading.Event) -> None:
    """Show that the owner is alive, until it isn't the owner any more."""
    while not stop.wait(BEAT_S):
        with contextlib.suppress(OSError):
            with path.open() as file:
                owner = _owner(file)
            if owner.get("run") != me["run"]:
                _give_way(path.parent, owner)
                return
            os.utime(path)


@contextmanager
def _locked_object(path: ObjectPath) -> Iterator[None]:
    """The same by an object; OSError says what the store says."""
    held = _Held(path, _me())
    held.take()
    stop = threading.Event()
    # The one may sit in a call, so another looks at how long.
    threads = [
        threading.Thread(target=work, args=(stop,), name="lock", daemon=True)
        for work in (held.beat, held.watch)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        with contextlib.suppress(OSError):  # by then somebody else's, or the store doesn't answer
            path.unlink(generation=held.generation)


class _Held:
    """A lock object, the generation that it has as long as it is ours, and when it surely was."""

    def __init__(self, path: ObjectPath, me: dict[str, Any]):
        self.path, self.me, self.generation = path, me, 0
        self._confirmed, self._why = time.monotonic(), "no answer"

    def take(self) -> None:
        """Make it, or take it from an owner that is dead or silent.

        Raises:
            ConfigError: if it is neither.
        """
        while not self.write(0):
            found = self.path.info()
            if found is None:
                continue  # it has gone meanwhile
            if self._is_free(_owner_of(self.path), found) and self.write(int(found["generation"])):
                return

    def _is_free(self, owner: dict[str, Any], found: dict[str, Any]) -> bool:
        def look() -> tuple[str, dict[str, Any]] | None:
            seen = self.path.info()
            return (seen["generation"], _owner_of(self.path)) if seen else None

        if _is_alive(owner) is False:
            return True
        return _outlast(self.path.parent, owner, look, lambda: _silence_of(self.path, found))

    def write(self, generation: int) -> bool:
        """Write it if it has this generation, 0 for none; whether it is ours then."""
        begun = time.monotonic()
        try:
            self.generation = self.path.write(json.dumps(self.me).encode(), generation=generation)
        except FileExistsError:  # or it was written, whenever that was, and only the answer was lost
            found = self.path.info()
            if found is None or _owner_of(self.path).get("run") != self.me["run"]:
                return False
            return self.write(int(found["generation"]))
        self._confirmed = begun
        return True

    def beat(self, stop: threading.Event) -> None:
        """Show that the owner is alive, until it isn't the owner any more."""
        while not stop.wait(BEAT_S):
            try:
                if not self.write(self.generation):
                    _give_way(self.path.parent, _owner_of(self.path))
                    return
            except OSError as error:
                self._why = error.strerror

    def watch(self, stop: threading.Event) -> None:
        """End the process before others may take the lock."""
        while not stop.wait(min(_POLL_S, LEASE_S / 4)):
            silence = time.monotonic() - self._confirmed
            if silence > LEASE_S:
                _end(
                    f"the lock of {self.path.parent} could not be renewed for {silence:.0f} s "
                    f"({self._why}), and another run may take it soon"
                )
                return


def _outlast(
    folder: Path | ObjectPath,
    owner: dict[str, Any],
    look: Callable[[], tuple[Any, dict[str, Any]] | None],
    measure: Callable[[], float],
) -> bool:
    """Wait until a lock has been silent for long enough.

    Args:
        folder: that is locked.
        owner: of the lock.
        look: look() is what shows of a beat, and the owner; None once there is no lock.
        measure: measure() is for how long there was no beat, in seconds.

    Returns:
        whether there still is one.

    Raises:
        ConfigError: if it beats, or its owner is a process of this host that is alive.
    """
    first = look()  # before the measurement, or a beat between the two would be missed
    if first is None:
        return False
    silence, begun = measure(), time.monotonic()
    if abs(silence) < SILENT_S:  # one from the future is older than a jump of that clock
        if _is_alive(owner):
            raise _is_used(folder, owner)
        silence = max(silence, 0)
        hosts.say(
            f"{folder}: waiting up to {SILENT_S - silence:.0f} s for the lock of {_name(owner)}, silent "
            f"for {silence:.0f} s"
        )
        while (left := begun + SILENT_S - silence - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_S))
            seen = look()
            if seen is None:
                return False
            if seen != first:
                raise _is_used(folder, seen[1] or owner)
    warnings.warn(
        f"{folder} was locked by {_name(owner)}, which has been silent for "
        f"{max(silence, SILENT_S):.0f} s; taking it over",
        stacklevel=6,
    )
    return True


def _seen(path: Path) -> tuple[int, dict[str, Any]] | None:
    """When a file was touched, and by whom; it is opened, for which NFS asks the server again."""
    with path.open() as file:
        owner = _owner(file)
        return (os.fstat(file.fileno()).st_mtime_ns, owner) if owner else None


def _silence_of(path: ObjectPath, found: dict[str, Any]) -> float:
    """How long ago an object was written, in seconds of the store."""
    now = path.with_name(NOW).within(_CALL_S)
    now.write(b"")
    try:
        there = now.info() or found
    finally:
        now.unlink(missing_ok=True)
    begin, end = (datetime.fromisoformat(x["updated"]) for x in (found, there))
    return (end - begin).total_seconds()


def _owner_of(path: ObjectPath) -> dict[str, Any]:
    try:
        return _owner(io.StringIO(path.read_text()))
    except FileNotFoundError:
        return {}


def _here() -> dict[str, str]:
    """This host, and the numbers that its processes have."""
    found = {"host": socket.gethostname(), "boot": _boot(), "pids": ""}
    with contextlib.suppress(OSError):
        found["pids"] = os.readlink("/proc/self/ns/pid")
    return found


def _me() -> dict[str, Any]:
    """What says of a lock whose it is."""
    pid = os.getpid()
    return {**_here(), "pid": pid, "born": _born(pid), "run": secrets.token_hex(8)}


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether a lock's owner is a process of this host that is there; None where nobody knows."""
    here = _here()
    if not all(here.values()) or any(owner.get(key) != value for key, value in here.items()):
        return None
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return None
    # Another may have the number by now, as in a container that was started again.
    born = _born(owner["pid"])
    return born == owner["born"] if born and owner.get("born") else None


def _born(pid: int) -> str:
    """When a process began, counted from the start of the kernel; "" if it has ended or nobody says."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def _give_way(folder: Path | ObjectPath, owner: dict[str, Any]) -> None:
    _end(f"{_name(owner)} took over {folder} while this run was silent")


def _end(why: str) -> None:
    print(f"error: {why}: this one ends, with nothing more written", file=sys.stderr, flush=True)
    _leave()


def _leave() -> None:
    os._exit(2)  # at once: whatever this process wrote now would be in the other's way


def _silence(path: Path) -> float:
    """How long ago a file was touched, in seconds of the file system."""
    now = path.with_name(NOW)
    now.write_text("")
    try:
        return now.stat().st_mtime - path.stat().st_mtime
    finally:
        now.unlink(missing_ok=True)


def _owner(file: IO[str]) -> dict[str, Any]:
    """What the owner wrote; nothing if there is none, or it never came to that."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and "pid" in owner else {}


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner.get('host')}" if owner else "unknown"


def _is_used(folder: Path | ObjectPath, owner: dict[str, Any]) -> errors.ConfigError:
    return errors.ConfigError(
        f"another process ({_name(owner)}) is running in {folder}; stop it, or choose another --run-dir"
    )


def _boot() -> str:
    """Which start of which kernel this is, where the kernel says so."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
