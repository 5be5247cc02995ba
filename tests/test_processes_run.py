"""Whole runs of several processes: the experiment's own command, real signals, real deaths."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import digits
from jaxnets.train import Checkpoints
from tests.train import processes as started
from tests.train.processes import _free_port

ROOT = Path(digits.__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
}
WORDS = ["--no-pictures", "--log-every", "1", "--batch-size", "64"]
MANY = 100_000  # steps: more than a test waits for


def launch(folder, *words, num_processes=2, devices=1, restarts=0, module="experiments.digits"):
    command = [sys.executable, "-m", "jaxnets", "launch", "--num-processes", str(num_processes),
               "--devices-per-process", str(devices), "--restarts", str(restarts),
               "--", "python", "-m", module, "train",
               "--run-dir", str(folder), *WORDS, *words]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def hosts(folder, words_of, *, heartbeat_s=10, num_processes=2):
    """The command as each host would run it, with words of its own."""
    address = f"127.0.0.1:{_free_port()}"
    environment = {**ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.digits", "train", *WORDS, "--coordinator", address,
             "--num-processes", str(num_processes), "--process-id", str(i), "--run-dir", str(folder),
             "--heartbeat-s", str(heartbeat_s), *words_of(i)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(num_processes)
    ]  # fmt: skip


def end(processes, timeout=120):
    """Exit codes and what was written; nobody is left behind."""
    try:
        return [(p.communicate(timeout=timeout)[0], p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for_steps(folder, count, processes, timeout=120):
    log, limit = folder / "metrics.jsonl", time.monotonic() + timeout
    while not (log.exists() and len(log.read_bytes().splitlines()) >= count):
        assert time.monotonic() < limit, "it never got on"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def rows(folder):
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.timeout(300)
def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    """In the fixed order, so that all that was measured is the same to the last bit."""
    for name, legs in {"whole": [(1, 1, "10")], "broken": [(2, 1, "4"), (1, 4, "10")]}.items():
        for num_processes, devices, steps in legs:
            process = launch(
                tmp_path / name, "--fixed-order", "4", "--steps", steps, "--eval-every", "5",
                num_processes=num_processes, devices=devices,
            )  # fmt: skip
            ((out, code),) = end([process])
            assert code == 0, out
            assert len(re.findall("everything is in", out)) == 1, out
    whole, broken = (
        [json.loads(line) for line in rows(tmp_path / n).splitlines()] for n in ("whole", "broken")
    )
    # Where the first leg ended it was evaluated.
    extra = [row for row in broken if row["step"] == 4 and "eval/count" in row]
    assert len(extra) == 1
    assert [row for row in broken if row not in extra] == whole
    result = json.loads((tmp_path / "broken" / "result.json").read_text())
    assert (result["num_processes"], result["steps"]) == (1, 10)


@pytest.mark.timeout(200)
def test_hosts_that_differ_are_refused(tmp_path):
    found = end(hosts(tmp_path / "r", lambda i: ["--seed", str(i)]))
    for out, code in found:
        assert code == 2, out
        assert "process 1 differs from process 0 in its config: seed 0 -> 1" in out
    assert not (tmp_path / "r").exists()


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_folder_of_one_host_alone_is_refused(tmp_path):
    found = end(hosts(tmp_path, lambda i: ["--run-dir", str(tmp_path / str(i))]))
    for out, code in found:
        assert code == 2, out
        assert "choose a --run-dir that all hosts share" in out
    assert not (tmp_path / "0" / "config.json").exists()


PARTIAL = """
    import os, signal
    from experiments import digits
    from jaxnets import cli
    from jaxnets.train import manifest

    write = manifest.write_manifest

    def die_before(folder, record):
        if folder.name == {killed!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, record)

    manifest.write_manifest = die_before
    sys.exit(cli.main(digits.EXPERIMENT, ["train", "--run-dir", {folder!r}, *{words!r}]))
"""


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_step_that_was_half_saved_is_passed_and_saved(tmp_path):
    """F3: what a killed save of two processes left is in the way of two processes."""
    words = [*WORDS, "--steps", "6", "--checkpoint-every", "2"]
    script = {"folder": str(tmp_path), "words": words}
    with started.Processes(PARTIAL.format(killed="00000004", **script), devices=1) as both:
        assert both.processes[0].wait(timeout=180) == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert list((folder / "00000004" / "state").iterdir())
    assert Checkpoints(folder).steps() == [2]
    first, _ = started.run(PARTIAL.format(killed="", **script), devices=1, timeout=180)
    assert "removed the unfinished checkpoint 00000004" in first.err
    assert "resuming at step 2 of 6" in first.err
    assert [Checkpoints(folder).is_whole(step) for step in (4, 6)] == [True, True]


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_host_saves_on_all(tmp_path, who):
    folder = tmp_path / "r"
    processes = hosts(folder, lambda i: ["--steps", str(MANY)])
    wait_for_steps(folder, 3, processes)
    processes[who].send_signal(signal.SIGTERM)
    found = end(processes)
    assert [code for _, code in found] == [143, 143], found
    (step,) = re.findall(r"stopped by SIGTERM after step (\d+)", found[0][0])
    assert Checkpoints(folder / "checkpoints").latest() == int(step)
    assert json.loads(rows(folder).splitlines()[-1])["step"] == int(step)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("who", [0, 1])
def test_a_host_that_dies_ends_the_others_and_the_run_goes_on(tmp_path, who):
    words = ["--steps", "400", "--checkpoint-every", "5", "--fixed-order", "4"]
    whole = end(hosts(tmp_path / "whole", lambda i: words), 300)
    assert [code for _, code in whole] == [0, 0], whole
    folder = tmp_path / "broken"
    processes = hosts(folder, lambda i: words)
    wait_for_steps(folder, 25, processes)
    processes[who].send_signal(signal.SIGKILL)
    found = end(processes)
    assert found[who][1] == -signal.SIGKILL
    assert found[1 - who][1] not in (0, None), found
    found = end(hosts(folder, lambda i: words), 300)
    assert [code for _, code in found] == [0, 0], found
    assert re.search(r"resuming at step [1-9]", found[0][0])
    assert rows(folder) == rows(tmp_path / "whole")


SUICIDE = """
import os, signal, sys, threading, time
from pathlib import Path
from jaxnets import registry

registry.register("model", "none", print)  # a plugin must register something

def watch():
    log = Path("{folder}/metrics.jsonl")
    while not (log.exists() and len(log.read_bytes().splitlines()) > 24):
        time.sleep(0.02)
    Path("{killed}").touch()
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[sys.argv.index("--process-id") + 1] == "{who}" and not Path("{killed}").exists():
    threading.Thread(target=watch, daemon=True).start()
"""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("who", [0, 1])
def test_a_launch_starts_again_what_was_killed(tmp_path, who):
    """And the run, which goes on by itself, is that which nobody killed."""
    words = ["--steps", "80", "--checkpoint-every", "5", "--fixed-order", "4"]
    ((out, code),) = end([launch(tmp_path / "whole", *words)], 300)
    assert code == 0, out
    folder, plugin = tmp_path / "broken", tmp_path / "plugin.py"
    plugin.write_text(SUICIDE.format(folder=folder, killed=tmp_path / "killed", who=who))
    ((out, code),) = end([launch(folder, *words, "--plugin", str(plugin), restarts=1)], 500)
    assert code == 0, out
    assert f"launch: process {who} was killed by SIGKILL first; all are started again" in out
    assert re.search(r"resuming at step [1-9]", out)
    assert rows(folder) == rows(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("who", [0, 1])
def test_a_host_that_hangs_ends_the_job_with_all_stacks(tmp_path, who):
    folder = tmp_path / "r"
    processes = hosts(folder, lambda i: ["--steps", str(MANY), "--watchdog-s", "8"], heartbeat_s=60)
    wait_for_steps(folder, 3, processes)
    processes[who].send_signal(signal.SIGSTOP)
    other = processes[1 - who]
    out = other.communicate(timeout=120)[0]
    processes[who].send_signal(signal.SIGCONT)
    end(processes)
    assert other.returncode == 70, out
    assert "The stacks of all threads" in out
    assert "in fit" in out
