"""The arrays of a checkpoint on the disk: the only place that knows Orbax.

Of several processes each writes its own part. They wait for one another within Orbax, at the barriers of
the coordinator; one that fails must let the others go, or they would wait for minutes.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxnets.train import hosts
from jaxnets.typing import PyTree

# Where Orbax's processes wait for one another, beside the collectives at the beginning of a save: names
# of the operation and of the barrier.
_BARRIERS_OF_A_SAVE = (
    ("{id}", "next_awaitable_signal_operation_id:sync"),
    ("{id}", "save_checkpointables_async:maybe_overwrite_existing:pre"),
    ("{id}", "save_checkpointables_async:maybe_overwrite_existing:post"),
    ("{id}", "create_directory:post"),
    ("{id}.state", "save_and_finalize_{id}.state_commit_complete"),
    ("{id}.state", "save_and_finalize_{id}.state_finalize_complete"),
    ("{id}", "save_checkpointables_async:finalize"),
)
_BARRIERS_OF_A_LOAD = (("{id}", "next_awaitable_signal_operation_id:sync"), ("{id}", "_load_impl"))


def prepare() -> None:
    """Import Orbax, which takes a while: when it is first needed, and not in a thread."""
    _orbax()
    logger = logging.getLogger("absl")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what Orbax logs of an error that it raises too: the user is told of that once, in a line."""
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


def begin_save(folder: Path, tree: PyTree) -> Callable[[], None]:
    """Begin to write arrays; what is returned does the rest, or raises what went wrong.

    With several processes Orbax begins with collectives of the devices. In a thread they would meet the
    step's in another order on another host, and all would wait for ever: so they run here. The rest may
    run in a thread.

    Args:
        folder: not there yet; the one above it is.
        tree: of arrays, global ones if there are several processes. They mustn't be used up. A part that
            several devices have is written from the first of them.
    """
    if hosts.count() == 1:  # no collectives, and less to wait for here
        return lambda: _save_async(folder, tree).result()
    before = _operation()
    try:
        response = _save_async(folder, tree)
    except Exception as error:
        caught = error

        def fail() -> None:
            _release_others(_BARRIERS_OF_A_SAVE, before)
            raise caught

        return fail

    def end() -> None:
        try:
            response.result()
        except Exception:
            _release_others(_BARRIERS_OF_A_SAVE[3:], before)
            raise

    return end


def load(folder: Path, abstract: PyTree, *, is_part: bool = False) -> PyTree:
    """Read arrays, to where `abstract` says.

    Args:
        folder: that was written.
        abstract: shapes, dtypes and shardings, of all arrays there.
        is_part: whether it may lack some, which are not read then.
    """
    before = _operation()
    v1 = _orbax()
    context = v1.Context()
    context.pytree.loading.partial_load = is_part
    try:
        with context:
            return v1.load(str(folder), abstract)
    except Exception:
        _release_others(_BARRIERS_OF_A_LOAD, before)
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


def _save_async(folder: Path, tree: PyTree) -> Any:
    v1 = _orbax()
    context = v1.Context()
    # Else it would cut arrays that lie on several devices, by programs of the devices.
    context.array.saving.use_replica_parallel = False
    with context:
        return v1.save_async(str(folder), tree)


def _release_others(barriers: Sequence[tuple[str, str]], before: str) -> None:
    """Come to every barrier at which others may wait; what failed here they are told afterwards.

    One who hasn't come to a barrier yet finds it failed.

    Args:
        barriers: of the operation that failed.
        before: the number of the operation before that.
    """
    if hosts.count() == 1:
        return
    from orbax.checkpoint._src.futures import synchronization

    if _operation() == before:  # it failed before it had a number, and the others have counted it
        synchronization.OperationIdGenerator.next_operation_id()
    number = _operation()
    sync = _orbax().multihost.sync_global_processes
    for operation, barrier in barriers:
        names = {"key": barrier.format(id=number), "operation_id": operation.format(id=number)}
        with contextlib.suppress(Exception):
            asyncio.run(sync(**names, timeout=1))


def _operation() -> str:
    """Which of Orbax's operations was the last: all processes must count alike."""
    from orbax.checkpoint._src.futures import synchronization

    return synchronization.OperationIdGenerator.get_current_operation_id()


def _orbax() -> Any:
    from orbax.checkpoint import v1

    return v1
