import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import cifar10, digits
from jaxnets import cli, errors
from jaxnets.config import RunOptions
from jaxnets.interop import (
    contender,
    duel,
    duel_report,
    jax_side,
    measure,
    reference,
)
from jaxnets.layers import Dropout
from jaxnets.layers.dropout import without_dropout
from tests.interop import tiny_duel as tiny

SETTINGS = {
    "mode": "train",
    "device": "cpu",
    "dtype": "float32",
    "compute_dtype": "float32",
    "batch_size": 128,
    "matmul_precision": "highest",
}


NO_PARITY = {"dropout_rates": [], "loss_rounding": [1e-7] * 5}


def run_digits(folder, *words):
    return cli.main(
        digits.EXPERIMENT,
        ["duel", "--run-dir", str(folder), "--duel-seconds", "4", *words],
    )


@pytest.fixture
def few(monkeypatch):
    """One variant of PyTorch, and no parity: it has its own tests."""
    make = contender.make_starters

    def make_few(*args):
        starters = make(*args)
        return starters._replace(ours=starters.ours[-1:], torch=starters.torch[:1])

    monkeypatch.setattr(duel, "make_starters", make_few)
    monkeypatch.setattr(duel, "check_parity", lambda *a, **k: NO_PARITY)


def check_report(report):
    assert report["experiment"] == "digits"
    assert report["model"] == "lenet"
    assert report["config"]["batch_size"] == 32
    assert report["parity"]["passed"]
    ours, theirs = report["jaxnets"], report["torch"]
    variants = {name: row for name, row in theirs["variants"].items() if "failed" not in row}
    assert theirs["best"] in variants
    for side in (ours, report["plain_jax"], *variants.values()):
        assert side["examples_per_second"] > 0
        assert side["peak_memory_bytes"] >= side["memory_after_imports_bytes"] > 2**26
        low, high = side["spread"]["quartiles"]
        assert side["spread"]["min"] <= low <= high <= side["spread"]["max"]
        assert len(side["first_values"]) == 5
        assert side["seconds_to_first_steps"] > side["first_step_seconds"]
    best = variants[theirs["best"]]
    timed = [row for row in variants.values() if not row["dropped_after_screening"]]
    assert best["examples_per_second"] == max(row["examples_per_second"] for row in timed)
    assert ours["rounds"] == best["rounds"] >= 7
    quotient = ours["examples_per_second"] / best["examples_per_second"]
    assert report["ratio"] == pytest.approx(quotient, rel=1e-3)
    assert ours["first_step_seconds"] > best["first_step_seconds"] > 0
    assert report["warm"]["cache_hits"] > 0
    assert report["plain_jax"]["settings"]["is_plain"]
    assert not ours["settings"]["is_plain"]
    quotient = ours["examples_per_second"] / report["plain_jax"]["examples_per_second"]
    assert report["ratio_to_plain"] == pytest.approx(quotient, rel=1e-3)
    assert report["ceiling"]["flops"] == round(
        max(x["flops"] for x in report["ceiling"]["sides"].values())
    )
    flops = report["flops_per_example"] * ours["examples_per_second"]
    assert ours["share_of_ceiling"] == pytest.approx(flops / report["ceiling"]["flops"], abs=1e-3)
    assert report["first_values"]["largest_error"] < 1e-5
    for side in (ours, theirs):
        kept = {name: side["settings"][name] for name in SETTINGS}
        assert kept == SETTINGS | {"batch_size": 32}
    assert set(report["versions"]) == {"jaxnets", "jax", "jaxlib", "torch", "numpy", "python"}


@pytest.mark.parity
def test_from_the_command_line(tmp_path, few, capsys):
    (tmp_path / "config.json").write_text("a training run's\n")
    assert run_digits(tmp_path, "--steps-per-call", "4") == 0
    report = json.loads((tmp_path / "duel.json").read_text())
    check_report(report)
    assert report["jaxnets"]["best"].endswith("4 steps a call")
    assert report["jaxnets"]["steps_per_round"] % 4 == 0
    assert report["plain_jax"]["settings"]["steps_per_call"] == 1
    printed = capsys.readouterr()
    assert re.search(
        r"jaxnets, \d threads?, 4 steps a call / best PyTorch \(eager, 1 thread\): ", printed.out
    )
    assert "plain JAX" in printed.out
    assert "rounds of 3 contenders" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "duel.json"]


@pytest.mark.long
@pytest.mark.parity
@pytest.mark.timeout(1200)
def test_everything_from_the_command_line(tmp_path):
    assert run_digits(tmp_path) == 0
    report = json.loads((tmp_path / "duel.json").read_text())
    check_report(report)
    count = 4 * len({1, measure.num_cores()})
    assert len(report["torch"]["variants"]) == count
    for dtype in ("float64", "float32"):
        for stage in report["parity"][dtype].values():
            assert stage["bound"] is None or stage["error"] <= stage["bound"]


@pytest.mark.long
@pytest.mark.parity
def test_refused_at_another_matmul_precision(tmp_path, few, monkeypatch, capsys):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16")  # of the worker
    (tmp_path / "duel.json").write_text('{"ratio": 9}')  # of an earlier duel
    assert run_digits(tmp_path) == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert last == ("error: no comparison: matmul_precision is medium in JAX and highest in PyTorch")
    assert "best PyTorch" not in printed.out
    report = json.loads((tmp_path / "duel.json").read_text())
    assert "matmul_precision is medium" in report["failure"]
    assert "ratio" not in report


@pytest.mark.parity
def test_without_parity_nothing_is_timed(tmp_path, monkeypatch, capsys):
    def fail(*_args, **_options):
        raise errors.ParityError("parity in float64, loss: loss of step 1 differs by 1.0e-03")

    def start(*_args, **_options):
        raise AssertionError("timed")

    monkeypatch.setattr(duel, "check_parity", fail)
    monkeypatch.setattr(duel, "make_starters", start)
    assert run_digits(tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1].startswith("error: parity in float64, loss: ")
    assert printed.out == ""
    report = json.loads((tmp_path / "duel.json").read_text())
    assert report["parity"]["passed"] is False
    assert "loss of step 1" in report["parity"]["failure"]
    assert "ratio" not in report


@pytest.mark.parametrize("setting", SETTINGS)
def test_refused_where_a_setting_differs(setting):
    duel.check_same(SETTINGS, dict(SETTINGS, threads=2))
    with pytest.raises(errors.ConfigError, match=f"no comparison: {setting} is "):
        duel.check_same(SETTINGS, SETTINGS | {setting: "other"})


def test_first_values_must_agree():
    close = [[2.0], [1.00001]]
    assert duel.check_values([[2.0], [1.0]], close, "eager", [1e-4] * 2) == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(errors.ParityError, match=r"eager is off by 1\.0e-03 .* in step 2"):
        duel.check_values([[2.0], [1.0, -10.0]], [[2.0], [1.01, -10.0]], "eager", [1e-4] * 2)
    with pytest.raises(errors.ParityError, match=r"off by 2\.0e"):  # of the other sign
        duel.check_values([[1.0, -1.0]], [[1.0, 1.0]], "eager", [1e-4])
    with pytest.raises(errors.ParityError, match="off by nan"):
        duel.check_values([[float("nan")]], [[2.0]], "eager", [1e-4])


def test_first_values_may_differ_by_what_rounding_does():
    parity = {"loss_rounding": [0.0, 1e-6, 1e-3]}
    assert duel.value_bounds(SETTINGS, parity) == [1e-4, 1e-4, 1e-2]
    assert duel.value_bounds(SETTINGS | {"matmul_precision": "high"}, parity) == [1e-2] * 3
    assert duel.value_bounds(SETTINGS | {"compute_dtype": "bfloat16"}, parity) == [5e-2] * 3
    assert duel.value_bounds(SETTINGS | {"mode": "inference"}, parity) == [1e-4] * 5
    values = [[1.0], [1.0], [9.0]], [[1.0], [1.01], [1.0]]  # the last is beyond what was proved
    assert duel.check_values(*values, "eager", [1e-4, 5e-2]) == pytest.approx(0.0099, rel=1e-2)
    with pytest.raises(errors.ParityError, match="in step 2; the bound is 1e-03"):
        duel.check_values(*values, "eager", [1e-4, 1e-3])


@pytest.mark.long
@pytest.mark.parity
def test_in_bfloat16_parity_is_proved_of_float32(tmp_path, few, monkeypatch):
    proved = []

    def check(recipe, reference, **_):
        proved.append(recipe.torch_arguments["dtype"])
        return NO_PARITY

    monkeypatch.setattr(duel, "check_parity", check)
    words = ["--dataset", "random_images", "--model", "lenet", "--dtype", "bfloat16"]
    words += ["--batch-size", "8", "--duel-seconds", "2", "--run-dir", str(tmp_path)]
    assert cli.main(cifar10.EXPERIMENT, ["duel", *words]) == 0
    report = json.loads((tmp_path / "duel.json").read_text())
    assert proved == ["float32"]
    for side in ("jaxnets", "torch"):
        settings = report[side]["settings"]
        assert (settings["dtype"], settings["compute_dtype"]) == ("float32", "bfloat16")
    # Both round to 8 bits, and not to the same ones.
    assert report["first_values"]["bounds"] == [5e-2] * 5
    assert 0 < report["first_values"]["largest_error"] < 5e-2


def test_precisions_in_common_words():
    assert jax_side.matmul_precision(None, "cpu") == "highest"
    assert jax_side.matmul_precision(None, "tpu") == "medium"
    assert jax_side.matmul_precision("tensorfloat32", "gpu") == "high"
    assert jax_side.matmul_precision("float32", "gpu") == "highest"


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({"accumulate": 2}, {}, "accumulate is 2"),
        ({}, {"strategy": "pmap"}, "one device"),
        ({}, {"num_devices": 8}, "one device"),
        ({}, {"jit": False}, "compiled"),
        ({}, {"duel_mode": "infer"}, "unknown duel mode 'infer'"),
        ({}, {"duel_mode": "inference"}, "tiny has no predict_fn"),
        ({}, {"parity_steps": 0}, "parity_steps is 0"),
        ({}, {"steps_per_call": 0}, "steps_per_call is 0"),
        ({}, {"duel_seconds": 0.0}, "duel_seconds is 0.0"),
        ({}, {"duel_seconds": float("nan")}, "duel_seconds is nan"),
        ({"torch_reference": None}, {}, "tiny has no PyTorch reference"),
    ],
)
def test_what_cannot_be_compared(recipe, options, message, tmp_path):
    made = tiny.recipe(**recipe)
    with pytest.raises(errors.ConfigError, match=message):
        duel.run_duel("tiny", made, digits.Config(), RunOptions(run_dir=tmp_path / "r", **options))
    assert not (tmp_path / "r").exists()


@pytest.mark.parity
def test_a_reference_of_another_dtype(tmp_path):
    config = cifar10.Config(dtype="bfloat16")  # which the reference isn't told of
    with pytest.raises(errors.ConfigError, match="reference would compute in float32"):
        duel.run_duel("tiny", tiny.recipe(), config, RunOptions(run_dir=tmp_path / "r"))


@pytest.mark.parity
def test_a_reference_that_is_not_there():
    with pytest.raises(errors.ConfigError, match="can't be loaded: No module named 'nowhere'"):
        reference.load_reference("tiny", "nowhere:reference", {})
    arguments = tiny.recipe().torch_arguments
    target = "benchmarks.torch_reference.classifier:reference"
    with pytest.raises(errors.ConfigError, match="did you mean 'lenet'"):
        reference.load_reference("tiny", target, arguments | {"model": "lanet"})
    with pytest.raises(errors.ConfigError, match="unknown PyTorch optimizer 'lion'"):
        reference.load_reference("tiny", target, arguments | {"optimizer": "lion"})


def test_pytorch_is_not_installed(monkeypatch):
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ConfigError, match="pip install torch") as caught:
        reference.load_reference("tiny", "benchmarks.torch_reference.classifier:reference", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parity
def test_a_run_folder_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder, message in ((file, "is a file"), (file / "below", "can't be written: Not a dir")):
        with pytest.raises(errors.ConfigError, match=message):
            duel.run_duel("tiny", tiny.recipe(), digits.Config(), RunOptions(run_dir=folder))


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd(), check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_interop_imports_no_pytorch():
    names = "contender, duel, duel_report, duel_worker, parity, reference, sides, weights"
    # None makes an import fail. (Others may try it: tensorboardX does, and goes on without.)
    code = f"import sys; sys.modules['torch'] = None; from jaxnets.interop import {names}; print(1)"
    assert python(code) == "1\n"


@pytest.mark.parity
@pytest.mark.parametrize("name", ["classifier", "gpt", "recommender", "text_classifier", "translation"])
def test_pytorchs_processes_import_no_jax(name):
    code = (
        f"import sys; from benchmarks.torch_reference import {name}; "
        "from jaxnets.interop import duel_worker; "
        "print('torch' in sys.modules, 'jax' in sys.modules)"
    )
    assert python(code) == "True False\n"


class Stub:
    """A contender whose times are given."""

    def __init__(self, name, rounds, is_open=True, facts=None):
        self.name, self.rounds, self.is_open, self.steps = name, rounds, is_open, 3
        self.facts = {
            "settings": SETTINGS | {"threads": 1, "device_kind": "cpu", "versions": {}},
            "memory": {"after_imports_bytes": 1, "loaded_bytes": 2},
            "peak_bytes": 3,
            "device_peak_bytes": None,
            "first_step_seconds": 0.5,
            "seconds_to_first_steps": 1.5,
            "first_values": [[2.0]],
            "cache_hits": 1,
            "gradients": {"parameter": "", "off_by": 0.0},
            **(facts or {}),
        }


def test_the_ratio_is_of_medians_and_against_the_best():
    ours = Stub("jaxnets", [10.0, 30.0, 20.0])
    slow = Stub("slow", [5.0, 6.0, 7.0])
    best = Stub("best", [8.0, 10.0, 100.0])
    dropped = Stub("dropped", [1000.0], is_open=False)
    groups = {"ours": [Stub("one", [9.0, 9.0, 9.0]), ours], "plain": [Stub("plain", [5.0])]}
    groups["torch"] = [slow, best, dropped]
    again = Stub("warm", [])
    ceiling = {
        "jax": {"flops": 3e9, "bytes": 2e9},
        "torch": {"flops": 4e9, "bytes": 1e9, "one_thread_flops": 2e9},
    }
    report = duel_report.assemble(groups, again, {"broken": "no compiler"}, ceiling)
    assert report["jaxnets"]["best"] == "jaxnets"
    assert set(report["jaxnets"]["variants"]) == {"one", "jaxnets"}
    assert report["torch"]["best"] == "best"
    assert report["ratio"] == 2.0
    assert report["ratio_spread"]["min"] == pytest.approx(0.2)
    assert report["ratio_spread"]["max"] == pytest.approx(3.0)
    assert report["torch"]["variants"]["broken"] == {"failed": "no compiler"}
    assert report["torch"]["variants"]["dropped"]["dropped_after_screening"]
    assert report["jaxnets"]["first_step_seconds"] == 0.5
    assert report["ratio_to_plain"] == 4.0
    assert report["warm"] == {
        "first_step_seconds": 0.5,
        "seconds_to_first_steps": 1.5,
        "cache_hits": 1,
    }
    again.facts["cache_hits"] = 0
    assert duel_report.assemble(groups, again, {}, ceiling)["warm"] is None
    assert (report["ceiling"]["flops"], report["ceiling"]["bytes_per_second"]) == (4e9, 2e9)
    assert report["ceiling"]["speedup_by_threads"] == 2.0
    assert report["jaxnets"]["peak_memory_bytes"] == 3
    assert (
        duel_report.figures(Stub("gpu", [1.0], facts={"device_peak_bytes": 5}))["peak_memory_bytes"] == 5
    )
    duel_report.add_shares(report, 5e7)
    assert report["jaxnets"]["share_of_ceiling"] == 0.25
    assert report["torch"]["share_of_ceiling"] == 0.125
    assert report["jaxnets"]["spread"]["quartiles"] == [15.0, 25.0]


def test_rounds_are_interleaved_and_rotate():
    calls = []

    @dataclasses.dataclass
    class Timed:
        name: str
        rate: float = 64.0
        steps: int = 1
        facts: dict = dataclasses.field(
            default_factory=lambda: {"settings": {"batch_size": 32}},
        )
        rounds: list = dataclasses.field(default_factory=lambda: [1.0])

        def run(self, steps):
            calls.append(self.name)
            assert steps == self.steps == 2
            return 0.5

    made = [Timed("a"), Timed("b"), Timed("c")]
    duel._rounds(made, 21.0)
    names = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert names[:4] == ["abc", "bca", "cab", "abc"]
    assert len(names) >= 7
    assert made[0].rounds == [128.0] * len(names)


def test_without_dropout():
    x_BF = jnp.ones((4, 100))
    layer = Dropout(0.5)

    def run():
        import jax

        return layer.apply({}, x_BF, train=True, rngs={"dropout": jax.random.key(0)})

    assert bool((run() == 0).any())
    with without_dropout():
        assert run() is x_BF
        with contextlib.suppress(KeyError), without_dropout():
            raise KeyError
        assert run() is x_BF
    assert bool((run() == 0).any())


def test_nothing_is_written_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ConfigError, match="pip install torch"):
        duel.run_duel("tiny", tiny.recipe(), digits.Config(), RunOptions(run_dir=tmp_path / "r"))
    assert not (tmp_path / "r").exists()
