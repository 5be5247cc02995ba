"""Eight devices, no silent broadcasting, what is slow, figures that are only reported, parity tests."""

import atexit
import collections
import importlib.util
import os
import pathlib
import shutil
import tempfile
import types

# Before JAX is imported: eight devices stand in for chips. A mesh takes the first n.
# XLA aborts the process where one of them waits longer than 40 s for the others, which on a busy
# machine of two cores means nothing.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test has compiled, others and the commands that they start take from there: the first process
# makes the folder, pytest's workers inherit it, and it goes with the first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxnets-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
# A folder for each worker: an entry that another is still writing would be a warning, so an error.
os.environ["JAX_COMPILATION_CACHE_DIR"] += os.sep + os.environ.get("PYTEST_XDIST_WORKER", "main")
# Nor is what a test is told something that the user has been told.
os.environ["JAXNETS_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"]

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SLOW = pathlib.Path(__file__).with_name("slow.txt")  # the names of those tests
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("parity") and not HAS_TORCH:
        pytest.skip("PyTorch is not installed")


def pytest_addoption(parser):
    parser.addoption(
        "--write-slow",
        type=float,
        metavar="SECONDS",
        help="write in tests/slow.txt which tests of this run took longer; its other names stay",
    )


@pytest.hookimpl(tryfirst=True)  # before those are left out that -m doesn't want
def pytest_collection_modifyitems(items):
    slow = set(SLOW.read_text("utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("parity"):
            item.user_properties.append(("parity", True))


def pytest_terminal_summary(terminalreporter):
    skipped, passed = (
        sum(("parity", True) in map(tuple, report.user_properties) for report in reports)
        for reports in (
            terminalreporter.stats.get("skipped", []),
            terminalreporter.stats.get("passed", []),
        )
    )
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "figure":
                terminalreporter.write_line(value)
    terminalreporter.write_line(f"parity tests skipped: {skipped}, passed: {passed}")
    least = terminalreporter.config.getoption("--write-slow")
    if least is not None:
        seconds = collections.Counter()
        for reports in terminalreporter.stats.values():
            for report in reports:
                if isinstance(report, pytest.TestReport):
                    seconds[report.nodeid] += report.duration
        slow = {name for name, took in seconds.items() if took > least}
        others = set(SLOW.read_text("utf-8").splitlines()) - set(seconds)
        SLOW.write_text("".join(f"{name}\n" for name in sorted(slow | others)), "utf-8")
        terminalreporter.write_line(f"{len(slow)} of these tests took over {least} s: {SLOW}")


@pytest.fixture
def x64():
    """Float64 while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def sleeps(monkeypatch):
    """A clock for locks that only sleeping moves; after each sleep the next of its events happens."""
    from jaxnets.train import folder_lock

    found = types.SimpleNamespace(now=1000.0, events=[])

    def sleep(seconds):
        found.now += seconds
        if found.events:
            found.events.pop(0)()

    found.monotonic, found.sleep = lambda: found.now, sleep
    monkeypatch.setattr(folder_lock, "time", found)
    return found
