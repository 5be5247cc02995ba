"""The table of faults names tests that exist; and the faults that have no other place."""

import ast
import re
from pathlib import Path

from experiments import cifar10
from jaxnets import cli
from jaxnets.train import Checkpoints, MetricsLog

ROOT = Path(cifar10.__file__).parents[1]
TABLE = ROOT / "docs" / "reliability.md"


def test_each_test_that_the_table_of_faults_names_is_there():
    text = TABLE.read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
    rows = [line for line in text.splitlines() if re.match(r"\| F\d+ ", line)]
    assert [re.match(r"\| F(\d+) ", row).group(1) for row in rows] == [str(i) for i in range(1, 40)]
    for row in rows:
        assert "`tests/" in row or "not played" in row, row


def test_no_clock_that_can_jump_decides_anything():
    """F32: time zones, daylight saving, and whoever sets the clock."""
    jumping = {("time", "time"), ("time", "localtime"), ("datetime", "now"), ("datetime", "today")}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "jaxnets").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in jumping
    ]
    assert found == []


def test_a_record_that_cannot_be_written_ends_the_run_with_its_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    """F39: the disk of the metrics is full from some step on."""
    write = MetricsLog.write

    def full(self, step, values):
        if step == 9:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        write(self, step, values)

    monkeypatch.setattr(MetricsLog, "write", full)
    words = ["train", "--dataset", "digits", "--model", "mlp", "--batch-size", "64",
             "--num-devices", "1", "--steps", "12", "--log-every", "1", "--checkpoint-every", "4",
             "--no-pictures"]  # fmt: skip
    words += ["--run-dir", str(tmp_path / "r")]
    assert cli.main(cifar10.EXPERIMENT, words) == 2
    err = capsys.readouterr().err
    assert re.search(r"error: .*No space left on device", err.splitlines()[-1])
    assert Checkpoints(tmp_path / "r" / "checkpoints").latest() == 8
    monkeypatch.setattr(MetricsLog, "write", write)
    assert cli.main(cifar10.EXPERIMENT, words) == 0
    assert "resuming at step 8 of 12" in capsys.readouterr().err
