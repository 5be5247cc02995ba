"""The report of a step that wasn't finite, where the state is cut over several processes."""

import dataclasses
import json

import processes
import pytest
import test_diagnosis as t

from jaxnets import cli, metrics
from jaxnets.data import Batches
from jaxnets.recipe import Recipe

BAD = int(Batches(48, t.BATCH, 48, seed=0)[1]["index"][12])  # in the second step and the second half


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing to choose."""


def make_recipe(config, options):
    init_fn, loss_fn = t.problem()
    data = t.data()
    data["x"][BAD] = 1e25  # finite, but its square isn't

    def eval_fn(params, model_state, batch):
        terms, _, _ = loss_fn(params, model_state, batch, key=None)
        return {"loss": metrics.Mean.of(terms["loss"], batch["mask"])}

    return Recipe("huge", init_fn, loss_fn, eval_fn, t.TX, data, data, 48 * 4, t.BATCH, monitor="loss")


EXPERIMENT = cli.Experiment("huge", "Has one number too large.", Config(), make_recipe)

SCRIPT = """
    import test_diagnosis_processes as t
    from jaxnets.train import diagnosis, hooks, watchdog

    seen, beat, decide = [], watchdog.Watchdog.beat, diagnosis.by_first
    watchdog.Watchdog.beat = lambda self, section: (seen.append(section), beat(self, section))[1]
    diagnosis.by_first = lambda *a, **k: (print("AT", seen[-1], flush=True), decide(*a, **k))[1]
    if hosts.is_first():  # which shows the progress, and asks for the metrics of every step
        hooks.ShowProgress.__init__.__kwdefaults__["every_s"] = 0.0
    sys.exit(t.cli.main(t.EXPERIMENT, ["train", "--strategy", "fsdp", "--run-dir", {folder!r}]))
"""


@pytest.mark.timeout(300)
def test_two_processes_tell_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(EXPERIMENT, ["train", "--num-devices", "1", "--run-dir", str(one)]) == 2
    ended = processes.run(SCRIPT.format(folder=str(two)), devices=1, timeout=200, code=2)
    for e in ended:
        assert "error: step 2 was not applied" in e.err
        assert "AT save" in e.out  # where the watchdog has no limit
    assert f"the report is in {two / 'nonfinite.json'}" in ended[0].err
    expected, found = (json.loads((run / "nonfinite.json").read_text()) for run in (one, two))
    assert found == expected
    assert (found["step"], found["last_good"], found["examples"]) == (2, 1, [BAD])
    assert "from" in found["operands"][0]  # which depends on the parameters
