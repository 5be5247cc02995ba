"""Checkpoints of a run of several processes, which stand in for hosts with one shared folder."""

import json

import jax
import processes
import test_checkpoint as t
from jax.sharding import PartitionSpec as P

from jaxnets.train import Checkpoints, make_strategy

RULES = (("w", P("data")), (".*", P()))

BEGIN = """
    import dataclasses, json, resource, shutil, threading, time
    from pathlib import Path
    import jax
    import jax.numpy as jnp
    import numpy as np
    import test_checkpoint as t
    import tiny
    from test_checkpoint_hosts import RULES
    from jaxnets import errors
    from jaxnets.train import Checkpoints, array_store, make_strategy, manifest
    from jaxnets.train.host_copy import copied_to_host

    folder, me = Path({folder!r}), hosts.index()
    strategy = make_strategy(rules=RULES)
    state = strategy.init(t.make_state)
    abstract = strategy.abstract(t.make_state)

    def at_step(state, n):  # which every process must have, as a global array
        step = jax.device_put(np.int32(n), state.step.sharding)
        return dataclasses.replace(state, step=step)

    def say(name, value):
        print("SAID " + json.dumps([name, value]), flush=True)

    def local(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return [(str(s.index), np.asarray(s.data).tolist()) for s in x.addressable_shards]

    def same(one, two):
        return all(local(a) == local(b) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))

    def error_of(function, *args):
        start = time.monotonic()
        try:
            function(*args)
        except errors.UserError as error:
            assert time.monotonic() - start < 60, "it took too long to learn of it"
            return [type(error).__name__, str(error)]
"""


def said(ended):
    """What the processes said, by name; all must have said the same."""
    found = [
        dict(json.loads(line.removeprefix("SAID ")) for line in e.out.splitlines() if "SAID " in line)
        for e in ended
    ]
    for other in found[1:]:
        assert other == found[0]
    return found[0]


SAVE = (
    BEGIN
    + """
    checkpoints = Checkpoints(folder)
    assert not state.params["w"].is_fully_addressable
    from jax.experimental import multihost_utils

    collectives = []
    for name in ("broadcast_one_to_all", "process_allgather", "sync_global_devices"):
        def watched(*args, name=name, original=getattr(multihost_utils, name), **options):
            collectives.append(threading.current_thread() is threading.main_thread())
            return original(*args, **options)
        setattr(multihost_utils, name, watched)

    # Each process copies what it has, once; who is the first, and writes it, changes.
    copies = jax.tree.leaves(copied_to_host(state))
    say("bytes", [sum(s.data.nbytes for s in x.addressable_shards) / x.nbytes for x in copies])
    firsts = [x.sharding.mesh.devices.flat[0].process_index for x in copies]
    say("firsts", [sorted(set(firsts)), {{x.sharding.memory_kind for x in copies}} == {{"pinned_host"}}])

    # A killed save of the same step is in the way, and steps with collectives go on behind the save.
    if me == 0:
        (folder / "00000003" / "state" / "junk").mkdir(parents=True)
        (folder / "00000003" / "state" / "junk" / "x").write_text("x")
        (folder / "00000003" / "unfinished").touch()
    step = jax.jit(
        lambda x: x - 0.5 * jnp.mean(x), donate_argnums=0, out_shardings=state.params["w"].sharding
    )
    checkpoints.save(at_step(state, 3), score=0.5, extra={{"a": [1]}})
    w = state.params["w"]
    for _ in range(50):
        w = jax.block_until_ready(step(w))  # two devices of one CPU get stuck in more at a time
        checkpoints.check()
    checkpoints.wait()
    jax.block_until_ready(w)
    state = strategy.init(t.make_state)

    restored, found = checkpoints.restore(3, abstract)
    say("same", same(at_step(state, 3), restored))
    say("sharding", str(restored.params["w"].sharding.spec))
    say("extra", found.extra)
    for n in (4, 5, 6):
        checkpoints.save(at_step(state, n), score=-n)
    checkpoints.wait()
    say("kept", [checkpoints.steps(), checkpoints.ranked(), checkpoints.latest(), checkpoints.best()])
    if me == 0:
        (folder / "00000009").mkdir()
    say("cleaned", checkpoints.clean())
    checkpoints.discard(5)
    say("discarded", checkpoints.steps())

    # Damage: by its number it is an error everywhere, without one an older step is taken everywhere.
    hosts.barrier("whole")
    if me == 0:
        path = max((folder / "00000006").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1])
    hosts.barrier("damaged")
    say("explicit", error_of(checkpoints.restore, 6, abstract))
    restored, found, lines = tiny.restore_latest(checkpoints, abstract)
    say("fallback", [found.step, same(at_step(state, 3), restored), lines])
    say("missing", error_of(checkpoints.restore, 8, abstract))
    say("left", sorted(p.name for p in folder.iterdir()))
    say("collectives", [len(collectives) > 0, all(collectives)])
"""
)


def test_two_processes_save_and_restore_as_one(tmp_path):
    ended = processes.run(SAVE.format(folder=str(tmp_path / "c")), 2, timeout=120)
    found = said(ended)
    assert sorted(set(found["bytes"])) == [0.5, 1.0]
    assert found["firsts"] == [[0, 1], True]
    assert found["same"] is True
    assert found["sharding"] == str(P("data"))
    assert found["extra"] == {"a": [1]}
    assert found["kept"] == [[3, 5, 6], [3, 5, 6], 6, 3]
    assert found["cleaned"] == ["00000009"]
    assert found["discarded"] == [3, 6]
    assert found["explicit"][0] == "DamagedError"
    assert "step 6 is damaged" in found["explicit"][1]
    step, same, (line,) = found["fallback"]
    assert (step, same) == (3, True)
    assert "step 3 is taken" in line
    assert "no checkpoint of step 8" in found["missing"][1]
    assert found["left"] == ["00000003", "00000006.damaged"]
    assert found["collectives"] == [True, True]  # none from the thread that writes
    # One process goes on with it, on other devices; every file that the two wrote is in the manifest.
    checkpoints = Checkpoints(tmp_path / "c")
    for devices in (1, 8):
        strategy = make_strategy(num_devices=devices, rules=RULES)
        state, manifest = checkpoints.restore(3, strategy.abstract(t.make_state))
        t.assert_same(t.at_step(jax.jit(t.make_state)(), 3), state)
    there = [p for p in (tmp_path / "c" / "00000003").rglob("*") if p.is_file()]
    names = {p.relative_to(tmp_path / "c" / "00000003").as_posix() for p in there}
    assert set(manifest.files) == names - {"manifest.json"}
    assert any("process_1/" in name and size > 1000 for name, (size, _) in manifest.files.items())


FAIL = (
    BEGIN
    + """
    checkpoints = Checkpoints(folder)
    checkpoints.save(at_step(state, 1))
    checkpoints.wait()
    large = strategy.init(lambda: t.make_state(width=20_000))

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    # The kernel fails the writes of one process alone, within Orbax's own code.
    for bad in (0, 1):
        if me == bad:
            limit(100_000)
        checkpoints.save(at_step(large, 2))
        say(f"limit {{bad}}", error_of(checkpoints.wait))
        limit(resource.RLIM_INFINITY)

    # One can't make its files safe; the first can't make the step's folder.
    seal = manifest.seal_files
    if me == 1:
        manifest.seal_files = full
    checkpoints.save(at_step(state, 2))
    checkpoints._pending.exception()
    checkpoints.check()  # one may come here before the other knows
    say("seal", error_of(checkpoints.save, at_step(state, 2)))
    manifest.seal_files = seal
    mkdir = Path.mkdir
    if me == 0:
        Path.mkdir = full
    say("begin", error_of(checkpoints.save, at_step(state, 2)))
    Path.mkdir = mkdir

    # One can't read: its host doesn't see a file.
    orbax = array_store._orbax()
    load = orbax.load
    if me == 1:
        orbax.load = lambda path, abstract: load(path + "/nowhere", abstract)
    say("load", error_of(checkpoints.restore, 1, abstract))
    orbax.load = load

    say("steps", checkpoints.steps())
    say("left", sorted(p.name for p in folder.iterdir()))
    checkpoints.save(at_step(state, 2))
    checkpoints.wait()
    restored, _ = checkpoints.restore(2, abstract)
    say("after", same(at_step(state, 2), restored))
"""
)


def test_what_fails_on_one_process_is_the_same_error_on_all(tmp_path):
    ended = processes.run(FAIL.format(folder=str(tmp_path / "c")), 2, timeout=200)
    found = said(ended)
    for name, why in {
        "limit 0": "process 0: ",
        "limit 1": "process 1: ",
        "seal": "process 1: the disk is full (",
        "begin": "the disk is full (",
        "load": "process 1: the checkpoint in ",
    }.items():
        kind, line = found[name]
        assert kind == "CheckpointError", name
        assert why in line, name
        assert "\n" not in line
        assert "that of step 1 is unharmed" in line or name == "load"
    assert found["steps"] == [1]
    assert found["left"] == ["00000001"]
    assert found["after"] is True
