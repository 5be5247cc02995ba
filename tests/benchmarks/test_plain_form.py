import json

import pytest

from benchmarks import plain_form

FLAGS = ["--dataset", "digits", "--model", "lenet", "--steps", "12", "--learning-rate", "0.01"]


@pytest.mark.long
def test_both_forms_train_to_the_same_accuracy(tmp_path, capsys):
    assert plain_form.main(["--out", str(tmp_path), "--", *FLAGS]) == 0
    record = json.loads((tmp_path / "plain_form.json").read_text())
    fast, plain = record["fast"], record["plain"]
    assert fast["steps"] == plain["steps"] == 12
    assert fast["eval"]["count"] == plain["eval"]["count"]
    # Other programs, so other rounding, and the same training.
    assert fast["eval"]["loss"] != plain["eval"]["loss"]
    assert abs(fast["eval"]["loss"] - plain["eval"]["loss"]) < 0.05
    seconds = plain["train_seconds"] / fast["train_seconds"]
    assert abs(record["ratio"] / seconds - 1) < 1e-3
    assert "of the time" in capsys.readouterr().out


def test_a_run_that_fails_is_one_line(tmp_path, capsys):
    assert plain_form.main(["--out", str(tmp_path), "--", "--model", "lenett"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the fast run failed: ")
    assert "did you mean 'lenet'" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "plain_form.json").exists()
