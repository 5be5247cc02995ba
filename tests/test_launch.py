"""The launcher, with small programs in place of experiments, and what happens when anyone dies."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxnets import errors, launch
from jaxnets.__main__ import main
from jaxnets.train import watchdog

ROOT = Path(launch.__file__).parents[1]
LAUNCH = """
import sys
from jaxnets import launch
launch._KILL_S = 0.5
options = eval(sys.argv[2])
sys.exit(launch.launch(["python", "-u", *sys.argv[3:]], int(sys.argv[1]), settle_s=0.5, **options))
"""
CHILD = """
import os, signal, sys, time
index = int(sys.argv[-1])
print("pid", os.getpid(), flush=True)
"""


class Launcher:
    """A launcher in a process, and a group, of its own."""

    def __init__(self, script, num_processes=2, command=None, **options):
        words = command or ["-c", LAUNCH, str(num_processes), repr(options), "-c", CHILD + script]
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.out = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        for pid in self.pids():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    def pids(self):
        return [int(pid) for pid in re.findall(r"\[\d\] pid (\d+)", self.out)]

    def read_until(self, text, count):
        while self.out.count(text) < count:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.out += line

    def end(self):
        out, err = self.process.communicate(timeout=60)
        self.out += out
        return self.process.returncode, sorted(self.out.splitlines()), err


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def has_ended(pids, seconds=20.0):
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def test_each_process_is_told_who_it_is():
    script = (
        "print(*sys.argv[1:]); print('half a line', end='', file=sys.stderr); sys.exit(4 * (index == 1))"
    )
    with Launcher(script, 3) as launcher:
        status, out, err = launcher.end()
    assert status == 4
    told = [re.sub(r"127\.0\.0\.1:\d+", "HERE", line) for line in out if "pid" not in line]
    flags = "--coordinator HERE --num-processes 3 --process-id"
    assert told == [f"[{i}] {flags} {i}" for i in range(3)]
    assert len({line.split()[2] for line in out if "coordinator" in line}) == 1
    for i in range(3):
        assert f"[{i}] half a line\n" in err


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("sys.exit(3)", 3, "process 1 ended with 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 5)", 167, "process 1 was killed by signal 39"),
    ],
)
def test_one_that_fails_ends_the_others(how, status, said, tmp_path):
    """Also one that doesn't listen to SIGTERM."""
    script = f"""
def told(*_):
    print("told", flush=True)
    if index == 0:
        sys.exit(9)
signal.signal(signal.SIGTERM, told)
open(f"{tmp_path}/{{index}}", "w").close()
while index == 1:
    time.sleep(0.01)
    if len(os.listdir("{tmp_path}")) == 3:
        {how}
while True:
    time.sleep(1)
"""
    with Launcher(script, 3) as launcher:
        found, out, err = launcher.end()
        assert found == status
        assert f"launch: {said}; the others have 0.5 s to end\n" in err
        assert err.splitlines()[-1] == f"launch: {said} first; the run ended with {status}"
        assert [line for line in out if "told" in line] == ["[0] told", "[2] told"]
        assert not any(map(is_alive, launcher.pids()))


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_reaches_each_process_once(number, name):
    """Though Ctrl-C is for the launcher's whole group; and the second one too."""
    script = f"""
count = 0
def told(*_):
    global count
    count += 1
    print("told", count, flush=True)
signal.signal({int(number)}, told)
print("ready", flush=True)
while not count:
    time.sleep(0.01)
time.sleep(0.3)
print("so far", count, flush=True)
while count < 2:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(143)
"""
    with Launcher(script) as launcher:
        launcher.read_until("ready", 2)
        os.killpg(launcher.process.pid, number)
        launcher.read_until("so far 1", 2)
        os.killpg(launcher.process.pid, number)
        status, out, err = launcher.end()
    assert status == 128 + number
    assert [line for line in out if "told" in line] == [
        f"[{i}] told {n}" for i in (0, 1) for n in (1, 2)
    ]
    assert err == f"launch: stopped by {name}\n"


def test_who_does_not_end_after_a_second_signal_is_killed():
    script = """
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
    with Launcher(script) as launcher:
        launcher.read_until("ready", 2)
        for _ in range(2):
            launcher.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        status, _, _ = launcher.end()
        assert status == 128 + signal.SIGKILL
        assert not any(map(is_alive, launcher.pids()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_no_process_outlives_a_launcher_that_is_killed():
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    with Launcher(script) as launcher:
        launcher.read_until("ready", 2)
        pids = launcher.pids()
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        launcher.process.kill()
        assert has_ended(pids)


def test_processes_find_one_another(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from jaxnets.train import hosts\n"
        "words = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "hosts.join(words['--coordinator'], int(words['--num-processes']), int(words['--process-id']))\n"
        "import jax\n"
        "print(jax.default_backend(), jax.local_device_count(), jax.device_count(), hosts.index())\n"
        "hosts.barrier('end')\n"
    )
    flags = ["--num-processes", "2", "--devices-per-process", "3"]
    command = ["-m", "jaxnets", "launch", *flags, "--", sys.executable, str(script)]
    with Launcher("", command=command) as launcher:
        status, out, err = launcher.end()
    assert status == 0, err
    assert out == ["[0] cpu 3 6 0", "[1] cpu 3 6 1"]


@pytest.mark.parametrize(
    ("how", "tries", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, 137),
        ("os.kill(os.getpid(), signal.SIGABRT)", 3, 134),
        (f"sys.exit({watchdog.EXIT})", 3, 70),
        ("sys.exit(1)", 1, 1),
        ("sys.exit(2)", 1, 2),
        ("sys.exit(143)", 1, 143),
        ("os.kill(os.getpid(), signal.SIGTERM)", 1, 143),
    ],
)
def test_what_is_started_again(how, tries, status):
    """A kill, an abort or a hang, not a mistake nor who was told to stop; and not for ever."""
    with Launcher(f"{how} if index else time.sleep(0.05)", restarts=2) as launcher:
        found, _, err = launcher.end()
    assert found == status
    assert len(re.findall(r"\[1\] pid", launcher.out)) == tries  # the other may not have come so far
    lines = [line for line in err.splitlines() if "first" in line]
    assert [re.search(r"restart \d of 2|ended with \d+$", line)[0] for line in lines] == [
        *(f"restart {i} of 2" for i in range(1, tries)),
        f"ended with {status}",
    ]


def test_a_restart_that_ends_well(tmp_path):
    script = f"""
path = "{tmp_path}/killed"
if index == 1 and not os.path.exists(path):
    open(path, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
print(*sys.argv[1:3])
"""
    with Launcher(script, restarts=5) as launcher:
        status, out, err = launcher.end()
    assert status == 0, err
    said = "process 1 was killed by SIGKILL first; all are started again, restart 1 of 5"
    assert err.splitlines()[-1] == f"launch: {said}"
    (met,) = (line for line in out if line.startswith("[1] --coordinator"))
    assert met.replace("[1]", "[0]") in out


def test_who_is_told_to_stop_is_not_started_again():
    """Even if it is killed by then."""
    script = """
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
print("ready", flush=True)
time.sleep(600)
"""
    with Launcher(script, restarts=5) as launcher:
        launcher.read_until("ready", 2)
        launcher.process.send_signal(signal.SIGTERM)
        status, out, _ = launcher.end()
    assert status == 137
    assert sum("ready" in line for line in out) == 2


def test_the_cause_comes_before_what_follows_from_it():
    """Whichever is looked at first, and though it dies between two looks."""

    class Child:
        def __init__(self, *codes):
            self.codes = list(codes)

        def poll(self):
            return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]

    follows = [Child(1), Child(-signal.SIGABRT), Child(0), Child(None)]
    killed = Child(None, -signal.SIGKILL)
    ended = launch._ended(dict(enumerate([killed, *follows])))
    assert ended == [(0, -9), (2, -6), (1, 1), (3, 0)]


def test_what_libraries_say_of_connections_is_left_out():
    lines = [
        "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1",
        "I1128 08:47:55.598991    7540 distributed.py:149] Starting JAX distributed service",
        "E1128 08:47:55.598991    7540 agent.cc:289] Polled an error from coordination service",
        "W1128 08:47:55.598991    7540 preemption_notifier.cc:89] SIGTERM caught at 2026-11-28",
        "E1128 08:47:55.598991    7540 preemption_notifier.cc:89] Error from preemption notifier",
        "W1128 08:47:55.598991    7540 agent.cc:289] careful",
        "It is well",
    ]
    for verbose, shown in ((False, [lines[2], *lines[4:]]), (True, lines)):
        script = f"[print(line, file=sys.stderr) for line in {lines}]"
        with Launcher(script, 1, verbose=verbose) as launcher:
            status, _, err = launcher.end()
        assert (status, err.splitlines()) == (0, [f"[0] {line}" for line in shown])


def test_python_is_the_one_that_launches(tmp_path, monkeypatch):
    """As `.venv/bin/python -m jaxnets launch ... -- python -m ...` without activating it."""
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 9\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = "import sys; print(sys.executable)"
    words = ["-m", "jaxnets", "launch", "--num-processes", "1", "--", "python", "-c", script]
    with Launcher("", command=words) as launcher:
        status, out, err = launcher.end()
    assert (status, out) == (0, [f"[0] {sys.executable}"]), err
    assert launch.launch([str(other)], 1) == 9


def test_a_launch_without_its_two_dashes(capsys):
    for words in (["--num-processes", "2", "python", "x.py"], ["--num-processes", "2"], []):
        assert main(["launch", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            "error: what to launch comes after --, as in: launch --num-processes 2 -- "
        )
        assert said.count("\n") == 1


def test_what_cannot_be_launched():
    for command, arguments, message in (
        ([], {"num_processes": 2}, "what to launch"),
        (["ls"], {"num_processes": 0}, "num_processes is 0; it must be at least 1"),
        (["ls"], {"num_processes": 1, "devices_per_process": 0}, "devices_per_process is 0"),
        (["ls"], {"num_processes": 1, "restarts": -1}, "restarts is -1; it must be at least 0"),
        (["ls", "--no-resume"], {"num_processes": 1, "restarts": 1}, "--no-resume begins anew"),
        (["no-such-program"], {"num_processes": 1}, "there is no program no-such-program"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            launch.launch(command, **arguments)
