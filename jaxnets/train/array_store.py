"""The arrays of a checkpoint on the disk: the only place that knows Orbax.

Of several processes each writes its own part. They wait for one another within Orbax, at the barriers of
the coordinator; one that fails must let the others go, or they would wait for minutes.
"""

import asyncio
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxnets.train import hosts
from jaxnets.typing import PyTree

# Where Orbax's processes wait for one another in a save, once it has begun.
_BARRIERS_OF_A_SAVE = (
    "create_directory:post",
    "save_and_finalize_{id}_commit_complete",
    "save_and_finalize_{id}_finalize_complete",
    "save_checkpointables_async:finalize",
)
_BARRIERS_OF_A_LOAD = ("_load_impl",)


def prepare() -> None:
    """Import Orbax, which takes a while: when it is first needed, and not in a thread."""
    _orbax()


def begin_save(folder: Path, tree: PyTree) -> Callable[[], None]:
    """Begin to write arrays; what is returned does the rest, or raises what went wrong.

    With several processes Orbax begins with collectives of the devices. In a thread they would meet the
    step's in another order on another host, and all would wait for ever: so they run here. The rest may
    run in a thread.

    Args:
        folder: not there yet; the one above it is.
        tree: of arrays, global ones if there are several processes. They mustn't be used up.
    """

    def begin() -> Any:
        return _orbax().save_async(str(folder), tree)

    if hosts.count() == 1:  # no collectives, and less to wait for here
        return lambda: begin().result()
    try:
        response = begin()
    except Exception as error:
        caught = error

        def fail() -> None:
            _release_others(_BARRIERS_OF_A_SAVE)
            raise caught

        return fail

    def end() -> None:
        try:
            response.result()
        except Exception:
            _release_others(_BARRIERS_OF_A_SAVE)
            raise

    return end


def load(folder: Path, abstract: PyTree) -> PyTree:
    """Read arrays, to where `abstract` says."""
    try:
        return _orbax().load(str(folder), abstract)
    except Exception:
        _release_others(_BARRIERS_OF_A_LOAD)
        raise


def own_files(folder: Path) -> list[Path]:
    """The files that this process vouches for: those that were written in its name.

    The first one vouches for the rest. So each reads what it still has in memory.
    """

    def owner(path: Path) -> int:
        numbers = [re.fullmatch(r"(?:ocdbt\.)?process_(\d+)", part) for part in path.parts]
        return next((int(found[1]) for found in numbers if found), 0)

    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in paths if owner(path.relative_to(folder)) == hosts.index()]


def _release_others(barriers: tuple[str, ...]) -> None:
    """Come to every barrier at which others may wait; what failed here they are told afterwards.

    One who hasn't come to a barrier yet finds it failed.
    """
    if hosts.count() == 1:
        return
    from orbax.checkpoint._src.futures import future, synchronization

    operation = synchronization.OperationIdGenerator.get_current_operation_id()
    if hosts.is_first():
        signals = synchronization.HandlerAwaitableSignal
        made = [signals.STEP_DIRECTORY_CREATION, signals.ITEM_DIRECTORY_CREATION]
        future.set_signals(made, operation_id=operation)
    sync = _orbax().multihost.sync_global_processes
    for barrier in barriers:
        with contextlib.suppress(Exception):
            asyncio.run(sync(barrier.format(id=operation), operation_id=operation, timeout=1))


def _orbax() -> Any:
    from orbax.checkpoint import v1

    return v1
