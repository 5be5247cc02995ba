"""kill -9 at random moments, the same command again each time: nothing of it may be seen."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cifar10
from jaxnets import cli
from jaxnets.config import RunOptions
from jaxnets.train import Checkpoints, make_strategy

# BatchNorm statistics, dropout, moments, a short last batch, evaluations and saves all the time.
CONFIG = cifar10.Config(
    dataset="digits",
    model="convnet",
    optimizer="adam",
    learning_rate=0.001,
    batch_size=32,
    epochs=4.01,
)
OPTIONS = ["--log-every", "1", "--eval-every", "4", "--checkpoint-every", "2", "--num-devices", "1"]
ROOT = Path(cifar10.__file__).parents[1]


def command(folder):
    flags = [
        "--dataset", CONFIG.dataset, "--model", CONFIG.model, "--optimizer", CONFIG.optimizer,
        "--learning-rate", str(CONFIG.learning_rate), "--batch-size", str(CONFIG.batch_size),
        "--epochs", str(CONFIG.epochs),
    ]  # fmt: skip
    return [
        sys.executable,
        "-m",
        "experiments.cifar10",
        "train",
        *flags,
        *OPTIONS,
        "--run-dir",
        folder,
    ]


def start(folder, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command(str(folder)), cwd=ROOT, env=environment, **options)


def final(folder):
    """Everything that an unbroken run and a broken one must agree on."""
    recipe = cifar10.make_recipe(CONFIG, RunOptions())
    make_state = cli._make_state(recipe)
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


def kill_at_random(folder, rng, num_kills):
    """Kill the run that often between its first step and its end; how often in a save."""
    in_save = 0
    for kill in range(num_kills):
        process = start(folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        log = folder / "metrics.jsonl"
        before = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            grown = log.exists() and log.stat().st_size != before
            if grown:
                break
            time.sleep(0.01)
        if kill % 2 and process.poll() is None:  # in the middle of a save
            while process.poll() is None and time.monotonic() < deadline:
                unfinished = [
                    p for p in (folder / "checkpoints").glob("*")
                    if p.is_dir() and not (p / "manifest.json").exists()
                ]  # fmt: skip
                if unfinished:
                    break
        else:
            time.sleep(rng.uniform(0, 0.6))
        assert process.poll() is None, "the run ended before it could be killed: make it longer"
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_save += any(
            p.is_dir() and not (p / "manifest.json").exists() for p in (folder / "checkpoints").glob("*")
        )
    return in_save


def check_kills(tmp_path, num_kills, seed):
    assert start(tmp_path / "whole", stderr=subprocess.DEVNULL).wait() == 0
    in_save = kill_at_random(tmp_path / "broken", random.Random(seed), num_kills)
    assert start(tmp_path / "broken", stderr=subprocess.DEVNULL).wait() == 0
    assert_same(final(tmp_path / "whole"), final(tmp_path / "broken"))
    return in_save


@pytest.mark.timeout(600)
def test_two_kills(tmp_path):
    check_kills(tmp_path, 2, seed=0)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_ten_kills(tmp_path):
    in_save = check_kills(tmp_path, 10, seed=1)
    assert in_save >= 2


def test_sigterm_saves_and_says_so(tmp_path):
    process = start(tmp_path / "r", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = tmp_path / "r" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in err
    step = int(err.split("after step ")[1].split(";")[0])
    assert Checkpoints(tmp_path / "r" / "checkpoints").latest() == step
