"""What both sides of the duel measure of their process and their machine."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_VALUES = 5  # of the first steps, which both sides must agree on
ENDLESS = 2**40  # positions; the order goes on over any number of epochs
# Rows and columns of the matrix product that stands for the ceiling: more where there is more to busy,
# fewer where a call would take longer than this many seconds, as in a dtype that the processor lacks.
_PRODUCT_SIZE, _LARGE_PRODUCT_SIZE = 2048, 8192
_LONGEST_PRODUCT_S = 2.0
# How much smaller the first one is: large enough still that what a call takes by itself, as on a GPU,
# isn't taken for a slow product.
_FIRST_IS_SMALLER = 4
COPY_BYTES = 2**28  # read and written by the copy
_SECONDS = 0.5  # of each of the two


def best_seconds(run: Callable[[], Any]) -> float:
    """The least time of a call, over half a second of them, after one that doesn't count."""
    run()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best


def product_flops(product: Callable[[int], Callable[[], Any]], device: str) -> float:
    """Operations a second of a square matrix product on a device, "cpu" or "gpu".

    `product` makes from the number of rows a call that computes such a product and waits for it.
    """
    size = _PRODUCT_SIZE if device == "cpu" else _LARGE_PRODUCT_SIZE
    first = size // _FIRST_IS_SMALLER
    seconds = best_seconds(product(first)) * _FIRST_IS_SMALLER**3
    while seconds > _LONGEST_PRODUCT_S and size > first:
        size, seconds = size // 2, seconds / 8
    return 2 * size**3 / best_seconds(product(size))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """The most memory that this process has held."""
    # Linux hands ru_maxrss on through exec, so a child starts with the parent's; VmHWM is its own.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
