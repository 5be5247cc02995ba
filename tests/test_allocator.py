import os
import platform
import subprocess
import sys

import pytest

# Asks for 64 MiB again and again and counts the page faults after the first rounds.
CODE = """
import os, resource, sys
import numpy as np
from jaxnets.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
size = int(os.environ.get("SIZE_MIB", 64)) * 2**17
for i in range(12):
    if i == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = np.empty(size)
    x[:: 2**18] = x[:512:2] = 1
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how, **env):
    run = [sys.executable, "-c", CODE, how]
    env = os.environ | env
    return int(subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_pages_stay_where_freed_memory_is_kept():
    assert page_faults("returned") >= 8  # huge pages or small ones: each round has its own
    assert page_faults("kept") < 4
    assert page_faults("kept", SIZE_MIB="2304") < 4  # above what fits in the C type of the setting


def test_what_the_user_has_set_up_stays(monkeypatch):
    from jaxnets import allocator

    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    from jaxnets import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert not allocator.keep_freed_memory()
