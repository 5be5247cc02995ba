"""What `duel` takes of an experiment, and what it says of that."""

import dataclasses

import pytest

from experiments import imdb_sentiment, movielens, multi30k, shakespeare
from jaxnets import cli


@pytest.mark.parametrize("module", [imdb_sentiment, movielens, multi30k, shakespeare])
def test_duel_without_flags_takes_what_the_reference_has(module, monkeypatch, capsys):
    found = []
    experiment = dataclasses.replace(
        module.EXPERIMENT, make_recipe=lambda config, options: found.append(config)
    )
    monkeypatch.setattr("jaxnets.interop.duel.run_duel", lambda *args: 0)
    name, value = next(iter(experiment.duel.items()))
    flag, usual = f"--{name.replace('_', '-')}", getattr(experiment.config, name)
    assert cli.main(experiment, ["duel"]) == 0
    assert {name: getattr(found[0], name) for name in experiment.duel} == experiment.duel
    out = capsys.readouterr()
    differs = f"{flag} {value} instead of {usual}" in out.err + out.out
    assert differs == (value != usual)
    other = "0.25" if isinstance(value, float) else "cosine"
    assert cli.main(experiment, ["duel", flag, other]) == 0
    assert str(getattr(found[1], name)) == other
    out = capsys.readouterr()
    assert f"{flag} {value} instead" not in out.err + out.out
    with pytest.raises(SystemExit):
        cli.main(experiment, ["duel", "--help"])
    assert "instead of" not in "".join(capsys.readouterr())
