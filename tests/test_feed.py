"""Streamed data from the command line: equal, exact on resume, and nothing is left behind."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import cifar10
from jaxnets import cli, errors, feed, runner
from jaxnets.config import RunOptions
from jaxnets.data import Arrays, Batches, Stream, image_folder, take
from jaxnets.data.sources import read_rows_leaving_out
from jaxnets.train import Checkpoints, Clock, make_strategy
from jaxnets.train.preemption import StopOnSignal

ROOT = Path(cifar10.__file__).parents[1]
SIZE = 8
FLAGS = ["--dataset=blobs", f"--image-size={SIZE}", "--model=mlp", "--batch-size=12",
         "--learning-rate=0.01", "--num-devices=1", "--log-every=1", "--eval-every=8",
         "--checkpoint-every=2"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images in class folders; an epoch is no whole number of batches."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("train", 25), ("test", 10)):
        for label in range(4):
            (folder / "blobs" / part / f"c{label}").mkdir(parents=True)
            for i in range(count):
                image = np.clip(rng.normal(50 + 50 * label, 40, (SIZE, SIZE, 3)), 0, 255)
                path = folder / "blobs" / part / f"c{label}" / f"{i:02}.png"
                Image.fromarray(image.astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def train(data, tmp_path):
    """Run `train` here, in a folder under `tmp_path`."""

    def run(folder, *words):
        place = [f"--data-dir={data}", f"--run-dir={tmp_path / folder}"]
        return cli.main(cifar10.EXPERIMENT, ["train", *FLAGS, *place, *words])

    return run


def recipe_of(data, **fields):
    config = cifar10.Config(dataset="blobs", image_size=SIZE, model="mlp", batch_size=12, **fields)
    return cifar10.make_recipe(config, RunOptions(data_dir=data))


def in_memory(source):
    examples = [source[i] for i in range(len(source))]
    return {name: np.stack([x[name] for x in examples]) for name in ("image", "label")}


def records(folder):
    return {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")}


def parameters(folder, recipe):
    checkpoints = Checkpoints(folder / "checkpoints")
    state, _ = checkpoints.restore(
        checkpoints.latest(), make_strategy(num_devices=1).abstract(runner.make_state(recipe))
    )
    return [np.asarray(x) for x in jax.tree.leaves((state.params, state.model_state, state.opt_state))]


def test_the_same_run_as_with_the_data_in_memory(data, tmp_path):
    """The same set through both ways; the devices' programs differ, so rounding may."""
    from_disk = recipe_of(data, steps=5)
    resident = dataclasses.replace(
        from_disk, train=in_memory(from_disk.train), test=in_memory(from_disk.test)
    )
    rows = []
    for name, recipe, options in [
        ("disk", from_disk, RunOptions(log_every=1, num_workers=1)),
        ("memory", resident, RunOptions(log_every=1)),
    ]:
        strategy = make_strategy(num_devices=1)
        (tmp_path / name).mkdir()
        usages = runner.check_recipe(recipe, strategy, options)
        result = runner.train(tmp_path / name, recipe, options, strategy, usages, stop=StopOnSignal())
        assert result is not None
        assert (result["num_workers"] is None) is (name == "memory")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    assert len(rows[0]) == 6
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)


def workers_of(pid):
    """Those of training come first: those of an evaluation were started later."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread, a child that ended
            for child in (task / "children").read_text().split():
                if b"jaxnets.data" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return sorted(found)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def break_off(data, folder, number, *, worker):
    """Start training with workers, send a signal once it trains; the status and stderr."""
    log = folder / "metrics.jsonl"
    size = log.stat().st_size if log.exists() else 0
    words = [*FLAGS, "--epochs", "2000", "--num-workers", "2"]
    words += [f"--data-dir={data}", f"--run-dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cifar10", "train", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (log.exists() and log.stat().st_size > size + 2000):
        time.sleep(0.01)
    workers = workers_of(process.pid)
    assert len(workers) >= 2
    # To the whole group, as a terminal or a supervisor does.
    (os.kill if worker else os.killpg)(workers[0] if worker else process.pid, number)
    _, err = process.communicate(timeout=60)  # of the 2,000 epochs it waits for none
    time.sleep(1.5)
    assert not any(map(is_alive, workers))
    return process.returncode, err


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_run_that_was_broken_off_goes_on_exactly(data, train, tmp_path):
    """By a killed worker, and by a kill of itself; then to the end with another number of workers."""
    broken = tmp_path / "broken"
    status, err = break_off(data, broken, signal.SIGKILL, worker=True)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "was killed by SIGKILL before batch" in line
    assert "Traceback" not in err
    status, _ = break_off(data, broken, signal.SIGKILL, worker=False)
    assert status == -signal.SIGKILL
    step = Checkpoints(broken / "checkpoints").latest()
    assert step is not None
    steps = [f"--steps={step + 5}", "--epochs=2000"]
    assert train("broken", *steps, "--num-workers=1") == 0
    assert train("whole", *steps) == 0
    assert records(broken) == records(tmp_path / "whole")
    recipe = recipe_of(data, steps=1)
    for one, two in zip(parameters(broken, recipe), parameters(tmp_path / "whole", recipe), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_no_worker(data, tmp_path, number):
    status, err = break_off(data, tmp_path / "r", number, worker=False)
    assert status == 128 + number, err
    assert "stopped by" in err
    assert "error" not in err


def test_an_image_that_is_damaged_is_one_line(data, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_folder, "_visible", spoil(image_folder._visible))
    assert train("r", "--epochs", "1") == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "train/c2/gone.png: can't be read as an image" in line
    assert "Traceback" not in err


def spoil(visible):
    """A folder that lists an image which isn't there."""

    def listed(folder, *, is_folder):
        extra = ["gone.png"] if folder.parent.name == "train" and folder.name == "c2" else []
        return visible(folder, is_folder=is_folder) + extra

    return listed


def test_waiting_for_data_is_said_and_recorded(data, train, tmp_path, monkeypatch, capsys):
    """And `eval` finds what training found, on other devices."""
    read_image = image_folder.read_image

    def slowly(path, shape):
        time.sleep(0.03 if path.parts[-3] == "train" else 0)
        return read_image(path, shape)

    monkeypatch.setattr(image_folder, "read_image", slowly)
    assert train("r", "--steps=10", "--prefetch=1") == 0
    err = capsys.readouterr().err
    assert "input is the limit" in err
    assert "try more --num-workers (there were 0" in err
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["data_wait_share"] > 0.5
    assert result["num_workers"] == 0
    words = [f"--data-dir={data}", f"--run-dir={tmp_path / 'r'}", "--num-devices=4"]
    assert cli.main(cifar10.EXPERIMENT, ["eval", *words, "--num-workers=1"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["eval"]
    assert evaluated["count"] == 40
    assert evaluated == pytest.approx(result["eval"], rel=1e-5)


def test_little_waiting_is_not_mentioned():
    clock = Clock(data=0.9, dispatch=1.0, wait=9.0)
    assert feed.advice(clock, RunOptions()) is None
    clock.data = 2.0
    assert "17% of the training time" in str(feed.advice(clock, RunOptions(num_workers=3)))


def test_the_duel_needs_the_data_in_memory(data, capsys):
    assert cli.main(cifar10.EXPERIMENT, ["duel", *FLAGS, f"--data-dir={data}"]) == 2
    assert "this needs it in memory" in capsys.readouterr().err


def test_more_data_than_may_be_kept_is_refused(data):
    recipe = recipe_of(data)
    resident = dataclasses.replace(recipe, train=in_memory(recipe.train), test=in_memory(recipe.test))
    strategy = make_strategy(num_devices=1)
    size = 140 * (SIZE * SIZE * 3 + 4) / 1e9
    runner.check_recipe(resident, strategy, RunOptions(max_resident_gb=1.01 * size))
    small = RunOptions(max_resident_gb=0.99 * size)
    with pytest.raises(
        errors.ConfigError, match=r"takes 2\.74e-05 GB .* use --stream, or a higher --max"
    ):
        runner.check_recipe(resident, strategy, small)
    runner.check_recipe(resident, strategy, dataclasses.replace(small, stream=True))
    runner.check_recipe(recipe, strategy, small)
    assert feed.resident(recipe.train, RunOptions()) is None
    assert feed.resident(Arrays(resident.train), RunOptions()) is None


@pytest.fixture
def spoiled(data, tmp_path):
    """The same set with two images that can't be read, one of them the first."""
    shutil.copytree(data, tmp_path / "spoiled")
    for name in ("c0/00.png", "c2/07.png"):
        path = tmp_path / "spoiled" / "blobs" / "train" / name
        path.write_bytes(path.read_bytes()[:40])
    return tmp_path / "spoiled"


def skipping(train, spoiled, folder, *words):
    return train(folder, "--epochs=2", f"--data-dir={spoiled}", "--max-unreadable=2", *words)


def test_images_that_are_left_out_are_counted_and_the_run_is_the_same_with_any_workers(
    train, spoiled, tmp_path, capsys
):
    """In main, in a worker, and broken off and gone on with, where the flag may change."""
    assert skipping(train, spoiled, "main") == 0
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if "is left out" in line]
    assert len(told) == 2  # once, though there are two epochs
    for example, name in ((0, "c0/00.png"), (57, "c2/07.png")):
        (line,) = [x for x in told if x.startswith(f"warning: training example {example} is left out: ")]
        assert f"train/{name}: can't be read as an image" in line
    rows = [json.loads(x) for x in (tmp_path / "main" / "metrics.jsonl").read_text().splitlines()]
    counts = [row["unreadable"] for row in rows if "loss" in row]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (counts[0], 2)
    assert json.loads((tmp_path / "main" / "result.json").read_text())["unreadable"] == 2
    assert skipping(train, spoiled, "broken", "--steps=8", "--num-workers=1") == 0
    assert skipping(train, spoiled, "broken", "--num-workers=2", "--max-unreadable=7") == 0
    assert records(tmp_path / "broken") == records(tmp_path / "main")
    recipe = recipe_of(spoiled, steps=1)
    one, two = (parameters(tmp_path / folder, recipe) for folder in ("broken", "main"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("words", [(), ("--num-workers=2",)])
def test_more_images_than_may_be_left_out_end_the_run(train, spoiled, capsys, words):
    assert skipping(train, spoiled, "r", "--max-unreadable=1", *words) == 2
    err = capsys.readouterr().err.splitlines()
    assert (
        "error: 2 training examples can't be read, more than the 1 of --max-unreadable: 0, 57" in err[-1]
    )


def test_what_is_left_out_has_no_weight(data, spoiled):
    """The row keeps its place: gradients are those of the other rows, whatever stands in it."""
    source = recipe_of(spoiled).train
    batches = Batches(100, 10, 100, shuffle=False)
    told = []
    with Stream(
        source, batches, max_unreadable=2, on_unreadable=lambda i, found: told.append((i, list(found)))
    ) as stream:
        for i in range(10):
            batch, whole = stream[i], take(in_memory(recipe_of(data).train), batches[i])
            bad = [example in (0, 57) for example in batch["index"]]
            assert batch["index"].tolist() == whole["index"].tolist()
            assert batch["mask"].tolist() == [not x for x in bad]
            for name in ("image", "label"):
                np.testing.assert_array_equal(batch[name][batch["mask"]], whole[name][batch["mask"]])
    assert told == [(0, [0]), (5, [57])]
    np.testing.assert_array_equal(stream_row(source, 57), source[58]["image"])


def stream_row(source, i):
    return read_rows_leaving_out(source, [i], 2)[0]["image"][0]


def test_evaluation_leaves_out_none(train, spoiled, capsys, tmp_path):
    path = spoiled / "blobs" / "test" / "c1" / "03.png"
    path.write_bytes(b"")
    assert skipping(train, spoiled, "r", "--max-unreadable=9") == 2
    assert "test/c1/03.png: can't be read as an image" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "r" / "result.json").exists()


def test_examples_are_counted_as_far_as_steps_are_done(capsys):
    """Not as far as batches were read ahead."""
    left_out = feed.Unreadable(3, [4], step=2)
    left_out.note(2, {7: "why"})
    left_out.note(3, {4: "why", 9: "why"})
    assert [left_out.examples(), left_out.row()] == [[4], {"unreadable": 1}]
    left_out(3, None, None)
    assert left_out.examples() == [4, 7]
    left_out(4, None, None)
    assert left_out.examples() == [4, 7, 9]
    with pytest.raises(errors.DataError, match=r"4 training examples .* the 3 of .*: 4, 5, 7, 9;"):
        left_out.note(4, {5: "why"})
    assert capsys.readouterr().err.count("example 4 ") == 1
    assert feed.Unreadable(0).row() == {}


@pytest.mark.parametrize("flag", ["--num-workers", "--prefetch", "--max-unreadable"])
def test_numbers_that_cannot_be(train, capsys, flag, tmp_path):
    assert train("r", f"{flag}=-1") == 2
    assert "must be at least 0" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_with_data_in_memory_there_is_nothing_to_leave_out(tmp_path, capsys):
    words = ["train", "--dataset=digits", "--model=mlp", "--steps=1", "--no-pictures"]
    words += ["--max-unreadable=3", f"--run-dir={tmp_path / 'r'}"]
    assert cli.main(cifar10.EXPERIMENT, words) == 0
    assert "warning: the data is in memory, " in capsys.readouterr().err
