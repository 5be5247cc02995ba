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
    # Other programs: rounding decides other ties of the maximum on the images' blank margins, and twelve
    # steps later the losses are a hundredth apart.
    assert fast["eval"]["loss"] != plain["eval"]["loss"]
    assert abs(fast["eval"]["loss"] - plain["eval"]["loss"]) < 0.05
    seconds = plain["train_seconds"] / fast["train_seconds"]
    assert abs(record["ratio"] / seconds - 1) < 1e-3
    assert "of the time" in capsys.readouterr().out


def test_a_run_that_fails_says_why(tmp_path, capfd):
    assert plain_form.main(["--out", str(tmp_path), "--", "--model", "lenett"]) == 2
    first, why, last = capfd.readouterr().err.splitlines()
    assert (first, last) == ("== fast", "error: the fast run ended with exit status 2")
    assert "did you mean 'lenet'" in why
    assert not (tmp_path / "plain_form.json").exists()
