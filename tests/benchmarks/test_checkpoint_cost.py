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


@pytest.mark.parametrize("name", ["rounds", "saves", "group", "batch-size"])
def test_numbers_that_cannot_be(name, capsys):
    assert checkpoint_cost.main([f"--{name}", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
