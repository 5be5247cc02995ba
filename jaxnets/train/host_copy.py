"""The state in the host's memory, so that a save takes none of the devices'.

Of what several devices of a process hold alike the host keeps one copy. Backends say which memories
their devices reach: "pinned_host" is the host's on GPUs and TPUs, and on CPUs, beside that which is
computed in.
"""

import collections
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxnets.typing import PyTree

_HOST = "pinned_host"


def copied_to_host(tree: PyTree) -> PyTree:
    """The same global arrays, of which each process has its parts once, in its own memory.

    It returns when all is copied: the arrays may then be used up. Of parts that several processes have
    the first copy, which is the one that is written, is of another process for each array, in turn.

    Args:
        tree: of arrays on the devices, of all processes.
    """
    arrays, structure = jax.tree.flatten(tree)
    places = [_place(x.sharding, x.shape, turn) for turn, x in enumerate(arrays)]
    return jax.tree.unflatten(structure, _copied(arrays, places))


def renewed(tree: PyTree, abstract: PyTree) -> PyTree:
    """Copies that own their memory, so that a step can use it up, of arrays that are used up here.

    One array after another, so that only one is there twice.

    Args:
        tree: of arrays that nothing else needs.
        abstract: their shapes, dtypes and shardings.
    """

    def renew(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        (copy,) = _copied([x], [like.sharding])
        x.delete()
        return copy

    return jax.tree.map(renew, tree, abstract)


def _copied(arrays: Sequence[jax.Array], places: Sequence[Sharding]) -> list[jax.Array]:
    """Copies of those parts that have a place; each stays with its device, in whichever memory of it."""
    sources, targets = [], []
    for x, place in zip(arrays, places, strict=True):
        if len(x.sharding.device_set) == 1:  # it is a part itself, and making arrays takes a while
            sources.append(x)
            targets.append(place)
            continue
        parts = [shard.data for shard in x.addressable_shards if shard.device in place.device_set]
        sources.append(parts)
        targets.append([SingleDeviceSharding(x.device, memory_kind=place.memory_kind) for x in parts])
    copies = jax.block_until_ready(jax.device_put(sources, targets, may_alias=False))
    return [
        each
        if isinstance(each, jax.Array)
        else jax.make_array_from_single_device_arrays(x.shape, place, each)
        for x, place, each in zip(arrays, places, copies, strict=True)
    ]


@functools.lru_cache(maxsize=4096)
def _place(sharding: Sharding, shape: tuple[int, ...], turn: int) -> Sharding:
    """Where the copy of an array lies: of each part, one device of each process that has it.

    The first of them is the one that Orbax writes. Where some parts are in more processes than others
    are, all copies are kept.
    """
    kinds = {memory.kind for memory in next(iter(sharding.addressable_devices)).addressable_memories()}
    kind = _HOST if _HOST in kinds else None
    part = sharding.shard_shape(shape)
    counts = [whole // one if one else 1 for whole, one in zip(shape, part, strict=True)]
    owners = collections.defaultdict(dict)
    for device, index in sharding.devices_indices_map(shape).items():
        at = tuple((x.start or 0) // one if one else 0 for x, one in zip(index, part, strict=True))
        owners[at].setdefault(device.process_index, device)
    if len({len(each) for each in owners.values()}) != 1:
        return sharding.with_memory_kind(kind) if kind else sharding
    num_copies = len(next(iter(owners.values())))
    devices = np.empty((num_copies, *counts), object)
    for at, each in owners.items():
        devices[(slice(None), *at)] = np.roll(list(each.values()), turn)
    axes = [f"axis{i}" for i in range(len(shape))]
    mesh = Mesh(devices, ("copy", *axes))
    return NamedSharding(mesh, PartitionSpec(*axes), memory_kind=kind)
