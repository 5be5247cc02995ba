"""When this process began, and how many threads it computes with."""

import contextlib
import os
import time
from pathlib import Path

from jaxnets import errors

_IMPORTED = time.perf_counter()


def process_start() -> float:
    """The time at which this process was started, in seconds of `time.perf_counter`.

    What a user waits for begins there, not with the first line of ours.
    On Linux as the system has it, to a hundredth of a second; elsewhere when this module was imported.
    """
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # The name of the program stands in brackets, and may hold some itself.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # since the machine was started
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        if age >= 0:
            return time.perf_counter() - age
    return _IMPORTED


def limit_threads(count: int | None) -> None:
    """Start JAX's backend so that XLA computes with so many threads on a CPU.

    XLA reads the number from the environment while the backend starts; afterwards the environment is as
    before. It does nothing once the backend has started.

    Args:
        count: at least 1; None for all cores, for which nothing is done.

    Raises:
        ConfigError: if the count is below 1.
    """
    if count is None:
        return
    if count < 1:
        raise errors.ConfigError(f"threads is {count}; it must be at least 1")
    import jax

    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(count)
    try:
        with contextlib.suppress(RuntimeError):  # no devices: said where they are asked for
            jax.devices()
    finally:
        if before is None:
            del os.environ["NPROC"]
        else:
            os.environ["NPROC"] = before
