"""Folders and files of an object store, gs://bucket/path, used as `pathlib.Path`s are.

There are objects, with names; a folder is what the names of some objects begin with, and is there as
long as one is. An object is written whole, in one request, or not at all: there is nothing to rename and
nothing to sync. What is listed or read is what was written last, by whichever host.

gcsfs is the client, for credentials and for repeated tries, and is imported when the first path is used.
"""

import base64
import contextlib
import errno
import fnmatch
import functools
import hashlib
import io
import logging
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

from jaxnets import errors

_SCHEME = "gs://"
_SILENT_S = 60.0  # until a connection without an answer is given up, and tried again
_TOLD_S = 5.0  # until a user who waits for the first answer of all is told what for
_answered = threading.Event()


def as_path(place: "str | os.PathLike[str] | ObjectPath") -> Path:
    """A path on the disk, or of a store if it begins with gs://.

    Raises:
        ConfigError: if it is of another store, or has no bucket.
    """
    if isinstance(place, ObjectPath):
        return cast(Path, place)
    text = os.fspath(place)
    # `Path` makes one slash of two.
    found = re.match(r"(\w+(?=://)|gs|s3|az|hf|https?):/+([^/]*)/*(.*)", text)
    if found is None:
        return Path(text)
    if found[1] != "gs":
        raise errors.ConfigError(f"{text}: of object stores only gs:// is known")
    if len(found[2]) < 3:
        raise errors.ConfigError(f"{text} names no bucket; write gs://BUCKET/FOLDER")
    # It has what of a Path is used here, and everything else takes it for one.
    return cast(Path, ObjectPath(found[2], re.sub("/+", "/", found[3]).strip("/")))


def is_remote(path: Any) -> bool:
    """Whether a path is one of a store."""
    return isinstance(path, ObjectPath)


@functools.total_ordering
class ObjectPath:
    """The part of `pathlib.Path` that run folders need, and what only a store has.

    Args:
        bucket: its name.
        key: of the object or folder, without a slash at either end; "" is the bucket itself.
        limit_s: how long a call may take in seconds, all tries together; None for as long as the client
            tries. It isn't handed on to other paths.

    Every method that asks the store raises OSError: FileNotFoundError, PermissionError, or one with what
    the store said after several tries.
    """

    def __init__(self, bucket: str, key: str, *, limit_s: float | None = None):
        self.bucket, self.key, self._limit_s = bucket, key, limit_s

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectPath('{self}')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __lt__(self, other: "ObjectPath") -> bool:
        return self.parts < other.parts

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: "str | PurePosixPath") -> "ObjectPath":
        return ObjectPath(self.bucket, f"{self.key}/{name}".strip("/"))

    def within(self, limit_s: float) -> "ObjectPath":
        """The same object, of which each call ends within so many seconds."""
        return ObjectPath(self.bucket, self.key, limit_s=limit_s)

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.key.rpartition("/")[2]

    @property
    def parts(self) -> tuple[str, ...]:
        """The bucket, and what slashes part in the key."""
        return (self.bucket, *filter(None, self.key.split("/")))

    @property
    def parent(self) -> "ObjectPath":
        """The folder; of a bucket the bucket."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "ObjectPath":
        """Another name in the same folder."""
        return self.parent / name

    def relative_to(self, folder: "ObjectPath") -> PurePosixPath:
        """The path from a folder above."""
        return PurePosixPath(str(self)).relative_to(PurePosixPath(str(folder)))

    def absolute(self) -> "ObjectPath":
        """Itself."""
        return self

    expanduser = absolute

    def as_posix(self) -> str:
        """The whole name."""
        return str(self)

    def is_symlink(self) -> bool:
        """False."""
        return False

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with the first object in it."""

    def rmdir(self) -> None:
        """Nothing: a folder goes with the last object in it."""

    def touch(self) -> None:
        """Write an empty object."""
        self.write(b"")

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return bool(self.key) and self.info() is not None

    def is_dir(self) -> bool:
        """Whether there is an object in it."""
        return next(self._listed(limit=1), None) is not None

    def exists(self) -> bool:
        """Whether it is either."""
        return self.is_file() or self.is_dir()

    def stat(self) -> os.stat_result:
        """Kind, and size in bytes."""
        found = self.info() if self.key else None
        if found is None and not self.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        kind = stat.S_IFDIR if found is None else stat.S_IFREG
        size = int(found["size"]) if found else 0
        return os.stat_result((kind, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Objects and folders in a folder."""
        for name in self._listed(delimiter="/"):
            if name != self._prefix:
                yield ObjectPath(self.bucket, name.rstrip("/"))

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """What matches, folder by folder; ** is not known."""
        first, _, rest = pattern.partition("/")
        is_plain = not set("*?[") & set(first)
        for path in [self / first] if is_plain else self.iterdir():
            if is_plain or fnmatch.fnmatchcase(path.name, first):
                if rest:
                    yield from path.glob(rest)
                elif not is_plain or path.exists():
                    yield path

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        """All objects for "*"; nothing for "*/", since no folder is a thing of its own."""
        assert pattern in ("*", "*/")
        for name in self._listed() if pattern == "*" else ():
            if not name.endswith("/"):
                yield ObjectPath(self.bucket, name)

    def objects(self) -> dict[str, dict[str, Any]]:
        """What the store says of every object in a folder, by its path in it."""
        found = self._pages(prefix=self._prefix)
        items = (item for page in found for item in page.get("items", ()))
        return {x["name"].removeprefix(self._prefix): x for x in items if not x["name"].endswith("/")}

    def open(self, mode: str = "r", **_: Any) -> Any:
        """A file in memory: read from the store at once, or written to it at the end."""
        if mode in ("r", "rb"):
            content = self.read_bytes()
            return io.BytesIO(content) if mode == "rb" else io.StringIO(content.decode())
        if mode != "wb":
            raise ValueError(f"an object can't be opened for {mode!r}")
        return _Writer(self)

    def read_text(self) -> str:
        """The content as UTF-8."""
        return self.read_bytes().decode()

    def read_bytes(
        self, start: int = 0, size: int | None = None, *, generation: int | None = None
    ) -> bytes:
        """The content, or a part of it.

        Args:
            start: of the part, in bytes.
            size: of the part; None is all from there on, which only a whole object can be.
            generation: of the object; another one is not found. None is the newest.
        """
        part: dict[str, Any] = (
            {} if size is None else {"headers": {"Range": f"bytes={start}-{start + size - 1}"}}
        )
        part["generation"] = _number(generation)
        return self._call("GET", "b/{}/o/{}", alt="media", **part)[1]

    def write(self, content: bytes, *, generation: int | None = None) -> int:
        """Write the object, whole.

        Args:
            content: of it.
            generation: which it must have now, 0 if it mustn't be there; None if that doesn't matter.

        Returns:
            the new generation.

        Raises:
            FileExistsError: if it has another one.
        """
        url = _store().base.replace("/storage/", "/upload/storage/") + "b/{}/o"
        options = {"uploadType": "media", "name": self.key, "json_out": True}
        options |= {"headers": {"Content-Type": "application/octet-stream"}, "data": content}
        found = self._call("POST", url, ifGenerationMatch=_number(generation), **options)
        if int(found["size"]) != len(content) or found.get("md5Hash", md5(content)) != md5(content):
            raise OSError(errno.EREMOTEIO, "what arrived is not what was sent", str(self))
        return int(found["generation"])

    def info(self) -> dict[str, Any] | None:
        """What the store says of the object ("size", "generation", "updated", ...), or None."""
        try:
            return self._call("GET", "b/{}/o/{}", json_out=True)
        except FileNotFoundError:
            return None

    def unlink(self, missing_ok: bool = False, *, generation: int | None = None) -> None:
        """Delete the object; FileExistsError if it has another generation than that."""
        try:
            self._call("DELETE", "b/{}/o/{}", ifGenerationMatch=_number(generation))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def copy(self, target: "ObjectPath") -> None:
        """Copy the object, within the store."""
        token, path = None, "b/{}/o/{}/rewriteTo/b/{}/o/{}"
        names = (target.bucket, target.key)
        while True:  # a large one takes several calls
            found = self._call("POST", path, *names, json_out=True, rewriteToken=token)
            if found.get("done", True):
                return
            token = found["rewriteToken"]

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _listed(self, *, delimiter: str | None = None, limit: int | None = None) -> Iterator[str]:
        """Names in a folder, in order; with a delimiter those of folders end with it."""
        for page in self._pages(prefix=self._prefix, delimiter=delimiter, maxResults=_number(limit)):
            yield from sorted([x["name"] for x in page.get("items", ())] + page.get("prefixes", []))

    def _pages(self, **options: Any) -> Iterator[dict[str, Any]]:
        token = None
        while True:
            page = self._call("GET", "b/{}/o", pageToken=token, json_out=True, **options)
            yield page
            if not (token := page.get("nextPageToken")):
                return

    def _call(self, method: str, path: str, *names: str, **options: Any) -> Any:
        given = (self.bucket, self.key)[: path.count("{}")]
        try:
            return _call(self._limit_s, method, path, *given, *names, **options)
        except FileNotFoundError:
            why = "no such object, or no such bucket"
            if not path.endswith("o/{}"):
                why = f"there is no bucket {self.bucket}"
            raise FileNotFoundError(errno.ENOENT, why, str(self)) from None
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, "somebody else has written it", str(self)) from None
        except TimeoutError:
            why = f"no answer within {self._limit_s:g} s" if self._limit_s else "no answer"
            raise OSError(errno.EREMOTEIO, why, str(self)) from None
        except OSError as error:
            if not str(error).startswith("Forbidden"):
                raise _failed(self, error) from error
            why = f"the store refuses it: {str(error).splitlines()[-1]}"
            raise PermissionError(errno.EACCES, why, str(self)) from None
        except errors.UserError:
            raise
        except Exception as error:  # of aiohttp, requests, google.auth and gcsfs
            raise _failed(self, error) from error


class _Writer(io.BytesIO):
    """A file in memory that becomes an object when it is closed, unless an error ends its block."""

    def __init__(self, path: ObjectPath):
        super().__init__()
        self._path = path

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            super().close()
        self.close()

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._path.write(content)


def md5(content: bytes) -> str:
    """A digest as the store gives it."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def _number(value: int | None) -> str | None:
    return None if value is None else str(value)


def _failed(path: ObjectPath, error: BaseException) -> OSError:
    code = getattr(error, "code", None)
    line = (str(error).strip().splitlines() or [""])[0][:200]
    line = line or type(error).__name__
    return OSError(errno.EREMOTEIO, f"the store answers {code}: {line}" if code else line, str(path))


def _call(limit_s: float | None, *args: Any, **options: Any) -> Any:
    store = _store()
    from fsspec.asyn import sync

    with contextlib.nullcontext() if _answered.is_set() else _told_of_silence(store.base):
        return sync(store.loop, store._call, *args, timeout=limit_s, **options)


@contextlib.contextmanager
def _told_of_silence(url: str) -> Iterator[None]:
    """Say what is waited for: without a network it is a minute until the client gives up."""
    line = f"waiting for an answer of the object store at {url.partition('/storage')[0]}"
    timer = threading.Timer(_TOLD_S, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
        _answered.set()
    finally:
        timer.cancel()


@functools.cache
def _store() -> Any:
    """The client, once for the process."""
    try:
        import aiohttp
        import fsspec.config
        import gcsfs.core
    except ImportError:
        raise errors.ConfigError("gs:// needs gcsfs: pip install 'jaxnets[gcs]'") from None
    for name in ("gcsfs.retry", "gcsfs"):  # what is logged there is raised too, and told in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Orbax lists folders by a client of its own, which mustn't remember what another host has changed.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    limit = aiohttp.ClientTimeout(total=None, sock_connect=_SILENT_S, sock_read=_SILENT_S)
    return gcsfs.core.GCSFileSystem(requests_timeout=limit, skip_instance_cache=True)
