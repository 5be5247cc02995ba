"""What earlier versions wrote can be gone on with; what a later one writes is refused as such."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import golden_run
import pytest
import tiny

from jaxnets import errors
from jaxnets.train import Checkpoints, make_strategy, manifest

GOLDENS = sorted(Path(__file__).parents[1].glob("goldens/checkpoint-*"))


def test_there_is_one_of_each_version():
    assert [path.name for path in GOLDENS] == ["checkpoint-0.1.0"]


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda path: path.name)
@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_of_that_version_is_gone_on_with(folder, devices):
    expected = json.loads((folder / "expected.json").read_text())
    abstract = make_strategy(num_devices=devices).abstract(golden_run.make_state)
    state, found, lines = tiny.restore_latest(Checkpoints(folder), abstract)
    assert (found.step, lines) == (expected["step"], [])
    assert found.versions["jaxnets"] == folder.name.removeprefix("checkpoint-")
    after, loss = golden_run.step(state)
    assert float(loss) == pytest.approx(expected["next_loss"], rel=1e-6)
    assert int(after.step) == expected["step"] + 1


def test_what_a_newer_version_wrote_is_refused_and_kept(tmp_path):
    shutil.copytree(GOLDENS[0], tmp_path / "c")
    path = tmp_path / "c" / "00000003" / "manifest.json"
    content = json.loads(path.read_text())["content"]
    content["format"] = manifest.FORMAT + 1
    content["versions"]["jaxnets"] = "7.0"
    content["what_came_since"] = {}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({"content": content, "sha256": digest}))
    abstract = make_strategy(num_devices=1).abstract(golden_run.make_state)
    checkpoints = Checkpoints(tmp_path / "c")
    for read in (partial(tiny.restore_latest, checkpoints), partial(checkpoints.restore, 3)):
        with pytest.raises(errors.CheckpointError, match=r"written by a newer jaxnets \(7.0; this is "):
            read(abstract)
    assert path.exists()
