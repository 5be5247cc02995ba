"""A program that ends completes what it is saving, or says why it can't."""

import contextlib
import sys
import threading
import weakref
from typing import Protocol

from jaxnets import errors


class Waits(Protocol):
    """What has something to complete, such as `Checkpoints`."""

    def wait(self) -> None:
        """Complete it, or raise a UserError."""
        ...


_open: "weakref.WeakSet[Waits]" = weakref.WeakSet()
_is_registered = False


def wait_at_exit(waits: Waits) -> None:
    """See to it that the program doesn't end within a save, or with one that failed in silence."""
    global _is_registered
    _open.add(waits)
    if not _is_registered:
        # `atexit` comes too late: by then Python starts no work in threads any more, as Orbax must.
        with contextlib.suppress(RuntimeError):  # the program is ending
            threading._register_atexit(_finish)  # pyright: ignore[reportAttributeAccessIssue]
        _is_registered = True


def _finish() -> None:
    for waits in list(_open):
        try:
            waits.wait()
        except errors.UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
