"""What hangs is ended, with the stacks of all threads; real processes, stopped and killed."""

import contextlib
import re
import signal
import threading
import time

import processes
import pytest

from jaxnets import errors
from jaxnets.train.watchdog import EXIT, Watchdog

ALONE = """
import ctypes, faulthandler, os, signal, subprocess, sys, threading, time
from jaxnets.train import hosts, watchdog

def hang_here():
    threading.Event().wait()

def asleep_without_the_interpreter():
    ctypes.CDLL(None).sleep(60)

def asleep_with_the_interpreter():
    ctypes.PyDLL(None).sleep(60)

"""
SCRIPTS = {
    # name: script, status, what its stacks name
    "a step": (
        """
with watchdog.Watchdog(1, poll_s=0.1) as dog:
    dog.beat("compile")
    time.sleep(2)
    for _ in range(20):
        dog.beat("step")
        time.sleep(0.1)
    with dog.section("save"):
        time.sleep(2)
    print("none of these hung", flush=True)
    hang_here()
""",
        EXIT,
        "hang_here",
    ),
    "outside Python": (
        """
with watchdog.Watchdog(1, limits={"step": 0, "save": 1}, poll_s=0.1) as dog:
    dog.beat("step")
    time.sleep(2)
    print("none of these hung", flush=True)
    dog.around("save", asleep_without_the_interpreter)()
""",
        EXIT,
        "asleep_without_the_interpreter",
    ),
    "with the interpreter": (
        """
hosts.count = lambda: 2  # as one of several: a single one may have been stopped by Ctrl-Z
with watchdog.Watchdog(1, poll_s=0.1) as dog:
    dog.beat("compile")
    time.sleep(2)
    print("none of these hung", flush=True)
    asleep_with_the_interpreter()
""",
        1,
        "asleep_with_the_interpreter",
    ),
    "after Ctrl-Z": (
        """
with watchdog.Watchdog(1, poll_s=0.1) as dog:
    dog.beat("step")
    awake = f"sleep 3; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", awake])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    print("none of these hung", flush=True)
    hang_here()
""",
        EXIT,
        "hang_here",
    ),
}


def test_what_hangs_is_ended_and_nothing_else():
    with contextlib.ExitStack() as stack:
        children = {
            name: stack.enter_context(processes.Processes(ALONE + script, 1, joined=False))
            for name, (script, *_) in SCRIPTS.items()
        }
        for name, (_, status, function) in SCRIPTS.items():
            (ended,) = children[name].wait(60)
            assert ended.code == status, (name, ended)
            assert ended.out == "none of these hung\n", name
            assert function in ended.err, name
            if status == EXIT:
                section = "save" if "outside" in name else "step"
                line = rf"watchdog: this process has been in '{section}' for \d+ s; the limit is 1 s\."
                assert re.search(line, ended.err), (name, ended.err)


def test_sections():
    with Watchdog(100) as watchdog:
        assert sum(thread.name == "watchdog" for thread in threading.enumerate()) == 1
        watchdog.beat("step")
        with pytest.raises(ZeroDivisionError), watchdog.section("save"):
            _ = 1 / 0
        assert watchdog._now[0] == "step"  # and it begins anew
        assert time.monotonic() - watchdog._now[1] < 1
        assert watchdog.around("evaluate", lambda x, *, y: (watchdog._now[0], x, y))(1, y=2) == (
            "evaluate",
            1,
            2,
        )
    with Watchdog(0) as watchdog:
        watchdog.beat("step")
        names = [thread.name for thread in threading.enumerate()]
    time.sleep(0.1)
    assert not any(thread.name == "watchdog" for thread in threading.enumerate()), names
    for arguments in ({"limit_s": -1}, {"limits": {"save": -1.0}}):
        with pytest.raises(errors.ConfigError, match="at least 0"):
            Watchdog(**arguments)


TOGETHER = """
import sys, threading, time, traceback
from jaxnets.train import watchdog
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
x = jax.make_array_from_callback((2, 4), sharding, lambda index: np.ones((1, 4), np.float32))
step = jax.jit(lambda x: jnp.broadcast_to(x.mean(0), x.shape), out_shardings=sharding)
x = step(x)

def deadlock():
    threading.Event().wait()

try:
    with watchdog.Watchdog(LIMITS[hosts.index()], poll_s=0.1) as dog:
        print("ready", flush=True)
        for i in range(10**9):
            dog.beat("step")
            x = step(x)
            jax.block_until_ready(x)
            time.sleep(0.01)
            if i == 20 and hosts.index() == 1:
                FAULT
except Exception:
    traceback.print_exc()
    watchdog.leave(1)
"""


def together(fault="pass", limits=(100, 100), heartbeat_s=60):
    script = TOGETHER.replace("LIMITS", repr(limits)).replace("FAULT", fault)
    return processes.Processes(script, 2, devices=1, heartbeat_s=heartbeat_s)


def test_all_processes_say_what_they_were_at():
    """The second hangs; the first waits for it, and would for much longer."""
    with together("deadlock()", limits=(1000, 1)) as both:
        first, second = both.wait(60)
    assert (first.code, second.code) == (EXIT, EXIT), (first, second)
    for ended in (first, second):
        assert re.search(r"watchdog: process 1 of 2 has been in 'step' for \d+ s;", ended.err)
    assert "in deadlock" in second.err
    assert "Here, in process 0 of 2, it was 'step'. The stacks of all threads:" in first.err
    assert 'File "<string>"' in first.err.split("The stacks of all threads:")[1]


def test_an_error_of_one_process_ends_all():
    with together("raise RuntimeError('so it goes')") as both:
        first, second = both.wait(60)
    assert second.code == 1, second
    assert "RuntimeError: so it goes" in second.err
    # By the collective's own error, or by what it was told.
    assert first.code in (1, EXIT), first


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_a_stopped_process_ends_the_others(index):
    """Process 0 holds the coordinator, which is stopped with it."""
    with together(limits=(3, 3)) as both:
        for each in range(2):
            both.wait_for(each, "ready")
        time.sleep(0.5)
        both.send(index, signal.SIGSTOP)
        other = both.processes[1 - index]
        assert other.wait(30) == EXIT
        assert f"process {1 - index} of 2 has been in 'step' for" in both.written(1 - index, "err")
        # The stopped one is the scheduler's to kill; when it goes on it ends too.
        both.send(index, signal.SIGCONT)
        assert both.processes[index].wait(90) != 0


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_process_ends_the_others(index):
    """At once, long before it is taken for dead: by the collective's error, or by JAX's abort."""
    with together(heartbeat_s=100) as both:
        for each in range(2):
            both.wait_for(each, "ready")
        time.sleep(0.5)
        both.send(index, signal.SIGKILL)
        assert both.processes[1 - index].wait(50) in ((1, -signal.SIGABRT) if index == 0 else (1,))
