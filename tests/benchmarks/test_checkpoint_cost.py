import json

import pytest

from benchmarks import checkpoint_cost


@pytest.mark.long
def test_a_small_measurement(tmp_path, capsys):
    words = ["--batch-size", "2", "--rounds", "1", "--group", "1", "--saves", "1"]
    assert checkpoint_cost.main([*words, "--out", str(tmp_path)]) in (0, 1)
    out = capsys.readouterr().out
    assert out.count("reached)") + out.count("missed)") == 3
    found = json.loads((tmp_path / "checkpoint_cost.json").read_text())
    assert found["size_bytes"] > 80e6
    assert 0 < found["blocked_s"] < found["save_s"]


@pytest.mark.long
def test_a_small_measurement_of_two_processes(tmp_path):
    words = ["--batch-size", "2", "--rounds", "1", "--group", "1", "--saves", "1"]
    assert checkpoint_cost.main([*words, "--num-processes", "2", "--out", str(tmp_path)]) in (0, 1)
    found = json.loads((tmp_path / "checkpoint_cost_2.json").read_text())
    assert found["num_processes"] == 2
    assert 80e6 < found["size_bytes"] < 100e6  # each wrote its part, and not all of it
    assert 0 < found["blocked_s"] < found["save_s"]


def test_a_batch_that_processes_cannot_share(capsys):
    assert checkpoint_cost.main(["--num-processes", "3", "--batch-size", "4"]) == 2
    assert "3 processes can't share a batch of 4 evenly" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rounds", "saves", "group", "batch-size", "num-processes"])
def test_numbers_that_cannot_be(name, capsys):
    assert checkpoint_cost.main([f"--{name}", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
