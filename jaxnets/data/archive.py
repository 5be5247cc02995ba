"""Unpack an archive that is trusted no further than its list of expected members."""

import gzip
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from jaxnets import errors
from jaxnets.data.download import digest_of, locked, sync, writing

_DIGESTS = ".sha256"  # of the unpacked files, among them


def unpack_tar(
    archive: Path, target: Path, *, members: Mapping[str, int] | Callable[[str], int | None]
) -> Path:
    """Unpack a tar file, compressed or not, into a folder that is either absent or complete.

    Only the expected files come out; an archive with a link, or a name that leads elsewhere, is
    refused. The files go to a temporary folder beside the target, which gets its name when all of
    them are on disk, with their digests for `is_as_unpacked`.

    Args:
        archive: the tar file; check its digest first.
        target: the folder to make; every member's first component is `target.name`.
        members: the files the archive must hold, by full name, and the most bytes each may have; or a
            function that gives these bytes for a name that is wanted, and None for others.

    Returns:
        The target; one that is there already is left as it is.

    Raises:
        DataError: if the archive is damaged, lacks a member or holds anything but files and folders
            of that folder, or the folder can't be written.
    """
    return _unpack(target, lambda work: _extract(archive, work, target.name, members))


def unpack_zip(archive: Path, target: Path, *, members: Mapping[str, int]) -> Path:
    """The same for a zip file; arguments, result and errors as of `unpack_tar`."""
    return _unpack(target, lambda work: _extract_zip(archive, work, target.name, members))


def _unpack(target: Path, extract: Callable[[Path], None]) -> Path:
    """Have a folder filled beside the target, and give it the target's name when it is on disk."""
    with locked(target):
        if target.is_dir():
            return target
        prefix = f".{target.name}.unpacking-"
        with writing(target.parent):
            for left_over in target.parent.glob(f"{prefix}*"):  # of a process that was killed
                shutil.rmtree(left_over)
            work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            with writing(target.parent):
                extract(work)
                _note_digests(work / target.name)
                _sync_tree(work)
                os.rename(work / target.name, target)
                sync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _extract(
    archive: Path,
    work: Path,
    root: str,
    members: Mapping[str, int] | Callable[[str], int | None],
) -> None:
    limit_of, missing = (
        (members.get, set(members)) if isinstance(members, Mapping) else (members, set[str]())
    )
    seen = set[str]()
    try:
        with open(archive, "rb") as file, tarfile.open(fileobj=file) as tar:
            # One member at a time, each checked before its bytes are read: a hostile archive is
            # refused before it can fill the disk.
            for member in tar:
                name = _checked_name(archive, member, root)
                if member.isdir():
                    continue  # made below as the files need them
                limit = limit_of(name)
                if limit is None:
                    continue  # a readme that came with it, say: not wanted, not unpacked
                if name in seen:
                    raise errors.DataError(f"{archive}: member {name!r} is there twice")
                if member.size > limit:
                    raise errors.DataError(
                        f"{archive}: member {name!r} has {member.size:,} bytes, "
                        f"expected at most {limit:,}"
                    )
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                tar.extract(member, work, filter="data")  # a second opinion on the member
                seen.add(name)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise errors.DataError(
            f"{archive}: damaged or no tar file ({' '.join(str(error).split())}): "
            "remove it and it is downloaded again"
        ) from error
    if missing := missing - seen:
        raise errors.DataError(f"{archive}: lacks {', '.join(sorted(missing))}")


def _extract_zip(archive: Path, work: Path, root: str, members: Mapping[str, int]) -> None:
    missing = set(members)
    try:
        with zipfile.ZipFile(archive) as found:
            for member in found.infolist():
                name = _inside(archive, member.filename, root)
                if member.is_dir() or name not in members:
                    continue
                if name not in missing:
                    raise errors.DataError(f"{archive}: member {name!r} is there twice")
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                with found.open(member) as content, open(work / name, "wb") as file:
                    # No more than that is read, whatever the archive says of its size.
                    left = members[name] + 1
                    while left and (chunk := content.read(min(left, 1 << 20))):
                        file.write(chunk)
                        left -= len(chunk)
                if not left:
                    raise errors.DataError(
                        f"{archive}: member {name!r} has more than the {members[name]:,} bytes expected"
                    )
                missing.remove(name)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise errors.DataError(
            f"{archive}: damaged or no zip file ({' '.join(str(error).split())}): "
            "remove it and it is downloaded again"
        ) from error
    if missing:
        raise errors.DataError(f"{archive}: lacks {', '.join(sorted(missing))}")


def _checked_name(archive: Path, member: tarfile.TarInfo, root: str) -> str:
    """The member's name, normalised, if it is a file or folder inside the root."""
    if not (member.isreg() or member.isdir()):
        raise errors.DataError(f"{archive}: member {member.name!r} is a link or a special file")
    return _inside(archive, member.name, root)


def _inside(archive: Path, name: str, root: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise errors.DataError(f"{archive}: member {name!r} leads out of its folder")
    if path.parts[:1] not in ((), (root,)):
        raise errors.DataError(f"{archive}: member {name!r} isn't in {root}/")
    return str(path)


def is_as_unpacked(folder: Path) -> bool:
    """Whether all that `unpack_tar` or `unpack_zip` left in a folder is there still, byte for byte."""
    try:
        noted = [line.split("  ", 1) for line in (folder / _DIGESTS).read_text("utf-8").splitlines()]
        return bool(noted) and all(digest_of(folder / name) == digest for digest, name in noted)
    except (OSError, ValueError):
        return False


def _note_digests(folder: Path) -> None:
    """In the format of `sha256sum --check`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{digest_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / _DIGESTS).write_text("".join(lines), "utf-8")


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)
