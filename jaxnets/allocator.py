"""The C library's allocator, told to keep what is freed.

XLA on a CPU and PyTorch ask for the memory of intermediate results anew at every step. glibc hands large
blocks back to the system at once, so every step has its pages mapped and zeroed again: a hundred
thousand page faults a second were seen, and SpeedNet's step took 12 % longer. Kept, the memory of a step
is that of the step before. The price is a process that holds its peak of memory until it ends.
"""

import contextlib
import ctypes
import os
import platform

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = (
    (_ARENA_MAX, 1),  # other arenas map large blocks whatever the next line says
    (_MMAP_MAX, 0),
    (_TRIM_THRESHOLD, -1),  # never
    (_TOP_PAD, 2**26),  # bytes by which the heap grows at least
)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory, for the rest of the process.

    Call it before JAX or PyTorch starts threads. It does nothing where the C library is another, or
    where the user has set it up by `MALLOC_...` or `GLIBC_TUNABLES`.

    Returns:
        whether the allocator took it.
    """
    is_set_up = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if is_set_up or platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        taken = [mallopt(name, value) == 1 for name, value in _SETTINGS]
        return all(taken)
    return False


def release_freed_memory() -> None:
    """Give what is freed back to the system once; nothing where the C library isn't glibc."""
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
