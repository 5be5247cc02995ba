"""Compiled programs on the disk, so that the next start need not compile them again.

JAX keeps and finds them; here is where they lie, whether that place can be trusted (an entry is machine
code, which is run), that it doesn't grow without end, and what a run took from it. JAX's key to an entry
covers the program, the versions of JAX's libraries, the devices, XLA's flags and the compiler's options.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jaxlib.version import __version__ as jaxlib_version

from jaxnets import errors
from jaxnets.ops import onednn
from jaxnets.remote import as_path, is_remote
from jaxnets.train import hosts

FOLDER = "~/.cache/jaxnets/xla"
_lock = threading.RLock()
MAX_BYTES = 2**30  # of all entries in a folder, before a run
_ENTRY = re.compile(r".+-[0-9a-f]{64}-cache")
_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.S
)
_OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@dataclasses.dataclass
class Uses:
    """What was taken from the cache.

    Attributes:
        folder: where the entries lie; None without a cache.
        requests: programs that were asked of it.
        hits: those that it had.
    """

    folder: Path | None = None
    requests: int = 0
    hits: int = 0

    @property
    def misses(self) -> int:
        """Programs that had to be compiled."""
        return self.requests - self.hits

    def to_json(self) -> dict[str, Any] | None:
        """For the record; None without a cache."""
        if self.folder is None:
            return None
        return {"hits": self.hits, "misses": self.misses, "folder": str(self.folder)}


@contextmanager
def opened(folder: Path | None = None, *, use: bool = True) -> Iterator[Uses]:
    """Keep compiled programs while this is open; JAX's options are as before afterwards.

    A folder that can't be used is a warning, and all is compiled. A damaged entry is a warning, is
    deleted, and is compiled again.

    Args:
        folder: where; by default that of JAX's own option, if the user has set it, with the user's
            thresholds, and otherwise `~/.cache/jaxnets/xla`, or nowhere with several processes.
        use: false to compile everything. JAX's own switch turns the cache off as well.

    Yields:
        what is taken from it, counted while this is open.

    Raises:
        ConfigError: if the folder is one of an object store.
    """
    changes: dict[str, Any] = {}
    used = mine = None
    if not use:
        changes["jax_enable_compilation_cache"] = False
    elif not _option("jax_enable_compilation_cache"):
        pass
    elif folder is None and _option("jax_compilation_cache_dir"):
        used = Path(_option("jax_compilation_cache_dir"))
    elif folder is None and hosts.count() > 1:
        # JAX keeps what the first process compiles alone: at the next start the others would compile
        # while it waits for them in its first step, on a CPU for 30 s at most.
        changes["jax_enable_compilation_cache"] = False
    elif folder is not None and is_remote(as_path(folder)):
        raise errors.ConfigError(f"compiled programs are kept on a disk, not in {folder}")
    else:
        used = mine = _prepared(Path(FOLDER) if folder is None else folder)
        # Without a folder of ours none is used: one in JAX's option isn't what was asked for.
        changes = {"jax_compilation_cache_dir": str(mine) if mine else None, **_OPTIONS}
    uses = Uses(used)

    def count(event: str, **_: Any) -> None:
        uses.requests += event == "/jax/compilation_cache/compile_requests_use_cache"
        uses.hits += event == "/jax/compilation_cache/cache_hits"

    before = {name: _option(name) for name in changes}
    with contextlib.ExitStack() as stack:
        if used:
            onednn.forget()
        if changes:
            _set(changes)
            stack.callback(_set, before)
        if mine:
            stack.enter_context(_mending(mine))
        if used:
            jax.monitoring.register_event_listener(count)
            stack.callback(jax.monitoring.unregister_event_listener, count)
        yield uses


@contextmanager
def closed() -> Iterator[None]:
    """Neither look for programs nor keep them while this is open; one thread at a time has it open."""
    name = "jax_enable_compilation_cache"
    with _lock, onednn.unkept():
        before = _option(name)
        _set({name: False})
        try:
            yield
        finally:
            _set({name: before})


def _prepared(root: Path) -> Path | None:
    """The part of the folder that is this machine's, made and found fit; None if it isn't."""
    try:
        root = root.expanduser().absolute()
        part = root / machine()
        for path in (root, part):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.stat()
            if found.st_uid != os.geteuid():
                raise PermissionError(0, f"{path} is another user's")
            if stat.S_IMODE(found.st_mode) & 0o022:
                raise PermissionError(0, f"others may write into {path}")
        if not os.access(part, os.W_OK | os.X_OK):
            raise PermissionError(0, f"{part} can't be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        why = getattr(error, "strerror", None) or error
        warnings.warn(f"compiled programs are not kept in {root}: {why}", UserWarning, stacklevel=2)
        return None
    with contextlib.suppress(OSError):
        prune(root, MAX_BYTES)
    return part


@functools.cache
def machine() -> str:
    """A name for machines that can run each other's programs: jaxlib's version, and the CPU's features.

    XLA compiles for the CPU that it finds, and a home folder may be shared by several kinds.
    """
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        lines = (line.partition(":") for line in first.splitlines())
        cpu += repr([(name.strip(), value) for name, _, value in lines if name.strip() in wanted])
    digest = hashlib.sha256(cpu.encode()).hexdigest()[:12]
    return f"{jaxlib_version}-{platform.machine()}-{digest}"


def prune(folder: Path, max_bytes: int) -> None:
    """Delete the entries that were used longest ago, of all machines, if there are too many.

    When an entry was last read is known as well as the file system records it, which for many is to a
    day.

    Args:
        folder: with a folder for each machine.
        max_bytes: of all entries together; if there are more, a quarter of it is made free.
    """
    entries = []
    for path in folder.glob("*/*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes as well
            found = path.stat()
            if _ENTRY.fullmatch(path.name) and stat.S_ISREG(found.st_mode):
                entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    size = sum(size for _, size, _ in entries)
    if size <= max_bytes:
        return
    for _, freed, path in sorted(entries):
        if size <= 0.75 * max_bytes:
            break
        path.unlink(missing_ok=True)
        size -= freed


@contextmanager
def _mending(folder: Path) -> Iterator[None]:
    """Say trouble with the entries once, in a line, and delete what can't be read."""
    said = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache")
        show = warnings.showwarning

        def mend(message: Any, category: Any, *rest: Any) -> None:
            found = _TROUBLE.match(str(message))
            if not found:
                show(message, category, *rest)
                return
            doing, name, why = found.groups()
            if doing == "reading":
                # JAX never writes over an entry. Which of this name it was isn't said.
                for path in folder.glob("*-cache"):
                    if path.name.startswith(f"{name}-") and _ENTRY.fullmatch(path.name):
                        with contextlib.suppress(OSError):
                            path.unlink(missing_ok=True)
                line = f"a program kept in {folder} can't be read and is compiled again: {why}"
            else:
                line = f"compiled programs can't be kept in {folder}: {why}"
            if doing not in said:
                said.add(doing)
                show(UserWarning(line.splitlines()[0]), UserWarning, *rest)

        warnings.showwarning = mend
        yield


def _option(name: str) -> Any:
    return getattr(jax.config, name)


def _set(options: dict[str, Any]) -> None:
    with _lock:  # not while another thread has the cache closed
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX looks at its options once
