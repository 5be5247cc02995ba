"""kill -9 at random moments, the same command again each time: nothing of it may be seen."""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cifar10
from jaxnets import runner
from jaxnets.config import RunOptions, to_json
from jaxnets.train import Checkpoints, make_strategy
from jaxnets.train.metrics_log import read_rows

ROOT = Path(cifar10.__file__).parents[1]
# BatchNorm statistics, dropout, moments, a short last batch, evaluations and saves all the time.
CONFIG = cifar10.Config(
    dataset="noise", model="convnet", optimizer="adam", learning_rate=0.001, batch_size=24
)
OPTIONS = [
    "--no-pictures",
    "--log-every",
    "1",
    "--eval-every",
    "8",
    "--checkpoint-every",
    "2",
    "--num-devices",
    "1",
]
QUIET = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}


def write_data(folder):
    """An idx set of 8x8 images, in which an epoch is no whole number of batches."""
    rng = np.random.default_rng(0)
    (folder / "noise").mkdir(parents=True)
    for part, size in (("train", 250), ("t10k", 50)):
        images = rng.integers(0, 256, (size, 8, 8), dtype=np.uint8)
        labels = rng.integers(0, 10, size, dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
            (folder / "noise" / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


def command(folder, data, epochs):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in to_json(CONFIG).items()
             if name in ("dataset", "model", "optimizer", "learning_rate", "batch_size")]  # fmt: skip
    flags += [*OPTIONS, f"--epochs={epochs}", f"--run-dir={folder}", f"--data-dir={data}"]
    return [sys.executable, "-m", "experiments.cifar10", "train", *flags]


def start(folder, data, epochs, *, is_victim=False, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if is_victim:  # it must not leave half an entry in the cache that the tests share
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    return subprocess.Popen(command(folder, data, epochs), cwd=ROOT, env=environment, **options)


def final(folder, data):
    """Everything that an unbroken run and a broken one must agree on."""
    recipe = cifar10.make_recipe(CONFIG, RunOptions(data_dir=data))
    make_state = runner.make_state(recipe)
    checkpoints = Checkpoints(folder / "checkpoints")
    strategy = make_strategy(num_devices=1)
    state, manifest = checkpoints.restore(checkpoints.latest(), strategy.abstract(make_state))
    arrays = [
        np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(state)
    ]
    files = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")}
    return arrays, files, (manifest.step, manifest.score, checkpoints.best(), checkpoints.steps())


def assert_same(one, two):
    for a, b in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert one[1] == two[1]
    assert one[2] == two[2]


def unfinished(folder):
    """The checkpoints that are being written."""
    paths = (folder / "checkpoints").glob("*")
    return [path for path in paths if path.is_dir() and not (path / "manifest.json").exists()]


def rows_of(log):
    return log.read_bytes().splitlines()


def kill_at_random(folder, data, epochs, rng, num_kills):
    """Kill the run that often between its first step and its end.

    Returns:
        how often in a save, and how many steps each kill cost.
    """
    in_save, lost = 0, []
    log = folder / "metrics.jsonl"
    for kill in range(num_kills):
        process = start(folder, data, epochs, is_victim=True, **QUIET)
        written = log.stat().st_mtime_ns if log.exists() else 0
        cut_back = 0  # a resumed run first cuts the log back, then writes behind that
        while process.poll() is None:
            now = log.stat().st_mtime_ns if log.exists() else 0
            if now != written and not cut_back:
                cut_back = log.stat().st_size + 1
            if cut_back and log.stat().st_size >= cut_back:
                break
            time.sleep(0.005)
        last = len(rows_of(log)) + rng.randrange(25)  # in steps, since disks differ in speed
        while process.poll() is None and len(rows_of(log)) < last:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        while not kill % 2 and process.poll() is None and not unfinished(folder):
            pass  # until it is in the middle of a save
        assert process.poll() is None, "the run ended before it could be killed: make it longer"
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_save += bool(unfinished(folder))
        seen = max(row["step"] for row in read_rows(log))
        lost.append(seen - (Checkpoints(folder / "checkpoints").latest() or 0))
    return in_save, lost


def check_kills(tmp_path, num_kills, epochs, seed):
    data = write_data(tmp_path / "data")
    assert start(tmp_path / "whole", data, epochs, **QUIET).wait() == 0
    rng = random.Random(seed)
    in_save, lost = kill_at_random(tmp_path / "broken", data, epochs, rng, num_kills)
    assert start(tmp_path / "broken", data, epochs, **QUIET).wait() == 0
    assert_same(final(tmp_path / "whole", data), final(tmp_path / "broken", data))
    # A save begins every two steps, and waits for the one before it.
    assert max(lost) <= 4, lost
    return in_save, lost


@pytest.mark.timeout(600)
def test_a_kill(tmp_path):
    check_kills(tmp_path, 1, epochs=5.3, seed=0)


@pytest.mark.long
@pytest.mark.timeout(6000)
@pytest.mark.parametrize(("num_kills", "epochs"), [(20, 60.3), (200, 500.3)])
def test_many_kills(tmp_path, num_kills, epochs, record_property):
    in_save, lost = check_kills(tmp_path, num_kills, epochs, seed=num_kills)
    assert in_save >= num_kills // 4
    record_property(
        "figure",
        f"{num_kills} kills, {in_save} of them in a save: the end is an unbroken run's to the bit; "
        f"{sum(lost) / len(lost):.1f} steps lost in the mean, {max(lost)} at most",
    )


def test_sigterm_saves_and_says_so(tmp_path):
    data = write_data(tmp_path / "data")
    process = start(
        tmp_path / "r", data, 500, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    log = tmp_path / "r" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in err
    step = int(err.split("after step ")[1].split(";")[0])
    assert Checkpoints(tmp_path / "r" / "checkpoints").latest() == step
