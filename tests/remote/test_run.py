"""A run in a folder of an object store: the same as on a disk, killed or not."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from experiments import cifar10
from jaxnets import cli
from jaxnets.train import Checkpoints
from jaxnets.train.folder_lock import LOCK
from tests import test_kill
from tests.test_kill import QUIET, ROOT, assert_same, command, final, start, write_data


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model that compiles in no time."""
    monkeypatch.setattr(test_kill, "CONFIG", dataclasses.replace(test_kill.CONFIG, model="mlp"))


def main(folder, data, *more, name="train", epochs=0.7):
    """A command in this process; its exit status."""
    words = command(folder, data, epochs)[4:]
    return cli.main(cifar10.EXPERIMENT, [name, *words, *more])


def upload(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source).as_posix()).write(path.read_bytes())


def kill(store, folder, data, epochs, method, name, number):
    """Kill a run when the store gets such a request for the n-th time, which comes to nothing."""
    left, process = [number], None

    def at(asked, what):
        if asked == method and name in what and process is not None:
            left[0] -= 1
            if left[0] == 0:
                process.kill()
                return 500
        return None

    store.fault = at
    process = start(folder, data, epochs, is_victim=True, **QUIET)
    assert process.wait() == -9, "the run ended before it could be killed"
    store.fault = lambda method, name: None


@pytest.mark.timeout(600)
def test_a_run_that_was_killed_in_a_save_ends_with_an_unbroken_ones_bits(store, folder, tmp_path):
    data = write_data(tmp_path / "data")
    assert main(tmp_path / "whole", data) == 0
    kill(store, folder, data, 0.7, "PUT", "manifest.json", 3)
    assert Checkpoints(folder / "checkpoints").latest() == 4
    assert main(folder, data) == 0
    assert_same(final(tmp_path / "whole", data), final(folder, data))
    there = {path.name for path in folder.iterdir()}
    assert there == {path.name for path in (tmp_path / "whole").iterdir()} - {".lock"}
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_kills_at_the_worst_moments(store, folder, tmp_path):
    data = write_data(tmp_path / "data")
    assert main(tmp_path / "whole", data, epochs=3.3) == 0
    moments = [
        ("PUT", "config.json", 1),
        ("PUT", "/d/", 2),
        ("BEGIN", "commit_success", 2),
        ("PUT", "manifest.json", 2),
        ("GET", "/d/", 2),  # as its digest is taken
        ("PUT", "metrics.jsonl", 3),
        ("DELETE", "manifest.json", 1),
        ("DELETE", "/d/", 1),
        ("PUT", "tensorboard", 2),
    ]
    for moment in moments:
        kill(store, folder, data, 3.3, *moment)
    assert start(folder, data, 3.3, **QUIET).wait() == 0
    assert_same(final(tmp_path / "whole", data), final(folder, data))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_a_user_does_with_a_run(store, bucket, folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAXNETS_CACHE", str(tmp_path / "cache"))
    data = folder / "data"
    upload(write_data(tmp_path / "data"), data)
    folder = folder / "run"
    assert main(folder, data, epochs=0.5) == 0
    assert main(folder, data, epochs=0.7) == 0
    out, err = capfd.readouterr()
    assert "resuming at step" in err
    assert f"everything is in {folder}" in out
    assert main(folder, data, name="eval") == 0
    evaluated = json.loads(capfd.readouterr().out)
    assert evaluated["step"] == Checkpoints(folder / "checkpoints").latest()
    # The newest step loses an object, and the run goes on from the one before.
    latest = Checkpoints(folder / "checkpoints").latest()
    lost = next(x for x in store.objects[bucket] if f"{latest:08d}/" in x and "/d/" in x)
    del store.objects[bucket][lost]
    assert main(folder, data, epochs=0.7) == 0
    assert f"kept as {latest:08d}.damaged" in capfd.readouterr().err
    assert main(folder, data, "--no-resume", epochs=0.3) == 0
    aside = folder.with_name("run.1")
    assert {"config.json", "checkpoints", "metrics.jsonl"} <= {path.name for path in aside.iterdir()}
    assert Checkpoints(aside / "checkpoints").is_whole(latest)
    assert main(folder, data, "--seed=1", epochs=0.3) == 2
    assert "another config: seed 0 -> 1" in capfd.readouterr().err


@pytest.mark.timeout(600)
def test_a_store_that_refuses_ends_the_run_in_a_line(store, folder, tmp_path, capfd):
    data = write_data(tmp_path / "data")
    saved = Checkpoints(folder / "checkpoints")

    store.fault = lambda method, name: 403
    assert main(folder, data) == 2
    err = capfd.readouterr().err.splitlines()
    assert "can't be written: the store refuses it" in err[-1]
    seen = []

    def after_a_save(method, name):
        seen.append(name.endswith("00000002/manifest.json") and method == "PUT")
        is_refused = any(seen[:-1]) and method in ("PUT", "BEGIN")
        return 403 if is_refused and not name.endswith(LOCK) else None  # which would end this process

    store.fault = after_a_save
    assert main(folder, data) == 2
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("error: "), err[-3:]
    assert err[-1].endswith("that of step 2 is unharmed"), err[-3:]
    store.fault = lambda method, name: None
    assert saved.newest_whole() == (2, [])
    assert main(folder, data) == 0
    assert "resuming at step 2 of" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_store_that_is_down_ends_the_run_in_a_line(store, folder, tmp_path, capfd):
    data = write_data(tmp_path / "data")
    seen = []

    def down(method, name):
        seen.append(name.endswith("00000002/manifest.json") and method == "PUT")
        return 503 if any(seen[:-1]) and not name.endswith(LOCK) else None  # it would end this process

    store.fault = down
    assert main(folder, data) == 2
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("error: "), err[-3:]
    assert "503" in err[-1], err[-3:]
    store.fault = lambda method, name: None
    assert Checkpoints(folder / "checkpoints").newest_whole() == (2, [])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_processes_share_a_folder(store, folder, tmp_path):
    """Each writes its part of the arrays, and sees what the first one writes."""
    data = write_data(tmp_path / "data")
    words = [*command(folder, data, 0.7)[1:], "--num-devices=2"]
    launch = [sys.executable, "-m", "jaxnets", "launch", "--num-processes", "2", "--"]
    done = subprocess.run(
        [*launch, sys.executable, *words],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in folder.rglob("*")}
    assert "process_1" in names
    latest = Checkpoints(folder / "checkpoints").latest()
    assert Checkpoints(folder / "checkpoints").is_whole(latest)
