"""F34: a device without enough memory, which a CPU can be too: one line, and nothing half-written."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from experiments import cifar10
from jaxnets import cli
from jaxnets.train import Checkpoints, checkpoint

WORDS = ["train", "--dataset=digits", "--model=mlp", "--batch-size=64", "--accumulate=2", "--steps=9",
         "--num-devices=2", "--log-every=1", "--checkpoint-every=3", "--no-pictures"]  # fmt: skip
LINE = (
    r"error: a device is out of memory \(RESOURCE_EXHAUSTED: Out of memory allocating \d+ bytes.*\); "
    r"the batch of {size} is {rows} examples at a time on a device, and the model's parameters and "
    r"moments take [\d,]+ bytes there: try a smaller .*--strategy fsdp"
)


def huge(x):
    """A part of a step that takes 64 TiB, and is 0."""
    values = jnp.arange(2**44, dtype=jnp.float32) * jax.lax.stop_gradient(x)
    return jnp.sum(jnp.where(jnp.sort(values) < -1e30, 1.0, 0.0))


def experiment(where):
    """Cifar10, with a loss or an evaluation that is too large."""

    def make_recipe(config, options):
        recipe = cifar10.make_recipe(config, options)

        def loss_fn(params, model_state, batch, *, key):
            terms, *rest = recipe.loss_fn(params, model_state, batch, key=key)
            return {"loss": terms["loss"] + huge(terms["loss"][0])}, *rest

        def eval_fn(params, model_state, batch):
            found = recipe.eval_fn(params, model_state, batch)
            total = found["loss"].total
            return found | {"loss": dataclasses.replace(found["loss"], total=total + huge(total))}

        changes = {
            "first step": {"loss_fn": loss_fn},
            "later": {"stages": [(5, loss_fn)]},
            "evaluation": {"eval_fn": eval_fn},
        }
        return dataclasses.replace(recipe, **changes[where])

    return dataclasses.replace(cifar10.EXPERIMENT, make_recipe=make_recipe)


@pytest.mark.parametrize(("where", "latest"), [("first step", None), ("later", 3), ("evaluation", 6)])
def test_a_device_out_of_memory_is_one_line(where, latest, tmp_path, capsys):
    assert cli.main(experiment(where), [*WORDS, f"--run-dir={tmp_path / 'r'}"]) == 2
    err = capsys.readouterr().err
    assert re.search(LINE.format(size=64, rows=16), err.splitlines()[-1]), err
    assert "--batch-size, more micro-batches (--accumulate 4)" in err
    assert "Traceback" not in err
    if where == "first step":  # there is nothing to cut over one device
        words = [*WORDS, "--num-devices=1", f"--run-dir={tmp_path / 'one'}"]
        assert cli.main(experiment(where), words) == 2
        assert "is out of memory" in (line := capsys.readouterr().err.splitlines()[-1])
        assert "fsdp" not in line
    checkpoints = Checkpoints(tmp_path / "r" / "checkpoints")
    assert checkpoints.newest_whole() == (latest, [])
    assert checkpoints.clean() == []
    words = [*WORDS[1:-1], f"--run-dir={tmp_path / 'r'}"]
    if latest:  # a machine with more memory goes on with it, and evaluates it
        assert cli.main(experiment("evaluation"), ["eval", *words]) == 2
        found = capsys.readouterr().err.splitlines()[-1]
        assert re.search(LINE.format(size=512, rows=256), found)
        assert cli.main(cifar10.EXPERIMENT, ["train", *words, "--no-pictures"]) == 0
        assert f"resuming at step {latest} of 9" in capsys.readouterr().err
        result = json.loads((tmp_path / "r" / "result.json").read_text())
        assert result["steps"] == 9


def test_a_device_without_memory_for_a_save(tmp_path, monkeypatch, capsys):
    """Which copies the state to the host."""

    def full(tree):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    copy = checkpoint.copied_to_host
    monkeypatch.setattr(
        checkpoint, "copied_to_host", lambda tree: (copy if int(tree["step"]) < 6 else full)(tree)
    )
    assert cli.main(cifar10.EXPERIMENT, [*WORDS, f"--run-dir={tmp_path / 'r'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step 6 could not be written .* no memory for a copy .*step 3 is unharmed", line)
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["00000003"]


def test_another_error_of_the_device_is_not_explained_away(tmp_path, monkeypatch):
    def broken(tree):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bus fell off")

    monkeypatch.setattr(checkpoint, "copied_to_host", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bus fell off"):
        cli.main(cifar10.EXPERIMENT, [*WORDS, f"--run-dir={tmp_path / 'r'}"])
