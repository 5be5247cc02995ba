import platform
import subprocess
import sys

import pytest

# Asks for 64 MiB again and again and counts the page faults after the first rounds.
CODE = """
import resource, sys
import numpy as np
from jaxnets.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for i in range(12):
    if i == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = np.empty(2**23)
    x[::128] = 1
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    run = [sys.executable, "-c", CODE, how]
    return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_pages_stay_where_freed_memory_is_kept():
    assert page_faults("returned") >= 8  # huge pages or small ones: each round has its own
    assert page_faults("kept") < 4


def test_another_c_library_is_left_alone(monkeypatch):
    from jaxnets import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert not allocator.keep_freed_memory()
