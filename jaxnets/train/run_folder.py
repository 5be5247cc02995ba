"""The folder of a run: whose it is, and that nobody else writes into it."""

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxnets import config, errors
from jaxnets.train import hosts
from jaxnets.train.files import write_atomically
from jaxnets.train.verdict import by_first, together

CONFIG = "config.json"
_LOCK = ".lock"
_TOKEN = ".token"
_LOOKS, _LOOK_S = 20, 0.25
# What may lie in a folder that isn't a run's yet: a duel's report, and what a kill left of a start.
_HARMLESS = (_LOCK, _TOKEN, f"{_TOKEN}.tmp", f"{CONFIG}.tmp", "duel.json", "duel.json.tmp")
_EXTENDS = ("epochs", "steps")  # a run may be made longer


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds: "experiment" and "config".

    Raises:
        ConfigError: if the folder has none, or it can't be read.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text())
        return {"experiment": str(content["experiment"]), "config": dict(content["config"])}
    except (FileNotFoundError, NotADirectoryError):
        raise errors.ConfigError(f"{folder} is not the folder of a run: it has no {CONFIG}") from None
    except (ValueError, KeyError, TypeError):
        raise errors.ConfigError(f"{path} can't be read; it is damaged") from None


@contextlib.contextmanager
def open_run(
    folder: Path,
    experiment: str,
    values: Mapping[str, Any],
    *,
    resume: bool = True,
    allow_change: bool = False,
) -> Iterator[Path]:
    """Take a folder for a run, new or to be gone on with, and lock it while this is open.

    Args:
        folder: made if it isn't there.
        experiment: its name.
        values: the config, as `config.to_json` gives it.
        resume: whether to go on with an earlier run in the folder; otherwise that run is moved aside,
            to FOLDER.1, FOLDER.2, ...
        allow_change: go on with an earlier run although its config differs.

    Of several processes the first one does all this, and the others do as it says.

    Yields:
        the folder. `write_config` makes it this run's, as soon as nothing more can be refused.

    Raises:
        ConfigError: if the folder is a file, can't be written, is in use, isn't a run's, or holds a
            run of another experiment or config; if another process doesn't see the same folder.
    """
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(_taken(folder, experiment, values, resume, allow_change))

        by_first("run folder", take)
        _check_shared(folder)
        yield folder


@contextlib.contextmanager
def _taken(
    folder: Path, experiment: str, values: Mapping[str, Any], resume: bool, allow_change: bool
) -> Iterator[None]:
    if folder.exists() and not folder.is_dir():
        raise errors.ConfigError(f"the run folder {folder} is a file; choose another --run-dir")
    if folder.is_dir() and not (folder / CONFIG).exists():
        strange = sorted(path.name for path in folder.iterdir() if path.name not in _HARMLESS)
        if strange:
            raise errors.ConfigError(
                f"{folder} is not the folder of a run, and not empty (it has {strange[0]}); "
                "choose another --run-dir"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a+")
    except OSError as error:
        raise errors.ConfigError(
            f"the run folder {folder} can't be written: {error.strerror}; choose another --run-dir"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise errors.ConfigError(
                f"another process ({lock.read().strip() or 'unknown'}) is running in {folder}"
            ) from None
        if (folder / CONFIG).exists():
            if resume:
                _compare(folder, experiment, values, allow_change)
            else:
                _move_aside(folder)
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()}")
        lock.flush()
        yield


def write_config(folder: Path, experiment: str, values: Mapping[str, Any]) -> None:
    """Write config.json."""
    content = {"experiment": experiment, "config": dict(values)}
    text = json.dumps(content, indent=1) + "\n"
    by_first("config.json", lambda: write_atomically(folder / CONFIG, text))


def _check_shared(folder: Path) -> None:
    """Make sure that every process sees the first one's folder."""
    if hosts.count() == 1:
        return
    path = folder / _TOKEN

    def write() -> str:
        token = secrets.token_hex(16)
        write_atomically(path, token)
        return token

    token = by_first("run folder/token", write)

    def look() -> None:
        for _ in range(_LOOKS):  # a network's file system may show it late
            with contextlib.suppress(OSError):
                if path.read_text() == token:
                    return
            time.sleep(_LOOK_S)
        raise errors.ConfigError(
            f"{folder} here isn't the folder that process 0 sees: a run of several processes needs a "
            "--run-dir on a file system that all of them share"
        )

    try:
        together("run folder/seen", look)
    finally:
        if hosts.is_first():
            path.unlink(missing_ok=True)


def _compare(folder: Path, experiment: str, values: Mapping[str, Any], allow_change: bool) -> None:
    old = read_config(folder)
    if old["experiment"] != experiment:
        raise errors.ConfigError(
            f"{folder} holds a run of {old['experiment']}, not of {experiment}; choose another --run-dir"
        )
    # A field that has come since the run was started has its default there.
    known = {name: value for name, value in values.items() if name in old["config"]}
    changes = config.differences(old["config"], known, ignore=_EXTENDS)
    if changes and not allow_change:
        raise errors.ConfigError(
            f"{folder} holds a run with another config: {', '.join(changes)}; choose another --run-dir, "
            "--no-resume to start anew, or --allow-change to go on with it"
        )


def _move_aside(folder: Path) -> None:
    """Rename the earlier run's content to FOLDER.N; the folder with the lock itself stays."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    # The config goes last: a kill in between leaves a folder that is still this run's.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
        if path.name not in (_LOCK, _TOKEN):
            path.rename(aside / path.name)
