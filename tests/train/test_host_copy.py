"""While a state is saved the devices hold it once; when it is restored, all but one array of it once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_checkpoint as t
from jax.sharding import PartitionSpec as P

from jaxnets.train import Checkpoints, array_store, host_copy, make_strategy
from jaxnets.train.host_copy import copied_to_host

RULES = (("w", P("fsdp", "tensor")), (".*", P()))


def pointers(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


def on_devices():
    """What lies in the memory that is computed in."""
    kind = jax.devices()[0].default_memory().kind
    parts = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for x in jax.live_arrays()
        if x.sharding.memory_kind == kind
        for shard in x.addressable_shards
    }
    return sum(parts.values())


STRATEGIES = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jit", {"num_devices": 1}),
        ("jit", {"num_devices": 8}),
        ("pmap", {"num_devices": 2}),
        ("fsdp", {"num_devices": 8}),
        ("jit", {"sizes": {"data": 2, "fsdp": 2, "tensor": 2}, "rules": RULES}),
    ],
)


@STRATEGIES
def test_what_a_save_keeps_is_in_the_hosts_memory_once(name, options):
    state = make_strategy(name, **options).init(t.make_state)
    before, expected = on_devices(), [x.copy() for x in t.leaves(state)]
    copy = copied_to_host(state)
    assert on_devices() == before
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(copy), strict=True):
        assert y.sharding.memory_kind == "pinned_host"
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert not pointers(x) & pointers(y)
        assert {str(s.index) for s in y.addressable_shards} == {
            str(s.index) for s in x.addressable_shards
        }
        assert sum(s.data.size for s in y.addressable_shards) == x.size  # of parts that are alike one
    jax.block_until_ready(
        jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state.params)
    )
    for a, b in zip(expected, t.leaves(copy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_of_a_save_is_on_the_devices(tmp_path, monkeypatch):
    state = make_strategy("fsdp", num_devices=8).init(t.make_state)
    begin, seen = array_store.begin_save, []

    def watched(folder, tree):
        seen.extend(x.sharding.memory_kind for x in jax.tree.leaves(tree))
        return begin(folder, tree)

    monkeypatch.setattr(array_store, "begin_save", watched)
    with Checkpoints(tmp_path / "c") as checkpoints:
        before = on_devices()
        checkpoints.save(state)
        assert on_devices() == before
    assert set(seen) == {"pinned_host"}


@STRATEGIES
def test_a_restored_state_is_nowhere_twice(name, options, tmp_path, monkeypatch):
    strategy = make_strategy(name, **options)
    state = strategy.init(lambda: t.make_state(width=640))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
    expected = [x.copy() for x in t.leaves(state)]
    largest = max(
        sum(s.data.nbytes for s in x.addressable_shards) for x in jax.tree.leaves(state.params)
    )
    abstract = strategy.abstract(lambda: t.make_state(width=640))
    size = on_devices()
    del state, checkpoints
    others = on_devices()
    copied, peaks = host_copy._copied, []

    def watched(*args):
        found = copied(*args)
        peaks.append(on_devices() - others)
        return found

    monkeypatch.setattr(host_copy, "_copied", watched)
    restored, _ = Checkpoints(tmp_path / "c").restore(0, abstract)
    assert len(peaks) == len(expected)
    assert size - others <= max(peaks) <= size - others + largest
    for a, b in zip(expected, t.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    before = {name: pointers(x) for name, x in restored.params.items()}
    params = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(restored.params)
    assert {name: pointers(x) for name, x in params.items()} == before  # in its own memory
