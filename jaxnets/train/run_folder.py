"""The folder of a run: whose it is, that it can be written, and that nobody else writes into it."""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxnets import config, errors
from jaxnets.train import hosts
from jaxnets.train.files import make_folders, move, remove_tree, sync, write_atomically
from jaxnets.train.folder_lock import LOCK, NOW, locked
from jaxnets.train.verdict import by_first, together

CONFIG = "config.json"
ASSETS = "assets"
_CHECKPOINTS = "checkpoints"
_PROBE = ".probe"
_TOKEN = ".shared"
_LONGEST = 120  # as many letters as a path has within the folder of a checkpoint
_PATIENCE_S = 20.0  # until a file shows on another host
# What may lie in a folder that isn't a run's yet: a duel's report, and what a kill left of a start.
_HARMLESS = (
    *(LOCK, NOW, _PROBE, _TOKEN, f"{_TOKEN}.tmp"),
    *(f"{CONFIG}.tmp", "duel.json", "duel.json.tmp"),
)
_EXTENDS = ("epochs", "steps")  # a run may be made longer


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds: "experiment", "config", the digests of "assets", and what "data" it was.

    Raises:
        ConfigError: if the folder has none, or it can't be read.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text())
        return {
            "experiment": str(content["experiment"]),
            "config": dict(content["config"]),
            "assets": dict(content.get("assets", {})),
            "data": dict(content.get("data", {})),
        }
    except (FileNotFoundError, NotADirectoryError):
        raise errors.ConfigError(f"{folder} is not the folder of a run: it has no {CONFIG}") from None
    except OSError as error:
        raise errors.ConfigError(f"{path} can't be read: {errors.first_line(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise errors.ConfigError(f"{path} can't be read; it is damaged") from None


@contextmanager
def open_run(
    folder: Path,
    experiment: str,
    values: Mapping[str, Any],
    *,
    resume: bool = True,
    allow_change: bool = False,
) -> Iterator[Path]:
    """Take a folder for a run, new or to be gone on with, and lock it while this is open.

    Of several processes the first one does, and the others take its word; all must see the same folder.

    Args:
        folder: made if it isn't there.
        experiment: its name.
        values: the config, as `config.to_json` gives it.
        resume: whether to go on with an earlier run in the folder; otherwise that run is moved aside,
            to FOLDER.1, FOLDER.2, ...
        allow_change: go on with an earlier run although its config differs.

    Yields:
        the folder. `write_config` makes it this run's, as soon as nothing more can be refused.

    Raises:
        ConfigError: if the folder is a file, can't be written, is in use, isn't a run's, or holds a
            run of another experiment or config.
    """
    with contextlib.ExitStack() as stack:
        by_first(
            "run folder/open",
            lambda: _open(stack, folder, experiment, values, resume=resume, allow_change=allow_change),
        )
        if hosts.count() > 1:
            _check_shared(folder)
        yield folder


def write_config(
    folder: Path,
    experiment: str,
    values: Mapping[str, Any],
    assets: Mapping[str, bytes] | None = None,
    data: Mapping[str, str] | None = None,
) -> None:
    """Write config.json; of several processes the first one does.

    Args:
        folder: of the run.
        experiment: its name.
        values: the config, as `config.to_json` gives it.
        assets: files that belong to the model, by name, such as its vocabulary; `read_asset` reads them.
        data: what the data is known by, for `check_data`.
    """

    def write() -> None:
        content: dict[str, Any] = {"experiment": experiment, "config": dict(values)}
        if assets:
            make_folders(folder / ASSETS)
            for name, asset in assets.items():
                write_atomically(folder / ASSETS / name, asset)
            content["assets"] = {name: _digest(asset) for name, asset in assets.items()}
        if data:
            content["data"] = dict(data)
        write_atomically(folder / CONFIG, json.dumps(content, indent=1) + "\n")

    by_first("run folder/config", write)


def read_asset(folder: Path, name: str) -> bytes:
    """A file that belongs to the model of a run, such as its vocabulary.

    Raises:
        ConfigError: if the run has no such file, or it is another than the model was trained with.
    """
    path = folder / ASSETS / name
    known = read_config(folder)["assets"]
    if name not in known:
        raise errors.ConfigError(f"the run in {folder} has no {name}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise errors.ConfigError(f"{path} can't be read: {errors.first_line(error)}") from None
    if _digest(data) != known[name]:
        raise errors.ConfigError(f"{path} is not the one that the run was trained with")
    return data


def check_assets(folder: Path, assets: Mapping[str, bytes]) -> None:
    """Refuse to go on with a run whose model has other files, such as another vocabulary.

    Raises:
        ConfigError: if so.
    """
    if not (folder / CONFIG).exists():
        return
    known = read_config(folder)["assets"]
    for name in sorted(known.keys() | assets.keys()):
        if name not in assets or _digest(assets[name]) != known.get(name):
            raise errors.ConfigError(
                f"the run in {folder} was trained with another {name}: its data has changed; choose "
                "another --run-dir, or --no-resume to start anew"
            )


def check_data(folder: Path, data: Mapping[str, str]) -> None:
    """Refuse to go on with a run whose examples, or labels, have changed.

    Args:
        folder: of the run; one of before this was noted is not refused.
        data: as `write_config` was given it.

    Raises:
        ConfigError: if so.
    """
    if not (folder / CONFIG).exists():
        return
    known = read_config(folder)["data"]
    for part, what in data.items():
        if known.get(part, what) != what:
            raise errors.ConfigError(
                f"the run in {folder} was begun with other data: {part} had {known[part]}, now {what}; "
                "choose another --run-dir, --no-resume to start anew, or --allow-change to go on with it"
            )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _open(
    stack: contextlib.ExitStack,
    folder: Path,
    experiment: str,
    values: Mapping[str, Any],
    *,
    resume: bool,
    allow_change: bool,
) -> None:
    try:
        _check_kind(folder)
        make_folders(folder)
        stack.enter_context(locked(folder))
        _probe(folder)
    except OSError as error:
        raise errors.ConfigError(
            f"the run folder {folder} can't be written: {error.strerror}; choose another --run-dir"
        ) from None
    if (folder / CONFIG).exists():
        if resume:
            _compare(folder, experiment, values, allow_change)
        else:
            _move_aside(folder)


def _check_kind(folder: Path) -> None:
    """Refuse what isn't a folder for a run."""
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError:
        if folder.is_symlink():
            raise errors.ConfigError(
                f"the run folder {folder} is a link to {os.readlink(folder)}, which isn't there"
            ) from None
        return
    if not is_folder:
        raise errors.ConfigError(f"the run folder {folder} is a file; choose another --run-dir")
    if not (folder / CONFIG).exists():
        strange = sorted(path.name for path in folder.iterdir() if path.name not in _HARMLESS)
        if strange:
            raise errors.ConfigError(
                f"{folder} is not the folder of a run, and not empty (it has {strange[0]}); "
                "choose another --run-dir"
            )
    if (folder / _CHECKPOINTS).exists() and not (folder / _CHECKPOINTS).is_dir():
        raise errors.ConfigError(f"{folder / _CHECKPOINTS} is a file, and checkpoints go there")


def _probe(folder: Path) -> None:
    """Write where checkpoints will lie, with a path as long as theirs, before hours of training."""
    parent = folder / _CHECKPOINTS
    probe = (parent if parent.exists() else folder) / _PROBE
    try:
        deep = probe / ("x" * _LONGEST)
        deep.mkdir(parents=True, exist_ok=True)
        write_atomically(deep / "x", b"x" * 65536)
    finally:
        remove_tree(probe, ignore_errors=True)


def _check_shared(folder: Path) -> None:
    """Make sure that all processes see the same folder, and not each one of its own host."""

    def write() -> str:
        token = secrets.token_hex(16)
        write_atomically(folder / _TOKEN, token)
        return token

    token = by_first("run folder/token", write)

    def look() -> None:
        end = time.monotonic() + _PATIENCE_S
        while True:
            with contextlib.suppress(OSError):
                if (folder / _TOKEN).read_text() == token:
                    return
            if time.monotonic() > end:
                raise errors.ConfigError(
                    f"the run folder {folder} on {socket.gethostname()} is not the one that process 0 "
                    "writes; choose a --run-dir that all hosts share"
                )
            time.sleep(0.1)

    try:
        together("run folder/shared", look)
    finally:
        if hosts.is_first():
            (folder / _TOKEN).unlink(missing_ok=True)


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
    make_folders(aside)
    # The config goes last: a kill in between leaves a folder that is still this run's.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
        if path.name != LOCK:
            move(path, aside / path.name)
    sync(aside)
