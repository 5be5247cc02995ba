"""Files that are whole or not there, and what they hold."""

import concurrent.futures
import contextlib
import hashlib
import os
from pathlib import Path

PIECE = 1 << 23  # bytes that one thread digests while others digest the next ones


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or the next start after a kill, sees all of it or the old one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and those above it; one that is new here would survive a power cut."""
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
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if piece is None or size <= piece:
            return hashlib.file_digest(file, "sha256").hexdigest()

        def one(offset: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), piece, offset)).digest()

        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "digest") as pool:
            whole = b"".join(pool.map(one, range(0, size, piece)))
    return f"{piece}:{hashlib.sha256(whole).hexdigest()}"


def has_digest(path: Path, expected: str) -> bool:
    """Whether a file is the one of a digest, made in whatever pieces."""
    piece = expected.rpartition(":")[0]
    return digest(path, piece=int(piece) if piece else None) == expected


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return path if path.exists() or path == path.parent else existing(path.parent)
