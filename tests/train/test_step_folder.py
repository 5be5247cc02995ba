"""A folder of a step is never taken for what it isn't, wherever its making or its end is broken off."""

import shutil
from pathlib import Path

import pytest

from jaxnets.train import files, step_folder

CHANGES = [(Path, name) for name in ("mkdir", "touch", "unlink", "rmdir", "replace", "rename")]
CHANGES += [(shutil, "rmtree"), (files, "sync")]


class Killed(BaseException):
    """Nothing that the code catches: what is on the disk stays as a kill would leave it."""


def broken_off(patch, work, after):
    """Whether the work had more changes of the disk than that; it was broken off before the next one."""
    done = 0

    def counted(change):
        def changed(*args, **kwargs):
            nonlocal done
            if done == after:
                raise Killed
            done += 1
            return change(*args, **kwargs)

        return changed

    with patch.context() as inner:
        for owner, name in CHANGES:
            inner.setattr(owner, name, counted(getattr(owner, name)))
        try:
            work()
        except Killed:
            return True
    return False


def save(folder):
    step_folder.make(folder)
    (folder / "state" / "d").mkdir(parents=True)
    for name in ("a", "d/b"):
        (folder / "state" / name).write_text("x")
    files.write_atomically(folder / "manifest.json", "{}")
    step_folder.finish(folder)


@pytest.mark.parametrize("work", [save, step_folder.remove], ids=["save", "remove"])
def test_what_a_kill_leaves_is_a_step_or_can_go(work, tmp_path, monkeypatch):
    folder, after, seen = tmp_path / "c" / "00000001", 0, set()
    while True:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        if work is step_folder.remove:
            save(folder)
        if not broken_off(monkeypatch, lambda: work(folder), after):
            break
        after += 1
        assert not step_folder.has_lost_manifest(folder), after
        if folder.exists():
            is_whole = (folder / "manifest.json").exists()
            assert step_folder.is_left_over(folder) != is_whole, after
            if is_whole:
                assert len(list((folder / "state").rglob("*"))) == 3, after
            seen.add(is_whole)
            step_folder.remove(folder)
            assert list(folder.parent.iterdir()) == []
    assert after >= 6
    assert seen == {True, False}


def test_what_is_not_marked_may_be_a_step(tmp_path):
    folder = tmp_path / "00000001"
    save(folder)
    (folder / "manifest.json").unlink()
    assert step_folder.has_lost_manifest(folder)
    assert not step_folder.is_left_over(folder)
    assert step_folder.set_aside(folder).name == "00000001.damaged"
    save(folder)
    assert step_folder.set_aside(folder).name == "00000001.damaged.2"
    assert step_folder.numbered(tmp_path) == []
    assert step_folder.those_set_aside(tmp_path) == ["00000001.damaged", "00000001.damaged.2"]
    (folder / "state" / "d").mkdir(parents=True)
    assert step_folder.is_left_over(folder)
