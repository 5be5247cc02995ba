"""A data set of an object store, copied to this host before it is read.

Every reader then works as it does on a disk, data workers included, and each object is fetched once.
What arrives is compared with the digest that the store has of it, or with its size where there is none.
"""

import concurrent.futures
import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from jaxnets import errors
from jaxnets.data.download import locked, writing
from jaxnets.remote import ObjectPath, md5

_INDEX = ".index.json"
_THREADS = 16


def mirrored(folder: Any, name: str) -> Path:
    """Copy a data set from a store, unless what is here is what is there.

    Args:
        folder: of the data sets, an `ObjectPath`.
        name: of the data set, one plain component; with any other name nothing is copied.

    Returns:
        the folder of this host that has the data set under its name, if the store has it.

    Raises:
        DataError: if the store can't be read, or the copy not be written.
    """
    here = cache_folder() / folder.bucket / folder.key
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        with locked(here / name), writing(here / name):
            _copy(folder / name, here / name)
    return here


def cache_folder() -> Path:
    """Where copies lie."""
    return Path(os.environ.get("JAXNETS_CACHE") or "~/.cache/jaxnets").expanduser() / "remote"


def _copy(source: ObjectPath, target: Path) -> None:
    try:
        objects = source.objects()
    except OSError as error:
        raise errors.DataError(f"{source} can't be read: {error.strerror}") from error
    if not objects:
        return  # what a loader downloads itself stays
    if strange := [name for name in objects if ".." in name.split("/") or name.startswith("/")]:
        raise errors.DataError(f"{source}: no name for a file: {strange[0]}")
    index = target / _INDEX
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(index.read_text())
    new = [name for name in objects if known.get(name) != _seen(objects[name], target / name)]
    for path in target.rglob("*"):  # what the store has no more would be read as if it had
        if path.is_file() and path != index and path.relative_to(target).as_posix() not in objects:
            path.unlink()
    with concurrent.futures.ThreadPoolExecutor(_THREADS, "mirror") as pool:
        list(pool.map(lambda name: _fetch(source / name, target / name, objects[name]), new))
    if new or known.keys() != objects.keys():
        target.mkdir(parents=True, exist_ok=True)
        found = {name: _seen(said, target / name) for name, said in objects.items()}
        temporary = index.with_name(f"{_INDEX}.tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(index)


def _seen(said: dict[str, Any], path: Path) -> list[Any]:
    """The object as the store has it, and the file as it is here."""
    try:
        here = path.stat()
    except OSError:
        return []
    return [said["generation"], here.st_size, here.st_mtime_ns]


def _fetch(source: ObjectPath, path: Path, said: dict[str, Any]) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise errors.DataError(f"{source} can't be read: {error.strerror}") from error
    if len(content) != int(said["size"]) or said.get("md5Hash", md5(content)) != md5(content):
        raise errors.DataError(f"{source}: what arrived is not what the store has; try again")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)
