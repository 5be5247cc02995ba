"""Damage, kills and ends at the worst moments: what is restored is what was written, or an error."""

import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import processes
import pytest
import test_checkpoint as t
import tiny

from jaxnets import errors
from jaxnets.train import Checkpoints, array_store, make_strategy


@pytest.fixture
def strategy():
    return make_strategy(num_devices=1)


@pytest.fixture
def two(tmp_path, strategy):
    """A folder with the checkpoints of steps 3 and 4, and their state."""
    state = strategy.init(t.make_state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (3, 4):
            checkpoints.save(t.at_step(state, step), score=0.5, extra={"step": step})
    return tmp_path / "c", state


def files_of(folder, step=4):
    return sorted(p for p in (folder / f"{step:08d}").rglob("*") if p.is_file())


def cut(path):
    path.write_bytes(path.read_bytes()[:-1] if path.stat().st_size else b"x")


def empty(path):
    path.write_bytes(b"" if path.stat().st_size else b"x")


@pytest.mark.parametrize("harm", [cut, empty, os.unlink], ids=lambda harm: harm.__name__)
def test_a_damaged_step_is_set_aside_and_an_older_one_taken(two, strategy, harm, tmp_path):
    folder, state = two
    abstract = strategy.abstract(t.make_state)
    names = [p.relative_to(folder) for p in files_of(folder)]
    assert len(names) > 5
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    for name in names:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        harm(folder / name)
        with pytest.raises(errors.DamagedError, match=rf"step 4 is damaged: .*{name.name}"):
            Checkpoints(folder).restore(4, abstract)
        assert (folder / "00000004").exists()  # asked for by its number it stays where it is
        restored, manifest, lines = tiny.restore_latest(Checkpoints(folder), abstract)
        t.assert_same(t.at_step(state, 3), restored)
        assert manifest.extra == {"step": 3}
        assert len(lines) == 1
        assert "\n" not in lines[0]
        for word in ("step 4 is damaged", name.name, "kept as 00000004.damaged", "step 3 is taken"):
            assert word in lines[0]
        assert sorted(p.name for p in folder.iterdir()) == ["00000003", "00000004.damaged"]
        assert Checkpoints(folder).clean() == []
    with Checkpoints(folder) as checkpoints:  # and the run comes to that step again
        checkpoints.save(t.at_step(state, 4))
    cut(files_of(folder)[0])
    tiny.restore_latest(Checkpoints(folder), abstract)
    assert sorted(p.name for p in folder.iterdir())[-2:] == ["00000004.damaged", "00000004.damaged.2"]


def test_a_copy_that_was_broken_off_is_never_taken(two, strategy, tmp_path):
    folder, state = two
    abstract = strategy.abstract(t.make_state)
    files = files_of(folder)
    last = sorted(files, key=lambda p: p.name == "manifest.json")
    for order in (last, last[::-1]):  # as a copy goes, the manifest may come first
        for number in range(len(order)):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder / "00000003", copy / "00000003")
            for path in order[:number]:
                to = copy / path.relative_to(folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)
            checkpoints = Checkpoints(copy)
            removed = checkpoints.clean()
            step, lines = checkpoints.newest_whole()
            assert step == 3
            assert len(removed) + len(lines) == bool(number)
    t.assert_same(t.at_step(state, 3), checkpoints.restore(3, abstract)[0])


def test_a_run_never_begins_anew_in_silence(two, strategy):
    folder, _ = two
    abstract = strategy.abstract(t.make_state)
    for step in (3, 4):
        cut(files_of(folder, step)[-1])
    for _ in range(2):
        with pytest.raises(
            errors.CheckpointError, match=r"no checkpoint in .* is whole: .*step 4"
        ) as error:
            tiny.restore_latest(Checkpoints(folder), abstract)
        assert "\n" not in str(error.value)
        assert Checkpoints(folder).steps() == [3, 4]
    for step in (3, 4):
        (folder / f"{step:08d}").rename(folder / f"{step:08d}.damaged")
    with pytest.raises(errors.CheckpointError, match=r"00000004.damaged was set aside as damaged"):
        tiny.restore_latest(Checkpoints(folder), abstract)
    shutil.rmtree(folder)
    assert tiny.restore_latest(Checkpoints(folder), abstract) == (None, None, [])


def test_another_model_is_no_damage(two, strategy):
    folder, _ = two
    abstract = strategy.abstract(lambda: t.make_state(width=65))
    with pytest.raises(errors.CheckpointError, match="another model or optimizer"):
        tiny.restore_latest(Checkpoints(folder), abstract)
    assert Checkpoints(folder).steps() == [3, 4]


def test_a_flipped_bit_of_the_manifest_is_noticed_or_means_the_same(two):
    folder, _ = two
    path = folder / "00000004" / "manifest.json"
    content = path.read_bytes()
    whole = Checkpoints(folder).manifest(4)
    rng = np.random.default_rng(0)
    noticed = 0
    for place in [0, len(content) - 1, *rng.integers(0, len(content), 300)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert Checkpoints(folder).manifest(4) == whole
        except errors.DamagedError:
            noticed += 1
    assert noticed > 290


def test_a_step_that_is_deleted_while_it_is_read(two, strategy, monkeypatch):
    """Whenever the trainer deletes it, a reader gets all of it, or hears that it is gone."""
    folder, state = two
    abstract = strategy.abstract(t.make_state)
    shutil.copytree(folder / "00000004", folder / "00000005")
    path = folder / "00000005" / "manifest.json"
    path.write_bytes((folder / "00000004" / "manifest.json").read_bytes())
    load, gone = array_store.load, r"step 4 was deleted while it was read.*try again"

    def load_late(*args):
        Checkpoints(folder).discard(4)
        return load(*args)

    def load_early(*args):
        restored = load(*args)
        Checkpoints(folder).discard(4)
        return restored

    def load_parts(*args):  # what a store may make of a missing file: zeros
        Checkpoints(folder).discard(4)
        return jax.tree.map(lambda x: x, state.__dict__)

    for interfering in (load_late, load_early, load_parts):
        shutil.copytree(folder / "00000005", folder / "00000004", dirs_exist_ok=True)
        monkeypatch.setattr(array_store, "load", interfering)
        with pytest.raises(errors.CheckpointError, match=gone) as error:
            Checkpoints(folder).restore(4, abstract)
        assert not isinstance(error.value, errors.DamagedError)
    shutil.copytree(folder / "00000005", folder / "00000004")
    read = Checkpoints(folder)
    manifest = read.manifest(4)
    read.discard(4)
    monkeypatch.setattr(read, "manifest", lambda step: manifest)
    with pytest.raises(errors.CheckpointError, match=gone):
        read.restore(4, abstract)


# One Python that has imported everything, and a fork of it for each end: JAX starts after that.
FORKS = """
    import functools, os, shutil, signal
    from pathlib import Path
    import test_checkpoint as t
    from jaxnets.train import (
        Checkpoints, array_store, checkpoint, files, make_strategy, manifest, step_folder
    )
    array_store.prepare()

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def fork(name):
        "The number of the child, and 0 in it, as os.fork; the parent waits for its end."
        sys.stdout.flush(); sys.stderr.flush()
        if not (pid := os.fork()):
            return True
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(name, status, flush=True)
        return False

    @functools.cache
    def state():
        return make_strategy(num_devices=1).init(t.make_state)

    def save(checkpoints, step):
        checkpoints.save(t.at_step(state(), step), score=-step)
"""

KILLS = (
    FORKS
    + """
    def kill_after_the_mark():
        touch = Path.touch
        Path.touch = lambda *a: (touch(*a), die())

    def kill_begun():
        begin = array_store.begin_save
        array_store.begin_save = lambda *a: (begin(*a), die)[1]

    def kill_in_orbax():
        from orbax.checkpoint import v1
        begin = v1.save_async
        def save_and_die(*args):
            response = begin(*args)
            while not list(Path(args[0]).parent.glob("*/*")):
                pass
            die()
        v1.save_async = save_and_die

    def kill_before_manifest():
        manifest.write_manifest = die

    def kill_before_rename():
        Path.replace = die

    def kill_after_rename():
        replace = Path.replace
        Path.replace = lambda *a: (replace(*a), die())

    def kill_before_the_mark_goes():
        step_folder.finish = die

    def kill_before_deletion():
        Checkpoints._discard_old = die

    def in_deletion(hook):
        discard = Checkpoints._discard_old
        Checkpoints._discard_old = lambda *a: (hook(), discard(*a))

    def kill_after_the_manifest_goes():
        in_deletion(lambda: setattr(Path, "iterdir", die))

    def kill_in_deletion_of_files():
        remove = shutil.rmtree
        def halfway(path, **_):
            remove(next(Path(path).rglob("d")))
            die()
        shutil.rmtree = halfway

    for name, hook in list(globals().items()):
        if name.startswith("kill_") and fork(name):
            checkpoints = Checkpoints(Path({folder!r}, name), num_recent=1)
            for step in (1, 2):
                save(checkpoints, step)
                checkpoints.wait()
            hook()
            save(checkpoints, 3)
            checkpoints.wait()
            sys.exit(0)
"""
)


def test_a_kill_at_the_worst_moments(tmp_path, strategy):
    """After each the newest complete step is whole, and the next start and save leave nothing behind."""
    (ended,) = processes.run(KILLS.format(folder=str(tmp_path)), 1, joined=False, timeout=300)
    status = dict(line.split() for line in ended.out.splitlines() if line.startswith("kill_"))
    assert len(status) == 10
    assert set(status.values()) == {str(-signal.SIGKILL)}, ended.err
    abstract = strategy.abstract(t.make_state)
    state = strategy.init(t.make_state)
    for name in status:
        newest = 2 if name in list(status)[:5] else 3
        with Checkpoints(tmp_path / name, num_recent=1) as checkpoints:
            checkpoints.clean()
            assert all(map(checkpoints.is_whole, checkpoints.steps())), name
            restored, manifest, lines = tiny.restore_latest(checkpoints, abstract)
            assert (manifest.step, lines) == (newest, []), name
            t.assert_same(t.at_step(state, newest), restored)
            checkpoints.save(t.at_step(state, 3), score=-3)
            checkpoints.save(t.at_step(state, 4), score=-4)
            checkpoints.wait()
        left = sorted(p.name for p in (tmp_path / name).iterdir())
        assert left == ["00000001", "00000004"], name
        assert not [
            p for p in (tmp_path / name).rglob("*") if "tmp" in p.name or p.name == "unfinished"
        ], name


ENDS = (
    FORKS
    + """
    import atexit

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    def end_of_main(checkpoints):
        save(checkpoints, 7)

    def end_by_exit(checkpoints):
        save(checkpoints, 7)
        sys.exit(3)

    def end_by_exception(checkpoints):
        save(checkpoints, 7)
        raise ValueError("oops")

    def end_in_context(checkpoints):
        with checkpoints:
            save(checkpoints, 7)
            raise ValueError("oops")

    def end_with_a_failure(checkpoints):
        manifest.write_manifest = broken
        save(checkpoints, 7)

    def end_within_atexit(checkpoints):
        atexit.register(save, checkpoints, 7)

    for name, end in list(globals().items()):
        if name.startswith("end_") and fork(name):
            checkpoints = Checkpoints(Path({folder!r}, name))
            end(checkpoints)
            break
"""
)


def test_an_end_within_a_save(tmp_path, strategy):
    """The interpreter doesn't end before the save is complete, or has said why it isn't."""
    (ended,) = processes.run(ENDS.format(folder=str(tmp_path)), 1, joined=False)
    status = dict(line.split() for line in ended.out.splitlines() if line.startswith("end_"))
    assert status == {
        "end_of_main": "0", "end_by_exit": "3", "end_by_exception": "1", "end_in_context": "1",
        "end_with_a_failure": "0", "end_within_atexit": "0",
    }, ended.err  # fmt: skip
    for name in status:
        steps = [] if name in ("end_with_a_failure", "end_within_atexit") else [7]
        assert Checkpoints(tmp_path / name).steps() == steps, name
        assert not list((tmp_path / name).glob("*/*.tmp*")), name
        if not steps:
            assert Checkpoints(tmp_path / name).clean() == []
    said = [line for line in ended.err.splitlines() if "could not be written" in line]
    assert len(said) == 2, ended.err
    assert said[0].startswith("error: the checkpoint of step 7 could not be written to ")
    assert "the disk is full" in said[0]
    assert "the program is ending" in said[1]
    assert ended.err.count("ValueError: oops") == 2


def test_a_folder_that_may_only_be_read(two, strategy, tmp_path):
    """What is there can be evaluated; a save says at once why it can't be."""
    folder, state = two
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shutil.copytree(folder, disk / "c")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        checkpoints = Checkpoints(disk / "c")
        restored, _ = checkpoints.restore(checkpoints.best(), strategy.abstract(t.make_state))
        t.assert_same(t.at_step(state, 3), restored)
        with pytest.raises(errors.CheckpointError, match=r"step 5 .*Read-only file system; .*step 4"):
            checkpoints.save(t.at_step(state, 5))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_is_a_file(tmp_path, strategy):
    state = strategy.init(t.make_state)
    (tmp_path / "c").write_text("x")
    for folder in (tmp_path / "c", tmp_path / "c" / "below"):
        checkpoints = Checkpoints(folder)
        assert tiny.restore_latest(checkpoints, strategy.abstract(t.make_state)) == (None, None, [])
        with pytest.raises(errors.CheckpointError, match=r"step 0 could not .*; there is no earlier"):
            checkpoints.save(state)
    assert (tmp_path / "c").read_text() == "x"
