import json

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import checkpoint_cost
from jaxnets import errors
from jaxnets.train import create_state, manifest


def make_state():
    return create_state(lambda key: ({"w": jnp.ones(9)}, {}), optax.sgd(0.1), key=jax.random.key(0))


def test_it_measures_and_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_cost, "make_state", make_state)
    monkeypatch.setattr(checkpoint_cost, "keep_freed_memory", lambda: None)
    seal_files = manifest.seal_files
    assert checkpoint_cost.main(["--out", str(tmp_path), "--rounds", "2"]) == 0
    assert "training waits" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_cost.json"]
    record = json.loads((tmp_path / "checkpoint_cost.json").read_text())
    times = record["ms"]
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(times, 2)
    assert 0 < record["median_ms"]["blocked"] < record["median_ms"]["total"]
    assert manifest.seal_files is seal_files
    with pytest.raises(errors.ConfigError, match="at least 1"):
        checkpoint_cost.main(["--rounds", "0"])
