"""The commands as a user types them: what they write, and what they say to bad input."""

import csv
import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import cifar10, digits
from jaxnets import cli, data, errors, registry, run

SMALL = ["--no-pictures", "--dataset", "digits", "--model", "mlp", "--batch-size", "64"]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXNETS_DATA", str(tmp_path / "data"))


RECORDS = ("config.json", "metrics.jsonl", "metrics.csv", "result.json")


def cifar(*words):
    return cli.main(cifar10.EXPERIMENT, list(words))


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_run_folder_has_everything(tmp_path, capsys):
    words = [*SMALL[1:], "--epochs", "2", "--strategy", "pmap", "--num-devices", "4"]
    assert cifar("train", *words) == 0
    folder = tmp_path / "runs" / "cifar10"
    out, err = capsys.readouterr()
    assert "test accuracy 0." in out
    assert re.search(r"step 45/45  evaluation: accuracy 0\.\d+  loss \d\.\d+  count 359", err)
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["model"] == "mlp"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [23, 45]
    assert {"step", "epoch", "loss", "accuracy", "grad_norm"} <= set(rows[-2])
    assert rows[-2]["learning_rate"] == 0.05
    assert re.search(r"examples/s  MFU \d+\.\d%  data wait \d+%  0 s left", err)
    with (folder / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for picture in ("curves", "confusion", "samples"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events*"))
    assert (folder / "checkpoints" / "00000045" / "manifest.json").exists()
    result = json.loads((folder / "result.json").read_text())
    assert result["experiment"] == "cifar10"
    assert (result["steps"], result["epochs"]) == (45, 2.0)
    assert set(result["eval"]) == {"accuracy", "loss", "count"}
    assert result["eval"]["count"] == 359
    assert (result["num_devices"], result["strategy"]) == (4, "pmap")
    for name in ("train_seconds", "compile_seconds", "examples_per_second"):
        assert result[name] > 0
    assert 0 <= result["data_wait_share"] < 1
    assert {"jax", "jaxnets", "python", "numpy"} <= set(result["versions"])
    # 32 x 32 pixels into 256, 128, 10 units; three passes of two for each multiply-add
    assert result["flops_per_example"] == 3 * 2 * (1024 * 256 + 256 * 128 + 128 * 10)
    used = result["flops_per_example"] * result["examples_per_second"]
    assert result["mfu"] == pytest.approx(used / result["peak_flops"], rel=0.01)
    # Trained by pmap over four devices, and still every test image has its own prediction.
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        predictions = dict(file)
    is_right = predictions["prediction"] == predictions["label"]
    assert len(is_right) == 359
    assert is_right.mean() == pytest.approx(result["eval"]["accuracy"])
    digits_found = data.load("digits")
    np.testing.assert_array_equal(predictions["label"], digits_found.test["label"])
    shown = predictions["sample_index"]
    assert len(shown) == 48
    np.testing.assert_array_equal(predictions["sample_image"], digits_found.test["image"][shown])
    assert tuple(predictions["class_names"]) == digits_found.class_names

    # The evaluation command reads the run: no flag of its training need be given again.
    assert cifar("eval", "--num-devices", "8", "--checkpoint", "latest") == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["step"] == 45
    assert evaluated["eval"]["count"] == 359
    assert evaluated["eval"]["accuracy"] == result["eval"]["accuracy"]
    np.testing.assert_allclose(evaluated["eval"]["loss"], result["eval"]["loss"], rtol=1e-6)
    assert cifar("eval", "--checkpoint", "best") == 0
    assert json.loads(capsys.readouterr().out)["step"] == result["best_step"]


def test_an_evaluation_of_a_run_whose_newest_checkpoint_is_damaged(tmp_path, capsys):
    """The newest whole one is taken, and said; nothing is renamed, as a reader must not write."""
    assert cifar("train", *SMALL, "--steps", "6", "--checkpoint-every", "2", "--num-devices", "1") == 0
    folder = tmp_path / "runs" / "cifar10" / "checkpoints"
    harmed = max((folder / "00000006").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    content = harmed.read_bytes()
    harmed.write_bytes(content[:-1])
    before = files_below(folder.parent)
    capsys.readouterr()
    assert cifar("eval") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 4
    assert re.search(r"warning: .*step 6 is damaged: .*; step 4 is taken instead\n", err)
    for chosen in ("6", "best"):
        assert cifar("eval", "--checkpoint", chosen) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "step 6 is damaged" in line
        assert line.endswith("choose another step (whole are: 4)")
    record = folder / "00000006" / "manifest.json"
    kept = record.read_bytes()
    record.unlink()
    assert cifar("eval", "--checkpoint", "best") == 2  # no other has a score
    told, error = capsys.readouterr().err.splitlines()
    assert "manifest.json is missing; it may have been the best" in told
    assert "no best checkpoint" in error
    record.write_bytes(kept)
    assert cifar("eval", "--checkpoint", "4") == 0
    for path in folder.rglob("*"):
        if path.is_file() and path != harmed:
            path.write_bytes(b"")
    capsys.readouterr()
    assert cifar("eval") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no checkpoint in" in line
    assert "--no-resume" not in line
    assert files_below(folder.parent) == before
    assert harmed.read_bytes() == content[:-1]


def test_the_same_command_again_goes_on_and_more_epochs_extend(tmp_path, capsys):
    words = ["train", *SMALL, "--num-devices", "1"]
    assert cifar(*words, "--steps", "5") == 0
    before = {name: (tmp_path / "runs/cifar10" / name).read_text() for name in RECORDS}
    assert cifar(*words, "--steps", "5", "--strategy", "pmap") == 0
    assert "resuming at step 5 of 5" in capsys.readouterr().err
    assert before == {name: (tmp_path / "runs/cifar10" / name).read_text() for name in RECORDS}
    assert cifar(*words, "--steps", "4") == 2
    assert "is at step 5 already, and this one would end at 4" in capsys.readouterr().err
    assert before == {name: (tmp_path / "runs/cifar10" / name).read_text() for name in RECORDS}
    assert cifar(*words, "--steps", "9") == 0
    assert "resuming at step 5 of 9" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/cifar10/result.json").read_text())["steps"] == 9
    assert cifar(*words, "--steps", "3", "--no-resume") == 0
    assert json.loads((tmp_path / "runs/cifar10.1/result.json").read_text())["steps"] == 9


def test_a_run_made_longer_equals_one_that_was_so_from_the_start(tmp_path, capsys):
    """Two epochs end in a short batch, which the longer run must draw whole."""
    words = ["train", *SMALL, "--num-devices", "1", "--eval-every", "15", "--log-every", "3"]
    assert cifar(*words, "--epochs", "3", "--run-dir", "whole") == 0
    assert cifar(*words, "--epochs", "2", "--run-dir", "parts") == 0
    assert cifar(*words, "--epochs", "3", "--run-dir", "parts") == 0
    assert "step 45 had a short batch; going on from before it" in capsys.readouterr().err
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()


def test_several_steps_in_a_call(tmp_path, monkeypatch, capsys):
    """The run is the same: its rows, its evaluations, and to rounding its numbers."""
    calls = []

    class Counted(run.Several):
        def fits(self, i, end):
            fits = super().fits(i, end)
            calls.append((i, fits))
            return fits

    monkeypatch.setattr(run, "Several", Counted)
    rows = {}
    for count in (1, 4):
        words = ["--steps", "22", "--eval-every", "9", "--log-every", "1", "--no-pictures"]
        folder = tmp_path / str(count)
        words += ["--run-dir", str(folder), "--steps-per-call", str(count)]
        assert cifar("train", *SMALL, *words) == 0
        rows[count] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[4]] == [row["step"] for row in rows[1]]
    for several, single in zip(rows[4], rows[1], strict=True):
        assert set(several) == set(single)
        for name in {"loss", "grad_norm", "eval/loss"} & set(single):
            assert several[name] == pytest.approx(single[name], rel=1e-4)
    assert [row["step"] for row in rows[4] if "eval/loss" in row] == [9, 18, 22]
    # Steps 8 and 17 lie before an evaluation within their call, 20 and 21 are the rest.
    taken = [
        i for i, fits in calls[6:] if fits
    ]  # the first six were asked before the run, for a warning
    assert taken == [0, 4, 12]
    assert "of the steps are taken" not in capsys.readouterr().err


def test_a_record_that_is_gone_is_made_again(tmp_path):
    words = ["train", *SMALL, "--steps", "3", "--num-devices", "1"]
    assert cifar(*words) == 0
    folder = tmp_path / "runs/cifar10"
    result = json.loads((folder / "result.json").read_text())
    (folder / "metrics.jsonl").unlink()
    (folder / "result.json").unlink()
    assert cifar(*words) == 0
    assert json.loads((folder / "result.json").read_text())["eval"] == result["eval"]


@pytest.mark.parametrize(
    "change", [["--strategy", "pmap", "--num-devices", "8"], ["--num-devices", "4"]]
)
def test_a_run_may_go_on_on_other_devices(tmp_path, change):
    words = ["train", *SMALL, "--steps", "8"]
    assert cifar(*words, "--num-devices", "1", "--run-dir", "whole") == 0
    assert cifar(*[*words[:-1], "4"], "--num-devices", "1", "--run-dir", "parts") == 0
    assert cifar(*words, "--run-dir", "parts", *change) == 0
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "parts"))
    assert one["eval"]["accuracy"] == two["eval"]["accuracy"]
    np.testing.assert_allclose(one["eval"]["loss"], two["eval"]["loss"], rtol=1e-5)


def test_images_too_small_for_the_model(tmp_path, capsys):
    write_idx(tmp_path / "data" / "small")
    assert cifar("train", "--dataset", "small", "--batch-size", "8") == 2
    assert "the model does not fit the data: a (5, 5) kernel leaves" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def write_idx(folder, size=8):
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">4I", 0x803, 16, size, size) + bytes(16 * size * size)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, 16) + bytes(range(16))
        )


def test_without_jit(tmp_path):
    assert cifar("train", *SMALL, "--steps", "2", "--no-jit") == 0
    assert json.loads((tmp_path / "runs/cifar10/result.json").read_text())["num_devices"] == 1


BAD = {
    "no command": (["--epochs", "3"], "which command?"),
    "seed": (["train", *SMALL, "--seed", "99999999999999999999"], "seed must lie in [0, 2147483647]"),
    "epochs too many": (["train", *SMALL, "--epochs", "1e300"], "choose fewer epochs"),
    "command": (["trian"], "unknown command 'trian': did you mean 'train'?"),
    "flag": (["train", "--epoks", "3"], "unknown flag '--epoks': did you mean '--epochs'?"),
    "value": (["train", "--epochs", "ten"], "--epochs"),
    "no value": (["train", "--epochs"], "--epochs"),
    "stray word": (["train", "fast"], "fast"),
    "preset": (["train", "--preset", "tutoral"], "did you mean 'tutorial'?"),
    "model": (["train", "--model", "lanet"], "unknown model 'lanet': did you mean 'lenet'?"),
    "optimizer": (["train", "--optimizer", "adma"], "did you mean 'adam'?"),
    "dataset": (["train", "--dataset", "digit"], "did you mean 'digits'?"),
    "dataset path": (["train", "--dataset", "../etc"], "../etc"),
    "strategy": (["train", *SMALL, "--strategy", "pmpa"], "did you mean 'pmap'?"),
    "verify": (["train", *SMALL, "--verify", "strikt"], "did you mean 'strict'?"),
    "batch 0": (["train", "--dataset", "digits", "--batch-size", "0"], "at least 1, not 0"),
    "batch -4": (["train", "--dataset", "digits", "--batch-size", "-4"], "at least 1, not -4"),
    "batch too large": (
        ["train", "--dataset", "digits", "--batch-size", "1439"],
        "1439 is larger than the training set of 1438",
    ),
    "batch and devices": (["train", *SMALL[:-1], "12"], "12 is not divisible by 8 devices x 1"),
    "batch and micro-batches": (
        ["train", *SMALL, "--num-devices", "2", "--accumulate", "3"],
        "64 is not divisible by 2 devices x 3",
    ),
    "accumulate": (["train", *SMALL, "--accumulate", "0"], "accumulate must be at least 1"),
    "steps per call": (["train", *SMALL, "--steps-per-call", "0"], "steps_per_call is 0"),
    "steps per call, streamed": (
        ["train", *SMALL, "--steps-per-call", "4", "--stream"],
        "several steps in a call take data that is kept in memory",
    ),
    "steps per call, pmap": (
        ["train", *SMALL, "--steps-per-call", "4", "--strategy", "pmap"],
        "neither --strategy pmap nor --fixed-order",
    ),
    "rate nan": (
        ["train", *SMALL, "--learning-rate", "nan"],
        "finite number of at least 0, not nan",
    ),
    "rate inf": (["train", *SMALL, "--learning-rate", "inf"], "finite number"),
    "rate negative": (["train", *SMALL, "--learning-rate", "-1"], "at least 0, not -1"),
    "momentum": (["train", *SMALL, "--momentum", "1"], "momentum must lie in [0, 1)"),
    "smoothing": (["train", *SMALL, "--label-smoothing", "2"], "label smoothing lies in [0, 1]"),
    "epochs": (["train", *SMALL, "--epochs", "0"], "epochs must be a finite number above 0"),
    "steps": (["train", *SMALL, "--steps", "0"], "steps must be at least 1"),
    "log_every": (["train", *SMALL, "--log-every", "0"], "log_every is 0"),
    "devices": (["train", *SMALL, "--num-devices", "9"], "9 devices asked for; there are 8"),
    "no jit": (["train", *SMALL, "--no-jit", "--strategy", "pmap"], "without jit"),
    "eval of nothing": (["eval", "--run-dir", "nowhere"], "nowhere is not the folder of a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(tmp_path, capsys, case):
    words, message = BAD[case]
    assert cifar(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert files_below(tmp_path) == []


def test_bad_run_folders(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert cifar("train", *SMALL, "--run-dir", "file") == 2
    assert "the run folder file is a file" in capsys.readouterr().err
    assert cifar("train", *SMALL, "--steps", "2", "--run-dir", "r") == 0
    before = files_below(tmp_path)
    capsys.readouterr()
    assert cifar("train", *SMALL, "--steps", "2", "--run-dir", "r", "--seed", "1") == 2
    assert "another config: seed 0 -> 1; " in capsys.readouterr().err
    assert cli.main(digits.EXPERIMENT, ["train", "--run-dir", "r"]) == 2
    assert "holds a run of cifar10, not of digits" in capsys.readouterr().err
    assert files_below(tmp_path) == before


def test_damaged_checkpoints_and_other_models(tmp_path, capsys):
    words = ["train", *SMALL, "--steps", "2", "--run-dir", "r", "--num-devices", "1"]
    assert cifar(*words) == 0
    capsys.readouterr()
    config = (tmp_path / "r" / "config.json").read_text()
    assert cifar(*words[:-4], "--run-dir", "r", "--model", "lenet", "--allow-change") == 2
    assert "is of another model or optimizer: " in capsys.readouterr().err
    assert (tmp_path / "r" / "config.json").read_text() == config
    assert cifar(*words) == 0
    step = tmp_path / "r" / "checkpoints" / "00000002"
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    capsys.readouterr()
    for command in (words, ["eval", "--run-dir", "r"]):
        assert cifar(*command) == 2
        error = capsys.readouterr().err
        assert "the checkpoint of step 2 is damaged" in error
        assert len(error.strip().splitlines()) == 1
    shutil.rmtree(step)
    assert cifar(*words) == 0


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    words = ["train", *SMALL, "--learning-rate", "1e30", "--epochs", "1", "--num-devices", "1"]
    assert cifar(*words) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: step \d+ was not applied: its loss is", error)
    rows = (tmp_path / "runs/cifar10/metrics.jsonl").read_text()
    assert "NaN" not in rows
    assert not list((tmp_path / "runs/cifar10/checkpoints").glob("*"))


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help(capsys, words):
    try:
        status = cifar(*words)
    except SystemExit as exit:
        status = exit.code
    assert status == 0
    assert "train" in capsys.readouterr().out


def test_help_names_the_module_of_an_experiment_that_lies_elsewhere(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "trial.py").write_text(
        "import sys\n"
        "from jaxnets import cli\n"
        "def make_recipe(config, options): ...\n"
        "EXPERIMENT = cli.Experiment('trial', 'A trial.', None, make_recipe)\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(cli.main(EXPERIMENT))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mine.trial", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "usage: python -m mine.trial {train,eval,duel}" in ran.stdout


@pytest.mark.parametrize(("seconds", "is_said"), [(0.0, True), (60.0, False)])
def test_data_that_takes_long_is_no_silence(monkeypatch, capsys, seconds, is_said):
    monkeypatch.setattr(cli, "_SILENCE_S", seconds)

    def make_recipe(config, options):
        time.sleep(0.2)
        raise errors.DataError("no data")

    experiment = dataclasses.replace(digits.EXPERIMENT, make_recipe=make_recipe)
    assert cli.main(experiment, ["train", "--num-devices", "1"]) == 2
    said = capsys.readouterr()
    assert ("digits: reading and preparing the data" in said.err) == is_said
    assert "no data" in said.err


def test_data_that_is_wrong(tmp_path, capsys):
    folder = tmp_path / "data" / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name in names:
        (folder / name).write_bytes(b"\0" * 3073)
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    assert cifar("train") == 2
    error = capsys.readouterr().err
    assert "3,073 bytes" in error
    assert len(error.strip().splitlines()) == 1
    (folder / "test_batch.bin").unlink()
    assert cifar("train") == 2
    assert "test_batch.bin" in capsys.readouterr().err
    assert not os.path.exists("runs")


PLUGIN = """
from jaxnets import models, registry
def mine(num_classes=10, **fields):
    return models.mlp(num_classes=num_classes, hidden=(8,), **fields)
registry.register("model", "mine", mine)
"""


def test_a_model_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(PLUGIN)
    words = ["train", "--dataset", "digits", "--model", "mine", "--batch-size", "64", "--num-devices=1"]
    first = subprocess.run(
        [sys.executable, "-m", "experiments.cifar10", *words, "--steps", "2", "--plugin", "mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    config = (tmp_path / "runs/cifar10/config.json").read_text()
    assert json.loads(config)["config"]["model"] == "mine"
    assert "plugin" not in config
    for command in ([*words, "--steps", "4"], ["eval"]):
        assert cifar(*command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: unknown model 'mine': there are: ")
        assert error.endswith("one of your own needs --plugin FILE with every command\n")
    try:
        assert cifar(*words, "--steps", "4", "--plugin", "mine.py", "--plugin=mine.py") == 0
        assert "resuming at step 2 of 4" in capsys.readouterr().err
        assert cifar("eval", "--plugin", "mine.py") == 0
        assert json.loads(capsys.readouterr().out)["step"] == 4
    finally:
        registry.unload("model", "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the plugin mine.py does not exist"),
        ("def f(:", "mine.py, line 1: invalid syntax"),
        ("x = 1", "mine.py: registers nothing"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "duel"])
def test_a_bad_plugin_is_one_clear_line(tmp_path, capsys, command, text, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    assert cifar(command, *SMALL, "--plugin", "mine.py") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_training_is_guarded_against_compiling_again(tmp_path, monkeypatch):
    """The last of the three batches is short, and still there is one signature."""
    guards = []

    class Recorded(run.ShapeGuard):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            guards.append(self)

    monkeypatch.setattr(run, "ShapeGuard", Recorded)
    assert cifar("train", *SMALL, "--epochs", "0.1", "--num-devices", "1") == 0
    assert [guard.num_signatures for guard in guards] == [1]


def test_a_reader_that_has_had_enough():
    python = f"{sys.executable} -m jaxnets list"
    for _ in range(3):
        ran = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {python} | head -1"], capture_output=True, text=True
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.startswith("model")
