"""Nobody else writes into a folder: neither another process of this host, nor another host.

On one host the kernel's own lock decides, which goes with its process, however that ends. Not every
shared file system carries it to other hosts. So the owner touches the lock file every few seconds, and
on another host a lock counts until it has been silent for a minute. Times are those that the file system
itself gives to two files; no clock of a host is looked at.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jaxnets import errors

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
                print(
                    f"error: {_name(owner)} took over {path.parent} while this run was silent: this "
                    "one ends, with nothing more written",
                    file=sys.stderr,
                    flush=True,
                )
                _leave()
                return
            os.utime(path)


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


def _is_used(folder: Path, owner: dict[str, Any], more: str = "") -> errors.ConfigError:
    return errors.ConfigError(
        f"another process ({_name(owner)}{more}) is running in {folder}; stop it, or choose another "
        "--run-dir"
    )


def _boot() -> str:
    """Which start of which kernel this is, where the kernel says so."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
