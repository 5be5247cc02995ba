"""The benchmark of row updates, at the smallest sizes."""

import json

from benchmarks import row_updates


def test_each_size_is_measured_and_takes_the_same_beside_the_state(tmp_path, capsys):
    words = ["--rows", "3000", "6000", "--batch-size", "64", "--rounds", "2", "--steps", "1"]
    assert row_updates.main([*words, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["3,000", "6,000"]
    record = json.loads((tmp_path / "row_updates.json").read_text())
    few, many = record["found"]
    assert len(few["jaxnets"]) == 2
    assert few["bytes"]["beside"] == many["bytes"]["beside"] > 0
    assert many["bytes"]["state"] - few["bytes"]["state"] == 3 * 3000 * 33 * 4  # and both moments


def test_what_cannot_be(tmp_path, capsys):
    assert row_updates.main(["--rows", "0", "--out", str(tmp_path)]) == 2
    assert "at least 1" in capsys.readouterr().err
