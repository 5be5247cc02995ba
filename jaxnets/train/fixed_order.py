"""Steps that are equal bit for bit on any number of devices and processes.

Floating-point sums depend on their order, and the order on how many devices there are. Here the batch is
cut into V virtual shards, whatever the devices. One program of one shape, for one device, computes each
shard's gradients; a second adds those of all shards, one after the other, and applies them. BatchNorm
takes its statistics from a shard, and its running statistics are the mean of the shards'.

On a CPU the sums within a program are cut up by the number of XLA's threads, which is that of the cores
or of the devices, whatever is more. So it must be the same everywhere: the commands set it to V, and
other programs call `startup.limit_threads(V)` before the first array is made.

It costs: gradients of V shards on the first device of each process, a compilation for each device, and
the shards of a device run one after the other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnets import defects
from jaxnets.ops.partition import first_row
from jaxnets.train.mesh import gather_rows, in_order, without_overlap
from jaxnets.train.programs import CAREFUL_CPU_OPTIONS, CPU_OPTIONS, chosen, meeting
from jaxnets.typing import Array, PyTree


def compile_step(
    step: Any, arrays: Mapping[str, Any] | None, mesh: Mesh, num_shards: int
) -> Callable[[PyTree, Mapping[str, Any]], tuple[PyTree, Any]]:
    """Compile a step in its parts.

    Args:
        step: as `make_train_step` gives it, with `weigh`, `differentiate` and `apply`.
        arrays: a data set `{name: [N, ...]}` to gather from; None if the step takes batches.
        mesh: the devices; their number divides num_shards.
        num_shards: V.

    Returns:
        `step(state, batch_or_draw) -> (state, metrics)`, for a state that is replicated over the mesh.
        Of several processes each gives whole draws, but of batches only its rows.
    """
    shards = _Shards(arrays, mesh, num_shards)

    def weigh(state: PyTree, resident: PyTree, draw: PyTree):
        return step.weigh(state, shards.batch_of(resident, draw))

    def differentiate(state: PyTree, resident: PyTree, row: Array, totals: PyTree, draw: PyTree):
        with first_row(row):
            return step.differentiate(state, shards.batch_of(resident, draw), totals)

    def apply(state: PyTree, parts: tuple[PyTree, PyTree, PyTree]):
        grads, model_states, sums = parts
        model_state = jax.tree.map(_mean_in_order, model_states)
        grads, sums = jax.tree.map(_in_order, (grads, sums))
        return step.apply(state, grads, model_state, sums)

    weighs, differentiates = shards.compile(weigh), shards.compile(differentiate)
    applies = shards.compile(apply)

    def run(state: PyTree, draw: Mapping[str, Any]) -> tuple[PyTree, Any]:
        local, mine = shards.local(state), shards.cut(draw)
        weights = [weighs[k](local[k], shards.resident(k), rows) for k, rows, _ in mine]
        totals = _add(shards.together(weights))
        spread = {k: jax.device_put(totals, device) for k, device in shards.devices.items()}
        parts = [
            differentiates[k](local[k], shards.resident(k), row, spread[k], rows)
            for k, rows, row in mine
        ]
        return shards.replicate(applies[shards.first](local[shards.first], shards.together(parts)))

    return run


def compile_eval(
    step: Any, arrays: Mapping[str, Any] | None, mesh: Mesh, num_shards: int
) -> Callable[[PyTree, Mapping[str, Any]], Any]:
    """Compile a step that reads the state and gives sums: `step(state, batch_or_draw) -> sums`."""
    shards = _Shards(arrays, mesh, num_shards)

    def evaluate(state: PyTree, resident: PyTree, draw: PyTree):
        return step(state, shards.batch_of(resident, draw))

    evaluates = shards.compile(evaluate)

    def run(state: PyTree, draw: Mapping[str, Any]) -> Any:
        local = shards.local(state)
        parts = [evaluates[k](local[k], shards.resident(k), rows) for k, rows, _ in shards.cut(draw)]
        return shards.replicate(_add(shards.together(parts)))

    return run


class _Shards:
    """The virtual shards of a batch, and which devices of this process compute which.

    Attributes:
        devices: this process's, by their place in the mesh.
        first: the place of the one that adds.
    """

    def __init__(self, arrays: Mapping[str, Any] | None, mesh: Mesh, num_shards: int):
        self.devices = {
            k: device
            for k, device in enumerate(in_order(list(mesh.devices.flat)))
            if device.process_index == jax.process_index()
        }
        self.first = min(self.devices)
        self._per_device = num_shards // mesh.size
        self._num_shards = num_shards
        self._everywhere = NamedSharding(mesh, P())
        self._gather = _make_gather(mesh)
        self._has_arrays = arrays is not None
        kept = jax.tree.map(without_overlap, dict(arrays or {}))
        self._resident = {
            k: jax.tree.map(lambda x, at=at: _placed(x, at), kept) for k, at in self.devices.items()
        }

    def compile(self, fn: Callable) -> dict[int, Callable]:
        """A function as a program for each device, as a step of other strategies is compiled."""
        if self.devices[self.first].platform != "cpu":
            return dict.fromkeys(self.devices, jax.jit(fn))
        is_worth_a_look = defects.has_faulty_fusions(jaxlib.version.__version__)
        careful = jax.jit(fn, compiler_options=CAREFUL_CPU_OPTIONS) if is_worth_a_look else None
        return {k: chosen(jax.jit(fn, compiler_options=CPU_OPTIONS), careful) for k in self.devices}

    def resident(self, k: int) -> Mapping[str, Array]:
        """The data set on the k-th device; empty if there is none."""
        return self._resident[k]

    def batch_of(self, resident: Mapping[str, Array], draw: Mapping[str, Array]) -> Mapping[str, Array]:
        """The batch that a draw names."""
        return gather_rows(resident, draw) if self._has_arrays else draw

    def local(self, state: PyTree) -> dict[int, PyTree]:
        """A replicated state as it lies on each device."""
        return {k: jax.tree.map(lambda x, at=at: _on(x, at), state) for k, at in self.devices.items()}

    def cut(self, draw: Mapping[str, Any]) -> list[tuple[int, PyTree, Array]]:
        """This process's shards: device, rows, and the number of the first row in the batch."""
        draw = jax.tree.map(np.asarray, dict(draw))
        num_local = len(self.devices) * self._per_device
        before = self.first * self._per_device
        # A draw has the rows of all processes, a batch those of this one.
        num_parts, skipped = (self._num_shards, before) if self._has_arrays else (num_local, 0)
        size = len(draw["index"]) // num_parts
        shards = []
        for i, k in enumerate(k for k in self.devices for _ in range(self._per_device)):
            begin = (skipped + i) * size
            rows = jax.tree.map(lambda x, begin=begin: x[begin : begin + size], draw)
            placed = jax.device_put((rows, np.int32((before + i) * size)), self.devices[k])
            shards.append((k, *placed))
        return shards

    def together(self, parts: list[PyTree]) -> PyTree:
        """All shards' parts as `[V, ...]` on the first device."""
        moved = [jax.device_put(part, self.devices[self.first]) for part in parts]
        return self._gather(_stack(moved))

    def replicate(self, tree: PyTree) -> PyTree:
        """Arrays of the first device as arrays on all devices."""

        def copy(x: Array) -> Array:
            copies = [jax.device_put(x, device) for device in self.devices.values()]
            return jax.make_array_from_single_device_arrays(x.shape, self._everywhere, copies)

        return jax.tree.map(copy, tree)


@jax.jit
def _stack(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _add(parts: PyTree) -> PyTree:
    return jax.tree.map(_in_order, parts)


def _in_order(parts: Array) -> Array:
    """The sum over the first axis, one after the other."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _mean_in_order(parts: Array) -> Array:
    """The mean over the first axis; of what can't have one, such as a count, the first."""
    if not jnp.issubdtype(parts.dtype, jnp.inexact):
        return parts[0]
    return _in_order(parts) / jnp.asarray(len(parts), parts.dtype)


def _on(x: Array, device: Any) -> Array:
    """The copy of a replicated array that lies on a device."""
    return next(shard.data for shard in x.addressable_shards if shard.device == device)


def _placed(x: Any, device: Any) -> Array:
    """An array of the host, or a replicated one, on a device."""
    if isinstance(x, jax.Array) and device in x.sharding.device_set:
        return _on(x, device)
    return jax.device_put(x, device)


def _make_gather(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    """What puts the parts of all processes, `[v, ...]` on each one's first device, together there."""
    firsts: dict[int, Any] = {}
    for device in in_order(list(mesh.devices.flat)):
        firsts.setdefault(device.process_index, device)
    if len(firsts) == 1:
        return lambda tree: tree
    in_turn = np.asarray([firsts[process] for process in sorted(firsts)])
    leaders = Mesh(in_turn, ("process",), axis_types=(AxisType.Auto,))
    cut, whole = NamedSharding(leaders, P("process")), NamedSharding(leaders, P())
    copy = meeting(jax.jit(lambda tree: tree, out_shardings=whole))

    def gather(tree: PyTree) -> PyTree:
        def join(x: Array) -> Array:
            return jax.make_array_from_single_device_arrays(
                (len(x) * len(firsts), *x.shape[1:]), cut, [x]
            )

        return jax.tree.map(lambda x: x.addressable_data(0), copy(jax.tree.map(join, tree)))

    return gather
