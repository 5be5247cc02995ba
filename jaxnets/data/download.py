"""Fetch a file whose size and SHA-256 are known: resumed, checked, and put in place in one step.

Whatever happens, the target is either absent or whole and checked. What has arrived waits beside
it as NAME.part for the next try.
"""

import contextlib
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from jaxnets import errors
from jaxnets.data.progress import Progress, ProgressFn, reporting

if sys.platform != "win32":
    import fcntl

_CHUNK_BYTES = 1 << 18


class _TryAgain(Exception):
    """The connection broke: the rest may come on the next try."""


class _GiveUp(Exception):
    """This address won't do: try the next one."""


def download(
    urls: str | Sequence[str],
    target: Path,
    *,
    size: int,
    sha256: str,
    progress: Progress = True,
    timeout_s: float = 30.0,
    num_tries: int = 5,
    pause_s: float = 1.0,
) -> Path:
    """Download a file unless it is there, and check it before it gets its name.

    Args:
        urls: where it is, or several places with the same bytes, tried in turn.
        target: the file; its folder is made. `target.name + ".part"` holds what has arrived.
        size: its length in bytes.
        sha256: its digest, hexadecimal.
        progress: see `reporting`.
        timeout_s: how long to wait for a server that says nothing.
        num_tries: how often to go on with one address whose connection breaks.
        pause_s: before the second try; doubled before each further one.

    Returns:
        The target.

    Raises:
        DataError: if no address delivers, the bytes are not those expected, a wrong file has the
            target's name, or the folder can't be written.
    """
    urls = [urls] if isinstance(urls, str) else list(urls)
    part = target.with_name(target.name + ".part")
    with locked(target):
        if target.exists():
            if why := _mismatch(target, size, sha256):
                raise errors.DataError(f"{target}: {why}; remove it and it is downloaded again")
            return target
        failures = []
        with reporting(progress, target.name) as report:
            for url in urls:
                try:
                    _fetch(url, part, size, report, timeout_s, num_tries, pause_s)
                    if why := _mismatch(part, size, sha256):
                        part.unlink()
                        raise _GiveUp(why)
                except _GiveUp as error:
                    failures.append(f"{url} ({' '.join(str(error).split())})")
                    continue
                with writing(target.parent):
                    os.replace(part, target)
                    sync(target.parent)
                return target
    raise errors.DataError(
        f"could not download {target.name} from {', nor from '.join(failures)}: "
        f"try again, put the file into {target.parent} by hand, or give another --data-dir"
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold off other processes that want to write `path`, whose folder is made if need be.

    Raises:
        DataError: if the folder can't be written.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Closed by the `with` below; here only its opening is explained.
        lock = open(path.with_name(f".{path.name}.lock"), "ab")  # noqa: SIM115
    with lock:
        # Windows and some network file systems have no such locks: there two downloads at once
        # are unsafe, but one alone, the usual case, still works.
        with contextlib.suppress(OSError):
            _wait_for(lock, path)
        yield  # closing the file ends the lock; the file stays, since removing it would race


def _wait_for(lock: IO[bytes], path: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that writes {path}", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write in the data folder into one line that says what to do.

    Raises:
        DataError: on any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise errors.DataError(
            f"can't write in the data folder {folder} ({error.strerror or error}): "
            "give another with --data-dir or JAXNETS_DATA"
        ) from error


def sync(path: Path) -> None:
    """Make a file or a folder's list of names last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fetch(
    url: str,
    part: Path,
    size: int,
    report: ProgressFn,
    timeout_s: float,
    num_tries: int,
    pause_s: float,
) -> None:
    """Bring `part` to its full size from one address."""
    for i in range(num_tries):
        try:
            return _fetch_rest(url, part, size, report, timeout_s)
        except _TryAgain as error:
            if i == num_tries - 1:
                raise _GiveUp(f"{error}, {num_tries} times") from error
            time.sleep(pause_s * 2**i)


def _fetch_rest(url: str, part: Path, size: int, report: ProgressFn, timeout_s: float) -> None:
    """Ask once for what `part` lacks, and append it."""
    done = part.stat().st_size if part.exists() else 0
    if done > size:  # of another file
        part.unlink()
        done = 0
    if done == size:
        return
    headers = {"User-Agent": "jaxnets", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout_s
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the server has no such range: start over
            part.unlink(missing_ok=True)
            raise _TryAgain("HTTP 416") from error
        transient = error.code >= 500 or error.code in (408, 429)
        raise (_TryAgain if transient else _GiveUp)(f"HTTP {error.code}") from error
    except TimeoutError as error:
        raise _TryAgain(f"no answer in {timeout_s:g} s") from error
    except urllib.error.URLError as error:
        # No network, no such host, or nothing lets us through: trying again would only make the
        # user of a machine without a network wait.
        raise _GiveUp(f"no connection: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TryAgain(f"connection broken: {error}") from error
    with response:
        resumed = response.status == 206
        if resumed and not _starts_at(response, done):
            part.unlink(missing_ok=True)
            raise _TryAgain("the server answered with another range")
        if not resumed:  # no ranges here: the whole file from its start
            done = 0
        length = response.headers.get("Content-Length") or ""
        if length.isdecimal() and done + int(length) != size:  # before it can spoil the part
            raise _GiveUp(f"has {done + int(length):,} bytes, expected {size:,}")
        with writing(part.parent):
            file = open(part, "ab" if resumed else "wb")  # noqa: SIM115
        with file:
            _copy(response, file, done, size, report)


def _starts_at(response: http.client.HTTPResponse, done: int) -> bool:
    return (response.headers.get("Content-Range") or "").startswith(f"bytes {done}-")


def _copy(
    response: http.client.HTTPResponse, file: IO[bytes], done: int, size: int, report: ProgressFn
) -> None:
    """Append the body to the file, which has `done` of `size` bytes; on disk when it returns."""
    report(done, size)
    try:
        while done < size:
            try:
                # Not `read`: that waits for the whole chunk, and a time-out would lose what came.
                chunk = response.read1(min(_CHUNK_BYTES, size - done))
            except (OSError, http.client.HTTPException) as error:
                raise _TryAgain(f"connection broken after {done:,} bytes: {error}") from error
            if not chunk:
                raise _TryAgain(f"connection ended after {done:,} of {size:,} bytes")
            with writing(Path(file.name).parent):
                file.write(chunk)
            done += len(chunk)
            report(done, size)
    finally:  # also when interrupted: what has arrived is kept
        with writing(Path(file.name).parent):
            file.flush()
            os.fsync(file.fileno())


def digest_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mismatch(path: Path, size: int, sha256: str) -> str:
    """What is wrong with a file, or nothing."""
    found = path.stat().st_size
    if found != size:
        return f"it has {found:,} bytes, expected {size:,}"
    digest = digest_of(path)
    return "" if digest == sha256 else f"its SHA-256 is {digest}, expected {sha256}"
