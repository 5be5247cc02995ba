"""Errors that a user can mend: the command line prints them as one line, without a traceback."""

import difflib
import re
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Something given by the user is wrong; the message says what, and how to mend it."""


class ConfigError(UserError):
    """A flag, a config or a run folder that can't be used as it stands."""


class DataError(UserError):
    """A data set that is missing, damaged, or could not be downloaded."""


class CheckpointError(UserError):
    """A checkpoint that could not be written, or that can't be restored into this run."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not what was written; an earlier one may be whole."""


class NonFiniteError(UserError):
    """The loss or a gradient was NaN or infinite; nothing of that step was applied.

    Attributes:
        step: which, counted from 0 as `state.step` and the batches are; None if unknown.
        index: `[B]`, the examples of its batch, where they are known.
        state: the training state, but for its guard that from before the step; None if it isn't at hand.
    """

    def __init__(
        self, message: str, *, step: int | None = None, index: Any = None, state: Any = None
    ) -> None:
        super().__init__(message)
        self.step, self.index, self.state = step, index, state


class DeviceMemoryError(UserError):
    """A device has too little memory for the model and its batch."""


class HostError(UserError):
    """Another process of the run is gone, or doesn't answer."""


class ParityError(UserError):
    """Two implementations that should compute the same thing do not."""


def unknown(kind: str, name: str, names: Iterable[str], *, advice: str = "") -> ConfigError:
    """The error for a name that isn't there, with the nearest one that is.

    Args:
        kind: what the name should be the name of.
        name: the one that isn't there.
        names: those that are.
        advice: said in place of the whole list of names.

    Example:
        >>> str(unknown("model", "lanet", ["lenet", "mlp"]))
        "unknown model 'lanet': did you mean 'lenet'? (there are: lenet, mlp)"
    """
    names = sorted(names)
    bare = {other.lstrip("-"): other for other in names}  # dashes of flags would make all of them alike
    near = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    hint = f": did you mean {bare[near[0]]!r}?" if near else ":"
    advice = advice or f"there are: {', '.join(names)}"
    return ConfigError(f"unknown {kind} {name!r}{hint} {f'({advice})' if near else advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what XLA says when an allocation can't be had."""
    return bool(re.search(r"RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE))


def first_line(error: BaseException, *, with_file: bool = False) -> str:
    """What an error says, in one line of at most 300 characters; its class if it says nothing.

    Args:
        error: which.
        with_file: whether an OSError also names its file, which the caller's line may do already.
    """
    system = error.strerror if isinstance(error, OSError) and not with_file else None
    return system or (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def named_line(error: BaseException) -> str:
    """An error's class and what it says, in one line.

    Example:
        >>> named_line(KeyError("x")), named_line(KeyboardInterrupt())
        ("KeyError: 'x'", 'KeyboardInterrupt')
    """
    name, line = type(error).__name__, first_line(error, with_file=True)
    return name if line == name else f"{name}: {line}"
