import json
import re

import jax
import pytest

from benchmarks import throughput, throughput_report
from benchmarks.workloads import WORKLOADS, Workload
from jaxnets import errors
from jaxnets.interop import contender, duel


def record(ratio, *, mode="train", plain=50.0):
    side = {
        "spread": {"quartiles": [90.0, 110.0]},
        "share_of_ceiling": 0.25,
        "first_step_seconds": 1.5,
        "peak_memory_bytes": 2**29,
    }
    return {
        "mode": mode,
        "ratio": ratio,
        "ratio_spread": {"quartiles": [ratio - 0.1, ratio + 0.1]},
        "parity": {"num_steps": 20},
        "jaxnets": {
            **side,
            "examples_per_second": 100.0 * ratio,
            "best": "jaxnets, 1 thread",
            "settings": {"compute_dtype": "float32", "matmul_precision": "highest"},
        },
        "plain_jax": {**side, "examples_per_second": plain},
        "torch": {**side, "examples_per_second": 100.0, "best": "eager, 2 threads"},
        "warm": {"first_step_seconds": 0.5},
        "ceiling": {"flops": 3e11, "bytes_per_second": 2e10, "speedup_by_threads": 1.9},
        "device": "cpu",
        "processor": "a processor, 2 cores",
        "versions": {"jax": "1", "torch": "2"},
    }


def test_the_table_has_a_row_for_each_and_means_of_what_ran():
    records = {
        "a": record(4.0),
        "b": record(1.0),
        "c": record(0.5, mode="inference"),
        "d": {"failure": "parity in float64 | worse"},
    }
    lines = throughput_report.table(records).splitlines()
    columns = lines[0].count("|")
    rows = {line.split("|")[1].strip(): line for line in lines[2:6]}
    assert list(rows) == ["a", "b", "c", "d"]
    assert all(line.count("|") == columns for line in rows.values())
    assert "**4.00** (3.90 to 4.10)" in rows["a"]
    assert "100 (90 to 110), eager, 2 threads" in rows["a"]
    assert "failed: parity in float64 / worse" in rows["d"]
    assert "Geometric mean of 2 in train: 2.00, least 1.00" in lines
    assert "Geometric mean of 1 in inference: 0.50, least 0.50" in lines
    assert lines[-1].startswith("a processor, 2 cores; ")
    assert "float32, matmul precision highest on both sides" in lines[-1]
    assert "300 to 300 GFLOP/s (with all threads 1.90 to 1.90 times one's)" in lines[-1]


def test_the_picture(tmp_path):
    throughput_report.draw({"a": {"failure": "x"}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    throughput_report.draw({"a": record(2.0), "b": {"failure": "x"}}, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_workload_that_is_not_there(capsys):
    assert throughput.main(["--only", "lenet-5"]) == 2
    assert "did you mean 'lenet-4'" in capsys.readouterr().err
    assert throughput.main(["--seconds", "0"]) == 2
    assert "must be above 0" in capsys.readouterr().err


@pytest.mark.parity
def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # to come back to
    try:
        assert throughput.main(["--device", "gpu", "--only", "lenet-4"]) == 2
    finally:
        jax.config.update("jax_platforms", "cpu")
    said = capsys.readouterr().err
    assert said.startswith("error: JAX ")
    assert re.search("gpu|cuda", said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
def test_every_workload_can_be_built(workload, monkeypatch):
    seen = []
    monkeypatch.setattr(duel, "compare", lambda *args: seen.append(args))
    throughput.run_workload(workload, 1.0, {})
    ((module, recipe, config, options, _),) = seen
    assert module == workload.module
    assert (recipe.batch_size, config.model) == (workload.batch_size, workload.model)
    duel.check(recipe, options)


@pytest.mark.parity
@pytest.mark.long
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_a_workload_from_start_to_record(mode, tmp_path, monkeypatch, capsys):
    make = contender.make_starters

    def make_few(*args):
        starters = make(*args)
        return starters._replace(ours=starters.ours[:1], torch=starters.torch[:1])

    monkeypatch.setattr(duel, "make_starters", make_few)
    workload = Workload("tiny", "mlp", 4, mode, parity_steps=1)
    assert throughput.run_suite([workload], tmp_path, 2.0) == 0
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert found["ratio"] > 0
    assert found["parity"]["passed"]
    assert found["parity"]["num_steps"] == 1
    assert found["jaxnets"]["settings"]["mode"] == mode
    dense = 2 * (3072 * 256 + 256 * 128 + 128 * 10)
    assert found["flops_per_example"] == (3 * dense if mode == "train" else dense)
    assert "tiny" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "throughput.png").exists()
    assert "tiny" in capsys.readouterr().out


def test_a_workload_that_fails_is_a_record_and_an_exit_status(tmp_path, monkeypatch, capsys):
    def fail(*_args):
        raise errors.ParityError("parity in float64, loss: off")

    monkeypatch.setattr(duel, "compare", fail)
    assert throughput.run_suite([WORKLOADS["lenet-4"]], tmp_path, 1.0) == 1
    found = json.loads((tmp_path / "lenet-4.json").read_text())
    assert found["failure"] == "parity in float64, loss: off"
    assert "ratio" not in found
    assert "failed: parity" in capsys.readouterr().out


def test_other_errors_are_records_too(tmp_path, monkeypatch):
    def fail(*_args):
        raise MemoryError("none left")

    monkeypatch.setattr(duel, "compare", fail)
    (tmp_path / "lenet-4.json").write_text('{"ratio": 9}')
    assert throughput.run_suite([WORKLOADS["lenet-4"]], tmp_path, 1.0) == 1
    assert json.loads((tmp_path / "lenet-4.json").read_text())["failure"] == "MemoryError('none left')"
