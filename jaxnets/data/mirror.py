"""A data set of an object store, copied to this host before it is read.

Every reader then works as it does on a disk, data workers included, and each object is fetched once.
What arrives is compared with the digest that the store has of it, or with its size where there is none.
"""

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxnets import errors
from jaxnets.data.download import locked, writing
from jaxnets.remote import ObjectPath

_INDEX = ".index.jsonl"  # a line for each object that is here: its name, and what `_seen` says of it
_PARTS = ".arriving"  # a folder, while something arrives
_THREADS = 16
_PIECE_BYTES = 32 << 20  # each thread holds one


def mirrored(folder: Any, name: str) -> Path:
    """Copy a data set from a store, unless what is here is what is there.

    Args:
        folder: of the data sets, an `ObjectPath`.
        name: of the data set, one plain component; with any other name nothing is copied.

    Returns:
        the folder of this host that has the data set under its name, if the store has it. What a loader
        makes there stays until an object that was copied changes or is no more in the store.

    Raises:
        DataError: if the store can't be read, or the copy not be written. What has arrived is kept, and
            the next call goes on from there.
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
    if strange := [name for name in objects if ".." in name.split("/") or name.startswith("/")]:
        raise errors.DataError(f"{source}: no name for a file: {strange[0]}")
    index = target / _INDEX
    known = _read(index)
    new = [name for name in objects if known.get(name) != _seen(objects[name], target / name)]
    if not new and known.keys() == objects.keys():
        return  # also if the store has nothing: what a loader downloads itself stays

    def is_other(name: str) -> bool:
        """Whether something is or was here that isn't, or may not be, what the store has now."""
        if name not in known:
            return (target / name).exists()
        return name not in objects or known[name][0] != objects[name]["generation"]

    if any(is_other(name) for name in {*known, *new}):
        _clear(target, objects)
    (target / _PARTS).mkdir(parents=True, exist_ok=True)
    temporary = index.with_name(f"{_INDEX}.tmp")
    temporary.write_bytes(b"".join(_line(name, known[name]) for name in objects.keys() - set(new)))
    temporary.replace(index)
    is_over = threading.Event()
    # Unbuffered: a line is written whole, by whichever thread, and no kill loses it.
    with (
        index.open("ab", buffering=0) as lines,
        concurrent.futures.ThreadPoolExecutor(_THREADS, "mirror") as pool,
    ):

        def fetch(name: str) -> None:
            path, said = target / name, objects[name]
            key = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
            part = target / _PARTS / f"{key}-{said['generation']}"
            if _fetch(source / name, part, said, is_over.is_set):
                path.parent.mkdir(parents=True, exist_ok=True)
                part.replace(path)
                lines.write(_line(name, _seen(said, path)))

        try:
            list(pool.map(fetch, new))
        finally:
            is_over.set()  # the others need not finish their objects
    shutil.rmtree(target / _PARTS)


def _clear(target: Path, objects: dict[str, Any]) -> None:
    """Delete what the store has no more, and with it what a loader may have made of that.

    Locks stay, since others hold them.
    """
    for path in sorted(target.rglob("*"), reverse=True):  # a folder after what is in it
        name = path.relative_to(target).as_posix()
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it isn't empty
                path.rmdir()
            continue
        is_ours = name == _INDEX or name.startswith(f"{_PARTS}/")
        if name not in objects and not is_ours and not re.fullmatch(r"\..*\.lock", path.name):
            path.unlink()


def _read(index: Path) -> dict[str, Any]:
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        for line in index.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # one that was cut off
                name, seen = json.loads(line)
                known[name] = seen
    return known


def _line(name: str, seen: list[Any]) -> bytes:
    return json.dumps([name, seen]).encode() + b"\n"


def _seen(said: dict[str, Any], path: Path) -> list[Any]:
    """The object as the store has it, and the file as it is here."""
    try:
        here = path.stat()
    except OSError:
        return []
    return [said["generation"], here.st_size, here.st_mtime_ns]


def _fetch(source: ObjectPath, part: Path, said: dict[str, Any], is_over: Callable[[], bool]) -> bool:
    """Bring an object to a file, behind what has arrived of it before; False if broken off."""
    size, expected = int(said["size"]), said.get("md5Hash")
    digest = hashlib.md5(usedforsecurity=False)
    # Without a digest nothing would tell whether what arrived before is still sound.
    with part.open("ab+" if expected else "wb+") as file:
        file.seek(0)
        for piece in iter(functools.partial(file.read, _PIECE_BYTES), b""):
            digest.update(piece)
        done = file.tell()
        while done < size:
            if is_over():
                return False
            piece = _read_piece(source, done, min(_PIECE_BYTES, size - done), int(said["generation"]))
            if not piece:
                break
            file.write(piece)
            digest.update(piece)
            done += len(piece)
    if done != size or expected not in (None, base64.b64encode(digest.digest()).decode()):
        part.unlink()
        raise errors.DataError(f"{source}: what arrived is not what the store has; try again")
    return True


def _read_piece(source: ObjectPath, start: int, size: int, generation: int) -> bytes:
    try:
        return source.read_bytes(start, size, generation=generation)
    except FileNotFoundError as error:
        raise errors.DataError(f"{source} was changed while it was copied; try again") from error
    except OSError as error:
        raise errors.DataError(f"{source} can't be read: {error.strerror}") from error
