"""Checkpoints in an object store: whole or not there, kept, fallen back from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import errors
from jaxnets.train import Checkpoints, create_state, make_strategy

TX = optax.adam(0.1)


def init_fn(key):
    return {"w": jax.random.normal(key, (64, 40)), "b": jnp.ones(3, jnp.bfloat16)}, {"n": jnp.ones(2)}


def make_state():
    return create_state(init_fn, TX, key=jax.random.key(0))


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def assert_same(one, two):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def strategy():
    return make_strategy(num_devices=2)


def kept(store, bucket):
    """The steps that have any object left."""
    return sorted({name.split("/")[2] for name in store.objects[bucket]})


def test_steps_are_kept_and_go_and_are_read_back(store, bucket, strategy):
    state = strategy.init(make_state)
    with Checkpoints(f"gs://{bucket}/r/checkpoints") as checkpoints:
        for step, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
            checkpoints.save(at_step(state, step), score=score, extra={"hello": step})
    assert checkpoints.steps() == [1, 3, 4]
    assert kept(store, bucket) == ["00000001", "00000003", "00000004"]
    assert (checkpoints.best(), checkpoints.latest()) == (1, 4)
    restored, manifest = checkpoints.restore(4, strategy.abstract(make_state))
    assert_same(restored, state)
    assert (int(restored.step), manifest.extra) == (4, {"hello": 4})
    names = {name for name in store.objects[bucket] if "00000004/" in name}
    assert {f"r/checkpoints/00000004/{name}" for name in manifest.files} | {
        "r/checkpoints/00000004/manifest.json"
    } == names, "each object has its digest"


def test_a_damaged_or_missing_object_is_noticed_and_an_older_step_taken(store, bucket, strategy):
    state = strategy.init(make_state)
    place = f"gs://{bucket}/r/checkpoints"
    with Checkpoints(place) as checkpoints:
        for step in (1, 2):
            checkpoints.save(at_step(state, step))
    whole = dict(store.objects[bucket])
    names = [name for name in whole if "00000002/" in name]
    assert len(names) > 5
    for i, name in enumerate(sorted(names)):
        content = whole[name].content
        del store.objects[bucket][name]
        if content and i % 2:
            store.put(bucket, name, bytes([content[0] ^ 1]) + content[1:])
        assert not Checkpoints(place).is_whole(2), name
        store.objects[bucket] = dict(whole)
    assert Checkpoints(place).is_whole(2)
    del store.objects[bucket][next(name for name in names if "/d/" in name)]
    _, manifest, (line,) = tiny.restore_latest(Checkpoints(place), strategy.abstract(make_state))
    assert manifest.step == 1
    assert "kept as 00000002.damaged, and step 1 is taken" in line
    assert kept(store, bucket) == ["00000001", "00000002.damaged"]


def test_a_save_that_the_store_refuses_leaves_the_last_one(store, bucket, strategy):
    state = strategy.init(make_state)
    place = f"gs://{bucket}/r/checkpoints"
    with Checkpoints(place) as checkpoints:
        checkpoints.save(at_step(state, 1))
        checkpoints.wait()
        for refused in ("manifest.json", "/d/", "commit_success.txt"):
            store.fault = lambda method, name, refused=refused: (
                403 if method in ("PUT", "BEGIN") and refused in name else None
            )
            checkpoints.save(at_step(state, 2))
            with pytest.raises(errors.CheckpointError, match="step 1 is unharmed") as caught:
                checkpoints.wait()
            assert "\n" not in str(caught.value), refused
            store.fault = lambda method, name: None
            assert kept(store, bucket) == ["00000001"], refused
        assert checkpoints.is_whole(1)
        checkpoints.save(at_step(state, 2))
    assert checkpoints.newest_whole() == (2, [])


@pytest.mark.long
def test_a_store_that_answers_at_the_second_try(store, bucket, strategy):
    state = strategy.init(make_state)
    seen = set()

    def once(method, name):
        key = (method, name.split("/")[-1][:8])
        if method in ("PUT", "BEGIN", "LIST") and name and not name.endswith("_sharding"):
            return None if key in seen else seen.add(key) or 503
        return None

    with Checkpoints(f"gs://{bucket}/r/checkpoints") as checkpoints:
        store.fault = once
        checkpoints.save(at_step(state, 1))
    assert len(seen) > 5
    restored, _ = checkpoints.restore(1, strategy.abstract(make_state))
    assert_same(restored, state)


def test_what_a_killed_save_left_goes(store, bucket, strategy):
    with Checkpoints(f"gs://{bucket}/r/checkpoints") as checkpoints:
        checkpoints.save(at_step(strategy.init(make_state), 1))
    store.put(bucket, "r/checkpoints/00000005/unfinished", b"")
    store.put(bucket, "r/checkpoints/00000005/state/d/1", b"half")
    assert checkpoints.steps() == [1]
    assert checkpoints.clean() == ["00000005"]
    assert kept(store, bucket) == ["00000001"]
