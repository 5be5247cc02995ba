"""Nobody else writes into a folder: neither another process of this host, nor another host.

On one host the kernel's own lock decides, which goes with its process, however that ends. Not every
shared file system carries it to other hosts. So the owner touches the lock file every few seconds, and
on another host a lock counts until it has been silent for a minute. Times are those that the file system
itself gives to two files; no clock of a host is looked at.

An object store has no locks, but writes on condition: the lock is an object that is made only if it
isn't there, and that its owner writes again and again, each time only if nobody else has.
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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from jaxnets import errors
from jaxnets.remote import ObjectPath

LOCK = ".lock"
NOW = ".lock.now"
BEAT_S = 5.0
SILENT_S = 60.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder while this is open.

    Raises:
        ConfigError: if somebody else has locked it.
        OSError: if it can't be written.
    """
    path = folder / LOCK
    if isinstance(path, ObjectPath):
        with _locked_object(path):
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
        owner = _owner(file)
        here = {"host": socket.gethostname(), "boot": _boot()}
        is_from_here = all(owner.get(key) == value for key, value in here.items())
        if owner and not (is_decided and is_from_here):
            silence = _silence(path)
            if abs(silence) < SILENT_S:  # one from the future is older than a jump of that clock
                raise _is_used(folder, owner, f", silent for {max(silence, 0):.0f} s; if it was "
                               f"killed, its lock ends after {SILENT_S:.0f} s")  # fmt: skip
            warnings.warn(
                f"{folder} was locked by {_name(owner)}, which has been silent for {silence:.0f} s; "
                "taking it over",
                stacklevel=4,
            )
        me = {**here, "pid": os.getpid(), "run": secrets.token_hex(8)}
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
    me = {**_here(), "pid": os.getpid(), "run": secrets.token_hex(8)}
    held = _Held(path, me)
    if not held.write(0):
        _take_over(held)
    stop = threading.Event()
    beat = threading.Thread(target=held.beat, args=(stop,), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):  # by then somebody else's, or the store doesn't answer
            path.unlink(generation=held.generation)


class _Held:
    """A lock object, and the generation that it has as long as it is ours."""

    def __init__(self, path: ObjectPath, me: dict[str, Any]):
        self.path, self.me, self.generation = path, me, 0

    def write(self, generation: int) -> bool:
        """Write it if it has this generation, 0 for none; whether it is ours then."""
        try:
            self.generation = self.path.write(json.dumps(self.me).encode(), generation=generation)
            return True
        except FileExistsError:  # or it was written, and only the answer was lost
            found = self.path.info()
            if found is None or _owner_of(self.path).get("run") != self.me["run"]:
                return False
            self.generation = int(found["generation"])
            return True

    def beat(self, stop: threading.Event) -> None:
        """Show that the owner is alive, until it isn't the owner any more."""
        while not stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if not self.write(self.generation):
                    _give_way(self.path.parent, _owner_of(self.path))
                    return


def _take_over(held: _Held) -> None:
    """Take a lock whose owner is dead or silent.

    Raises:
        ConfigError: if it is neither.
    """
    path = held.path
    found = path.info() or {"generation": "0"}
    owner = _owner_of(path)
    if not _is_dead(owner):
        silence = _silence_of(path, found)
        if silence < SILENT_S:
            raise _is_used(path.parent, owner, f", silent for {max(silence, 0):.0f} s; if it was "
                           f"killed, its lock ends after {SILENT_S:.0f} s")  # fmt: skip
        warnings.warn(
            f"{path.parent} was locked by {_name(owner)}, which has been silent for {silence:.0f} s; "
            "taking it over",
            stacklevel=6,
        )
    if not held.write(int(found["generation"])):
        raise _is_used(path.parent, _owner_of(path))


def _silence_of(path: ObjectPath, found: dict[str, Any]) -> float:
    """How long ago an object was written, in seconds of the store."""
    if "updated" not in found:
        return SILENT_S  # it has gone meanwhile
    now = path.with_name(NOW)
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


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a lock's owner was a process of this host that is no more."""
    here = _here()
    if not all(here.values()) or any(owner.get(key) != value for key, value in here.items()):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _give_way(folder: Path | ObjectPath, owner: dict[str, Any]) -> None:
    print(
        f"error: {_name(owner)} took over {folder} while this run was silent: this one ends, with "
        "nothing more written",
        file=sys.stderr,
        flush=True,
    )
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


def _is_used(folder: Path | ObjectPath, owner: dict[str, Any], more: str = "") -> errors.ConfigError:
    return errors.ConfigError(
        f"another process ({_name(owner)}{more}) is running in {folder}; stop it, or choose another "
        "--run-dir"
    )


def _boot() -> str:
    """Which start of which kernel this is, where the kernel says so."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
