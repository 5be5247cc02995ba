"""Files that are whole or not there, and what they hold.

Here alone, and in their locks, a folder on a disk and one of an object store differ: on a disk what is
written gets its name by a rename and is synced; in a store it is one request.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from jaxnets.remote import ObjectPath

PIECE = 1 << 23  # bytes that one thread digests while others digest the next ones
_UPLOAD_S = 30.0  # between uploads of a file that is appended to, unless it is synced


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or the next start after a kill, sees all of it or the old one."""
    content = content.encode() if isinstance(content, str) else content
    if isinstance(path, ObjectPath):
        path.write(content)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, would survive a power cut."""
    if isinstance(path, ObjectPath):  # what is in the store is safe
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and those above it; one that is new here would survive a power cut."""
    if isinstance(path, ObjectPath):  # which has no folders
        return
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        with contextlib.suppress(PermissionError):  # one above that may be written and not read
            sync(each.parent)


def digest(path: Path, *, piece: int | None = PIECE) -> str:
    """The SHA-256 of a file; of a large one "PIECE:" and that of its pieces' digests, one after another.

    Args:
        path: of the file.
        piece: in bytes; a file of no more than that is taken whole, and any with None.
    """
    if isinstance(path, ObjectPath):
        return _digest_object(path, piece)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if piece is None or size <= piece:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return _in_pieces(lambda offset: os.pread(file.fileno(), piece, offset), size, piece)


def _digest_object(path: ObjectPath, piece: int | None) -> str:
    size = path.stat().st_size
    if piece is None or size <= piece:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _in_pieces(lambda offset: path.read_bytes(offset, piece), size, piece)


def _in_pieces(read: Callable[[int], bytes], size: int, piece: int) -> str:
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "digest") as pool:
        digests = pool.map(lambda offset: hashlib.sha256(read(offset)).digest(), range(0, size, piece))
        whole = b"".join(digests)
    return f"{piece}:{hashlib.sha256(whole).hexdigest()}"


def has_digest(path: Path, expected: str) -> bool:
    """Whether a file is the one of a digest, made in whatever pieces."""
    piece = expected.rpartition(":")[0]
    return digest(path, piece=int(piece) if piece else None) == expected


def remove_tree(folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder; in a store its own files before those of folders in it."""
    if not isinstance(folder, ObjectPath):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    try:
        _delete(list(folder.rglob("*")))
    except OSError:
        if not ignore_errors:
            raise


def move(path: Path, target: Path) -> None:
    """Rename a file or folder; in a store all is copied, and then deleted as `remove_tree` does."""
    if not isinstance(path, ObjectPath):
        path.rename(target)
        return
    assert isinstance(target, ObjectPath)
    copies = {found: target / str(found.relative_to(path)) for found in path.rglob("*")}
    if path.is_file():
        copies[path] = target
    with concurrent.futures.ThreadPoolExecutor(8, "copy") as pool:
        list(pool.map(ObjectPath.copy, copies, copies.values()))
    _delete(list(copies))


def _delete(paths: list[ObjectPath]) -> None:
    """What is written last lies at the top, and goes first: a kill leaves nothing that looks whole."""
    depths = sorted({len(path.parts) for path in paths})
    with concurrent.futures.ThreadPoolExecutor(8, "delete") as pool:
        for depth in depths:
            level = [path for path in paths if len(path.parts) == depth]
            list(pool.map(lambda path: path.unlink(missing_ok=True), level))


def free_bytes(path: Path) -> int | None:
    """Room on the disk that a path is, or would be, on; None in a store."""
    if isinstance(path, ObjectPath):
        return None
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return path if path.exists() or path == path.parent else existing(path.parent)


def open_to_append(path: Path) -> Any:
    """A text file with `write`, `flush` and `close` behind what is there; see `sync_open`."""
    return Appended(path) if isinstance(path, ObjectPath) else path.open("a", newline="")


def sync_open(file: "IO[str] | Appended") -> None:
    """Make sure that what was written so far would survive a power cut."""
    if isinstance(file, Appended):
        file.upload()
        return
    file.flush()
    os.fsync(file.fileno())


class Appended:
    """An object that grows: kept here, and written whole twice a minute, when synced and at the end."""

    def __init__(self, path: ObjectPath):
        self._path, self._pieces = path, [path.read_text()]
        self._is_new, self._time = False, time.monotonic()

    def write(self, text: str) -> None:
        """Append."""
        self._pieces.append(text)
        self._is_new = True

    def flush(self) -> None:
        """Write the object if that was long ago."""
        if time.monotonic() - self._time > _UPLOAD_S:
            self.upload()

    def upload(self) -> None:
        """Write the object, if there is something new."""
        if self._is_new:
            self._pieces = ["".join(self._pieces)]
            self._path.write(self._pieces[0].encode())
            self._is_new, self._time = False, time.monotonic()

    def close(self) -> None:
        """Write what is new."""
        self.upload()


class Staged:
    """A folder for a library that writes to a disk alone.

    Attributes:
        path: the folder itself; or one of this host, which `push` and `close` upload to the store.
    """

    def __init__(self, folder: Path):
        self._target = folder if isinstance(folder, ObjectPath) else None
        self.path = folder if self._target is None else Path(tempfile.mkdtemp(prefix="jaxnets-"))
        self._pushed: dict[Path, tuple[int, int]] = {}

    def push(self) -> None:
        """Upload files that have changed."""
        if self._target is None:
            return
        for path in sorted(self.path.rglob("*")):
            found = path.stat()
            if path.is_file() and self._pushed.get(path) != (found.st_size, found.st_mtime_ns):
                (self._target / path.relative_to(self.path).as_posix()).write(path.read_bytes())
                self._pushed[path] = (found.st_size, found.st_mtime_ns)

    def close(self) -> None:
        """Upload the rest, and delete the folder of this host."""
        if self._target is not None:
            self.push()
            shutil.rmtree(self.path, ignore_errors=True)
