import json

import pytest

from benchmarks import plain_form

# A plugin is loaded in the form that the run is traced in.
PLUGIN = """
from jaxnets import registry
from jaxnets.ops.forms import is_plain
registry.register("model", "none", print)  # it must register something
with open({seen!r}, "a") as file:
    print(is_plain(), file=file)
"""
FLAGS = ["--dataset", "digits", "--model", "lenet", "--steps", "12", "--learning-rate", "0.01"]


@pytest.mark.long
def test_both_forms_train_to_the_same_accuracy(tmp_path, capsys):
    plugin, seen = tmp_path / "plugin.py", tmp_path / "seen"
    plugin.write_text(PLUGIN.format(seen=str(seen)))
    words = ["--out", str(tmp_path), "--", *FLAGS, "--plugin", str(plugin)]
    assert plain_form.main(words) == 0
    assert seen.read_text().split() == ["False", "True"]
    record = json.loads((tmp_path / "plain_form.json").read_text())
    fast, plain = record["fast"], record["plain"]
    assert fast["steps"] == plain["steps"] == 12
    assert fast["eval"]["count"] == plain["eval"]["count"]
    # Rounding decides ties of the maximum on the images' blank margins: some machines' losses are a
    # hundredth apart after twelve steps, others' not at all.
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
