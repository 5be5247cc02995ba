"""F15: the power is cut at every moment of a run; what is found then is what was promised, or newer."""

import pickle

import numpy as np
import power
import pytest
import test_checkpoint as t
import tiny

from jaxnets import errors
from jaxnets.train import Checkpoints, MetricsLog, make_strategy
from jaxnets.train.files import write_atomically
from jaxnets.train.metrics_log import read_rows
from jaxnets.train.run_folder import open_run, read_config, write_config

LAST = 4  # the saves of the last two delete an older one


@pytest.fixture
def disk(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    disk = power.Disk(tmp_path / "disk", monkeypatch)
    yield disk
    disk.stop()


def run(folder, disk):
    """What a run does to its folder; each step is promised once it is saved."""
    state = make_strategy(num_devices=1).init(t.make_state)
    with open_run(folder, "blobs", {"seed": 0}):
        write_config(folder, "blobs", {"seed": 0})
        log = MetricsLog(folder, step=0)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            for step in range(1, LAST + 1):
                log.write(step, {"loss": 1 / step})
                log.sync()
                checkpoints.save(t.at_step(state, step), score=float(step))
                checkpoints.wait()
                disk.promise(step)
            checkpoints.amend(LAST, score=1.0, extra={"is": "evaluated"})
        log.close()
        write_atomically(folder / "result.json", "{}")


def look(folder, promised):
    """Go on with what is left."""
    with open_run(folder, "blobs", {"seed": 0}):
        if promised is not None:
            assert read_config(folder)["config"] == {"seed": 0}
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.clean()
        step, lines = checkpoints.newest_whole()
        assert step is None if promised is None and step is None else step >= (promised or 0)
        assert lines == []  # not even in a save is a step complete that isn't whole
        log = MetricsLog(folder, step=step or 0)
        log.close()
        found = [int(row["step"] or 0) for row in read_rows(folder / "metrics.jsonl")]
        assert found == list(range(1, (step or 0) + 1))
    return step


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The disk of a whole run."""
    root = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        disk = power.Disk(root, patch)
        run(root / "runs" / "one", disk)
        disk.stop()
        yield disk


def any_part(seed):
    return power.any_part(np.random.default_rng(seed))


LONG = [power.names, power.zeros, any_part(0), any_part(1), any_part(2), any_part(3)]


@pytest.mark.parametrize(
    "survives",
    [
        power.nothing_else,
        power.all_but("state"),
        *(pytest.param(way, marks=pytest.mark.long) for way in LONG),
    ],
)
def test_a_power_cut_at_any_moment_loses_no_step_that_was_complete(recorded, tmp_path, survives):
    assert len(recorded.moments) > 100
    found, seen = set(), set()
    for i, moment in enumerate(recorded.moments):
        left = recorded.left(moment, survives)
        if (same := pickle.dumps((left, moment.promised))) not in seen:
            seen.add(same)
            power.put(left, tmp_path / str(i))
            found.add(look(tmp_path / str(i) / "runs" / "one", moment.promised))
    assert found == {None, *range(1, LAST + 1)}


def test_what_a_power_cut_leaves_is_gone_on_with(disk, tmp_path):
    """Not only found whole: read, and saved to again."""
    run(disk.root / "r", disk)
    disk.stop()
    strategy = make_strategy(num_devices=1)
    power.put(disk.left(disk.moments[-1], power.nothing_else), tmp_path / "after")
    with Checkpoints(tmp_path / "after" / "r" / "checkpoints") as checkpoints:
        state, manifest, lines = tiny.restore_latest(checkpoints, strategy.abstract(t.make_state))
        assert (manifest.step, manifest.score, manifest.extra) == (LAST, 1.0, {"is": "evaluated"})
        assert lines == []
        t.assert_same(state, t.at_step(strategy.init(t.make_state), LAST))
        checkpoints.save(t.at_step(state, LAST + 1))
        checkpoints.wait()
        assert checkpoints.is_whole(LAST + 1)


def test_a_power_cut_loses_no_run_that_is_moved_aside(disk, tmp_path):
    run(disk.root / "r", disk)
    begin = len(disk.moments)
    with open_run(disk.root / "r", "blobs", {"seed": 1}, resume=False):
        write_config(disk.root / "r", "blobs", {"seed": 1})
    disk.stop()
    for i, moment in enumerate(disk.moments[begin:]):
        for survives in (power.nothing_else, power.names):
            after = tmp_path / f"{i} {survives.__name__}"
            power.put(disk.left(moment, survives), after)
            steps = [step for path in after.glob("*/checkpoints") for step in Checkpoints(path).steps()]
            assert LAST in steps


def test_a_file_that_is_not_synced_before_its_name_is_noticed(disk):
    """That the disk loses what it may."""
    (disk.root / "new").write_text("content")
    write_atomically(disk.root / "synced", "content")
    disk.promise(0)
    for survives, found in [
        (power.nothing_else, {"new": b"", "synced": b"content"}),
        (power.names, {"new": b"", "synced": b"content"}),
        (power.zeros, {"new": bytes(7), "synced": b"content"}),
    ]:
        assert disk.left(disk.moments[-1], survives) == found
    assert disk.left(disk.moments[0], power.names) == {}


def test_nothing_is_whole_without_its_first_sync(disk, tmp_path, monkeypatch):
    """With files that are not synced the same cuts are told as damage, not read."""
    monkeypatch.setattr("jaxnets.train.files.sync", lambda path: None)
    with Checkpoints(disk.root / "c") as checkpoints:
        checkpoints.save(make_strategy(num_devices=1).init(t.make_state))
    power.put(disk.left(disk.moments[-1], power.names), tmp_path / "after")
    with pytest.raises(errors.CheckpointError, match="is damaged"):
        Checkpoints(tmp_path / "after" / "c").newest_whole()
