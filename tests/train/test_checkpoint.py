import concurrent.futures
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import errors
from jaxnets.train import Checkpoints, create_state, make_strategy

TX = optax.adam(0.1)


def init_fn(key, width=64):
    # Incompressible and larger than what Orbax keeps inside its checksummed index.
    return {"w": jax.random.normal(key, (width, 40)), "b": jnp.ones(3, jnp.bfloat16)}, {"n": jnp.ones(2)}


def make_state(seed=0, **kwargs):
    return create_state(lambda key: init_fn(key, **kwargs), TX, key=jax.random.key(seed))


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def leaves(state):
    is_key = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, is_key) else x)
        for x in jax.tree.leaves(state)
    ]


def assert_same(one, two):
    for a, b in zip(leaves(one), leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def strategy():
    return make_strategy(num_devices=2)


@pytest.fixture
def saved(tmp_path, strategy):
    """A folder with the checkpoint of step 3, and its state."""
    state = at_step(strategy.init(make_state), 3)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, score=0.5, extra={"hello": [1, 2]})
    return tmp_path / "checkpoints", state


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_restored_is_used_up_by_the_next_step(saved, devices):
    """Or a run that goes on would hold the state twice where a fresh one holds it once."""
    folder, _ = saved
    strategy = make_strategy(num_devices=devices)

    def make_step(axis_name=None):
        def step(state, batch):
            return jax.tree.map(lambda x: x, dataclasses.replace(state, step=state.step + 1)), {}

        return step

    step = strategy.compile_step(make_step)
    fresh = strategy.init(make_state)
    restored, _ = Checkpoints(folder).restore(3, strategy.abstract(make_state))
    for state in (fresh, restored):
        step(state, {"x": np.zeros(devices)})
        assert [x.is_deleted() for x in jax.tree.leaves(state)] == [True] * len(jax.tree.leaves(state))


@pytest.mark.parametrize(("name", "devices"), [("jit", 1), ("jit", 8), ("pmap", 4)])
def test_what_is_restored_is_what_was_saved_on_any_devices(saved, name, devices):
    folder, state = saved
    strategy = make_strategy(name, num_devices=devices)
    restored, manifest = Checkpoints(folder).restore(3, strategy.abstract(make_state))
    assert_same(state, restored)
    assert manifest.extra == {"hello": [1, 2]}
    assert len(restored.params["w"].sharding.device_set) == devices


def test_the_state_may_be_used_up_at_once(tmp_path, strategy):
    state = strategy.init(make_state)
    expected = leaves(state)
    overwrite = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
        for name in ("w",):
            for _ in range(20):
                state.params[name] = overwrite(state.params[name])
    restored, _ = Checkpoints(tmp_path / "c").restore(0, strategy.abstract(make_state))
    for a, b in zip(expected, leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_latest_and_the_best_are_kept(tmp_path, strategy):
    state = strategy.init(make_state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step, score in enumerate([0.1, 0.7, 0.7, None, 0.3], start=1):
            checkpoints.save(at_step(state, step), score=score)
            checkpoints.wait()
            assert checkpoints.newest == step
            assert checkpoints.latest() == step
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best() == 2
    names = ["00000002", "00000004", "00000005"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == names
    with Checkpoints(tmp_path / "d", maximize=False) as checkpoints:
        for step, score in enumerate([0.5, 0.1, 0.3], start=1):
            checkpoints.save(at_step(state, step), score=score)
        checkpoints.wait()
        assert checkpoints.best() == 2


def test_the_newest_step_is_known_without_a_look(saved):
    """A thread that serves a signal asks for it, and must not wait for a store."""
    folder, state = saved
    checkpoints = Checkpoints(folder)
    assert checkpoints.newest is None
    assert checkpoints.newest_whole()[0] == checkpoints.newest == 3
    checkpoints.save(at_step(state, 4))
    checkpoints.wait()
    assert checkpoints.newest == 4
    checkpoints.discard(4)
    shutil.rmtree(folder)
    assert checkpoints.newest == 3


def test_several_of_the_best_are_kept(tmp_path, strategy):
    state = strategy.init(make_state)
    kept = []
    with Checkpoints(tmp_path / "c", num_best=2, num_recent=1) as checkpoints:
        for step, score in enumerate([0.1, 0.7, float("nan"), None, 0.7, 0.3, 0.8], start=1):
            checkpoints.save(at_step(state, step), score=score)
            checkpoints.wait()
            kept.append(checkpoints.steps())
        assert checkpoints.ranked() == [7, 2]
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [2, 5], [2, 5, 6], [2, 7]]
    with pytest.raises(errors.ConfigError, match="not the best 0"):
        Checkpoints(tmp_path / "c", num_best=0)
    with pytest.raises(errors.ConfigError, match="the latest checkpoint is kept, not 0"):
        Checkpoints(tmp_path / "c", num_recent=0)


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(saved, strategy):
    folder, state = saved
    partial = folder / "00000007"
    shutil.copytree(folder / "00000003", partial)
    (partial / "manifest.json").rename(partial / "manifest.json.tmp")
    (partial / "unfinished").touch()
    (folder / "00000008").mkdir()  # killed before anything was in it
    (folder / "00000003" / "unfinished").touch()  # killed after all was
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [3]
    assert checkpoints.clean() == ["00000007", "00000008"]
    assert [path.name for path in folder.iterdir()] == ["00000003"]
    assert not (folder / "00000003" / "unfinished").exists()
    partial.mkdir()  # and without cleaning a new save of that step replaces it
    for name in ("junk", "unfinished"):
        (partial / name).write_text("")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(at_step(state, 7))
    assert Checkpoints(folder).latest() == 7
    assert sorted(path.name for path in partial.iterdir()) == ["manifest.json", "state"]
    assert Checkpoints(folder).newest_whole() == (7, [])


def test_a_step_that_lost_its_manifest_is_kept(saved, strategy, capsys):
    """Only what a save left unfinished is deleted: a manifest may be lost by a mistake."""
    folder, state = saved
    for step in (2, 5):
        shutil.copytree(folder / "00000003", folder / f"{step:08d}")
        (folder / f"{step:08d}" / "manifest.json").unlink()
    lost = sorted(p.name for p in (folder / "00000005").rglob("*"))
    checkpoints = Checkpoints(folder)
    assert checkpoints.clean() == []
    with pytest.raises(errors.DamagedError, match=r"step 5 is damaged: .*/manifest\.json is missing"):
        checkpoints.restore(5, strategy.abstract(make_state))
    with pytest.raises(errors.CheckpointError, match=r"no checkpoint of step 4 .*there are: 3\)"):
        checkpoints.restore(4, strategy.abstract(make_state))
    step, lines = checkpoints.newest_whole()
    assert (step, len(lines)) == (3, 2)
    for number in (2, 5):
        (line,) = [line for line in lines if f"step {number} is damaged: " in line]
        assert "manifest.json is missing; it is kept as 0000000" in line
    assert sorted(p.name for p in (folder / "00000005.damaged").rglob("*")) == lost
    (folder / "00000005.damaged").rename(folder / "00000005")
    with Checkpoints(
        folder
    ) as checkpoints:  # and without looking before, where that step is saved again
        checkpoints.save(at_step(state, 5))
    assert "warning: the checkpoint of step 5 is damaged: " in capsys.readouterr().err
    assert sorted(p.name for p in (folder / "00000005.damaged").rglob("*")) == lost
    assert Checkpoints(folder).newest_whole() == (5, [])
    for number in (3, 5):
        (folder / f"{number:08d}" / "manifest.json").unlink()
    with pytest.raises(
        errors.CheckpointError, match=r"no checkpoint in .* is whole: .*step 5 is damaged"
    ):
        Checkpoints(folder).newest_whole()
    assert (folder / "00000003").exists()


def test_a_flipped_byte_anywhere_is_noticed(saved, strategy):
    folder, _ = saved
    abstract = strategy.abstract(make_state)
    files = sorted(p for p in (folder / "00000003").rglob("*") if p.is_file())
    assert any(p.stat().st_size > 8000 for p in files)
    for path in files:
        content = path.read_bytes()
        for place in sorted({0, len(content) // 2, len(content) - 1}):
            flipped = bytearray(content)
            flipped[place : place + 1] = bytes([flipped[place] ^ 0x10]) if content else b"x"
            path.write_bytes(flipped)
            with pytest.raises(errors.CheckpointError, match=r"damaged.*00000003") as error:
                Checkpoints(folder).restore(3, abstract)
            assert "\n" not in str(error.value)
        path.write_bytes(content)
    Checkpoints(folder).restore(3, abstract)


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove"])
def test_a_file_cut_short_or_gone_is_noticed(saved, strategy, harm):
    folder, _ = saved
    for path in sorted(p for p in (folder / "00000003" / "state").rglob("*") if p.is_file()):
        content = path.read_bytes()
        if not content:
            continue
        path.write_bytes(content[:-1] if harm == "truncate" else b"")
        if harm == "remove":
            path.unlink()
        with pytest.raises(errors.CheckpointError, match="damaged"):
            Checkpoints(folder).restore(3, strategy.abstract(make_state))
        path.write_bytes(content)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(saved, strategy):
    folder, _ = saved

    def wider():
        return make_state(width=65)

    with pytest.raises(errors.CheckpointError, match=r"opt_state/0/mu/w is float32\[64, 40\] there"):
        Checkpoints(folder).restore(3, strategy.abstract(wider))

    def other():
        return create_state(init_fn, optax.sgd(0.1), key=jax.random.key(0))

    with pytest.raises(
        errors.CheckpointError, match=r"opt_state/0/count is int32\[\] there and missing"
    ):
        Checkpoints(folder).restore(3, strategy.abstract(other))


def test_a_step_that_is_not_there(saved, strategy):
    with pytest.raises(errors.CheckpointError, match=r"no checkpoint of step 4 .*there are: 3"):
        Checkpoints(saved[0]).restore(4, strategy.abstract(make_state))


def test_a_failed_save_is_told_and_leaves_the_last_good_one(saved, strategy, monkeypatch):
    folder, state = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr("orbax.checkpoint.v1.save_async", full)
        checkpoints.save(at_step(state, 4))
        concurrent.futures.wait([checkpoints._pending])
        with pytest.raises(errors.CheckpointError, match=r"disk is full.*step 3 is unharmed"):
            checkpoints.check()
        assert checkpoints.steps() == [3]
        assert not (folder / "00000004").exists()
        checkpoints.restore(3, strategy.abstract(make_state))


def test_what_fails_after_the_manifest_costs_no_checkpoint(saved, monkeypatch):
    folder, state = saved

    def stuck(*_, **__):
        raise PermissionError(13, "Permission denied")

    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(Checkpoints, "discard", stuck)
        checkpoints.save(at_step(state, 4), score=0.9)
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
        (folder / "00000004" / "manifest.json").write_text("{}")
        checkpoints.save(at_step(state, 5), score=0.1)
        checkpoints.wait()
        assert 5 in checkpoints.steps()
        assert checkpoints.best() == 3


def test_only_folders_of_steps_are_cleaned(saved):
    (saved[0] / "notes").mkdir()
    assert Checkpoints(saved[0]).clean() == []
    assert (saved[0] / "notes").exists()


SAVE_UNTIL_IT_FAILS = """
    import resource, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    import test_checkpoint as t
    from jaxnets import errors
    from jaxnets.train import Checkpoints, make_strategy
    strategy = make_strategy(num_devices=1)
    small, large = strategy.init(t.make_state), strategy.init(lambda: t.make_state(width=50_000))
    checkpoints = Checkpoints({folder!r})
    checkpoints.save(t.at_step(small, 1)); checkpoints.wait()
    {limit}
    checkpoints.save(t.at_step(large, 2))
    try:
        checkpoints.wait()
    except errors.CheckpointError as error:
        print(error)
    assert checkpoints.steps() == [1], checkpoints.steps()
    t.assert_same(t.at_step(small, 1), checkpoints.restore(1, strategy.abstract(t.make_state))[0])
"""


def run_script(script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )


def test_a_file_system_that_refuses_to_write_more(tmp_path, request):
    """The kernel itself fails the writes of Orbax's own code: no file may grow past 1 MB."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))"
    script = SAVE_UNTIL_IT_FAILS.format(
        tests=str(request.path.parent), folder=str(tmp_path / "c"), limit=limit
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert "step 2 could not be written" in done.stdout
    assert "step 1 is unharmed" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_full_disk(tmp_path, request):
    """A file system of 4 MB; where no one may be mounted, the test above stands in."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = run_script(
            SAVE_UNTIL_IT_FAILS.format(tests=str(request.path.parent), folder=str(disk / "c"), limit="")
        )
        assert done.returncode == 0, done.stderr
        assert "the disk is full" in done.stdout
        assert "step 1 is unharmed" in done.stdout
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_manifest_says_what_wrote_it(saved):
    manifest = json.loads((saved[0] / "00000003" / "manifest.json").read_text())["content"]
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["arrays"]["params/w"] == "float32[64, 40]"
    assert manifest["score"] == 0.5
