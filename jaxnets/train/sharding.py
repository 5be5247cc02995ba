"""How training is spread over devices, of one process or of several.

One step function runs under every strategy. All but "pmap" give XLA global arrays with shardings, from
which it derives the communication; "pmap" runs the step on each device's part of the batch, with
explicit sums. All take and return the same state, so checkpoints, evaluation and hooks can't tell them
apart.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnets import defects, errors
from jaxnets.ops.forms import is_plain, plain
from jaxnets.ops.partition import activation_rules
from jaxnets.train import fixed_order
from jaxnets.train.mesh import (
    BATCH,
    CUT_LARGEST,
    DATA,
    FSDP,
    REPLICATED,
    TENSOR,
    Rules,
    gather_rows,
    make_mesh,
    shard_by_rules,
    without_overlap,
)
from jaxnets.train.programs import CAREFUL_CPU_OPTIONS, CPU_OPTIONS, chosen, in_a_row
from jaxnets.typing import Array, PyTree

STRATEGIES = ("jit", "pmap", "fsdp", "tensor")

# What the axes of activations are spread over, by the names that models give them. The residual stream
# of a transformer is cut along time while nothing mixes its positions (Korthikanti et al. 2022,
# arXiv 2205.05198).
ACTIVATIONS: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "time": TENSOR,
    "heads": TENSOR,
    "hidden": TENSOR,
    "vocabulary": TENSOR,
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How training runs on the devices of a mesh; make one with `make_strategy`.

    Attributes:
        name: "jit", "pmap", "fsdp" or "tensor".
        mesh: the devices.
        rules: where the leaves of the state lie.
        use_jit: false to run eagerly, for debugging.
        virtual_shards: parts V that a batch is cut into in the fixed-order mode; 0 otherwise.
    """

    name: str
    mesh: Mesh
    rules: Rules = REPLICATED
    use_jit: bool = True
    virtual_shards: int = 0

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return self.mesh.size

    @property
    def num_parts(self) -> int:
        """How many parts a batch is cut into."""
        return self.virtual_shards or self.mesh.shape[DATA] * self.mesh.shape[FSDP]

    @property
    def is_guarded(self) -> bool:
        """Whether steps in which a known defect of jaxlib would show are compiled without it."""
        return self.mesh.devices.flat[0].platform == "cpu" and self.use_jit

    @property
    def has_all(self) -> bool:
        """Whether all devices are this process's."""
        return not self.mesh.is_multi_process

    def replicate(self, tree: PyTree) -> PyTree:
        """Put a copy of every array on each device; every process has the same arrays.

        Rows of an array that overlap in memory do so there, too.
        """
        everywhere = NamedSharding(self.mesh, P())
        tree = jax.tree.map(without_overlap, tree)
        if self.has_all:
            return jax.device_put(tree, everywhere)
        return jax.tree.map(lambda x: _global(x, everywhere), tree)

    def rows(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process's devices hold, in order."""
        places = NamedSharding(self.mesh, P(BATCH)).addressable_devices_indices_map((batch_size,))
        ranges = {index[0].indices(batch_size) for index in places.values() if index}
        return np.unique(np.concatenate([np.arange(*each) for each in ranges]))

    def put_batch(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Spread a batch over the devices as the compiled step takes it; the copying goes on behind.

        Args:
            batch: `{name: [B, ...]}`, on the host and not to be changed after this. Of several processes
                each has its `rows` alone.
        """
        cut = NamedSharding(self.mesh, P(BATCH))
        if self.name == "pmap" and self.has_all:
            return _Split(jax.device_put({name: self._split(x) for name, x in batch.items()}, cut))
        if self.virtual_shards:
            return dict(batch)
        if self.has_all:
            return jax.device_put(dict(batch), cut)
        return jax.tree.map(self._from_rows, dict(batch))

    def init(self, make_state: Callable[[], PyTree]) -> PyTree:
        """Make the state where it belongs; no device ever holds more than its part."""
        shardings = shard_by_rules(jax.eval_shape(make_state), self.rules, self.mesh)
        return jax.jit(make_state, out_shardings=shardings)()

    def abstract(self, make_state: Callable[[], PyTree]) -> PyTree:
        """Shapes, dtypes and shardings of the state, without making it."""
        shapes = jax.eval_shape(make_state)
        shardings = shard_by_rules(shapes, self.rules, self.mesh)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings,
        )

    def compile_step(
        self,
        make_step: Callable[..., Callable],
        arrays: Mapping[str, Any] | None = None,
        *,
        num_steps: int = 1,
    ) -> Callable[[PyTree, Mapping[str, Any]], tuple[PyTree, Any]]:
        """Compile a step that changes the state.

        Args:
            make_step: `make_step(axis_name=...)` returns `step(state, batch) -> (state, metrics)`,
                whose metrics are the same on every device.
            arrays: a data set `{name: [N, ...]}` to keep on the devices. With it the result takes
                draws, `{"index": [B], ...}`, instead of batches, and gathers the rows on the device.
            num_steps: how many steps a call takes. With more than one, batches or draws, and the
                metrics, have an axis of so many in front; not under "pmap".

        Returns:
            `step(state, batch_or_draw) -> (state, metrics)`. The state that goes in is used up.

        Raises:
            ValueError: if several steps are asked for that can't be compiled into one program.
        """
        return self._compile(make_step, arrays, returns_state=True, num_steps=num_steps)

    def compile_eval(
        self, make_step: Callable[..., Callable], arrays: Mapping[str, Any] | None = None
    ) -> Callable[[PyTree, Mapping[str, Any]], Any]:
        """Compile a step that only reads the state: `step(state, batch_or_draw) -> sums`."""
        return self._compile(make_step, arrays, returns_state=False)

    def _compile(
        self,
        make_step: Callable[..., Callable],
        arrays: Mapping[str, Any] | None,
        returns_state: bool,
        num_steps: int = 1,
    ) -> Callable:
        one_only = self.name == "pmap" or not self.use_jit or self.virtual_shards
        if num_steps != 1 and (num_steps < 1 or one_only):
            raise ValueError(f"{num_steps} steps in a call take the strategy 'jit', compiled")
        if self.virtual_shards:
            compiler = fixed_order.compile_step if returns_state else fixed_order.compile_eval
            return compiler(make_step(axis_name=None), arrays, self.mesh, self.virtual_shards)
        resident = self.replicate(dict(arrays or {}))
        has_arrays = arrays is not None
        is_pmap, use_plain = self.name == "pmap", is_plain()
        step = make_step(axis_name=DATA if is_pmap else None)
        rows, everywhere = NamedSharding(self.mesh, P(BATCH)), NamedSharding(self.mesh, P())
        drawn = rows if num_steps == 1 else NamedSharding(self.mesh, P(None, BATCH))

        def body(state: PyTree, resident: Mapping[str, Array], draw: Mapping[str, Array]):
            with plain() if use_plain else contextlib.nullcontext():
                if num_steps == 1:
                    return _body(state, draw, resident=resident)
                one = partial(_body, resident=resident)
                return in_a_row(one, state, draw, self.num_devices)

        def _body(state: PyTree, draw: Mapping[str, Array], *, resident: Mapping[str, Array]):
            batch = gather_rows(resident, draw) if has_arrays else draw
            if is_pmap:
                return step(state, batch)
            batch = jax.lax.with_sharding_constraint(batch, rows)
            with activation_rules(self.mesh, ACTIVATIONS):
                out = step(state, batch)
            if not returns_state:
                # Every process reads the results, so each has all of them.
                return out if self.has_all else jax.lax.with_sharding_constraint(out, everywhere)
            shardings = shard_by_rules(out[0], self.rules, self.mesh), everywhere
            if self.has_all:
                return jax.lax.with_sharding_constraint(out[0], shardings[0]), out[1]
            return jax.lax.with_sharding_constraint(out, shardings)

        donated = (0,) if returns_state else ()
        if not self.use_jit:

            def run_eagerly(state: PyTree, draw: Mapping[str, Any]):
                with jax.disable_jit():
                    return body(state, resident, jax.tree.map(jnp.asarray, dict(draw)))

            return run_eagerly
        is_cpu = self.mesh.devices.flat[0].platform == "cpu"
        is_worth_a_look = self.is_guarded and defects.has_faulty_fusions(jaxlib.version.__version__)
        if is_pmap and self.has_all:
            mapped: Any = jax.pmap(
                body,
                axis_name=DATA,
                in_axes=(None, None, 0),
                out_axes=None,
                devices=list(self.mesh.devices.flat),
                donate_argnums=donated,
            )
            # pmap takes no compiler options; jit around it does.
            careful = jax.jit(mapped, donate_argnums=donated, compiler_options=CAREFUL_CPU_OPTIONS)
            if is_cpu:
                mapped = chosen(mapped, careful if is_worth_a_look else None)

            def run_mapped(state: PyTree, draw: Mapping[str, Any]):
                if not isinstance(draw, _Split):
                    draw = {name: self._split(x) for name, x in draw.items()}
                return mapped(state, resident, dict(draw))

            return run_mapped
        if is_pmap:
            # What JAX makes of a pmap. Its own takes and gives what each process has, where all else
            # takes global arrays, and within jit, for compiler options, it keeps to one process.
            body = jax.shard_map(
                body, mesh=self.mesh, in_specs=(P(), P(), P(BATCH)), out_specs=P(), check_vma=False
            )
        compiled = partial(jax.jit, body, donate_argnums=donated, in_shardings=(None, None, drawn))
        jitted = compiled(compiler_options=CPU_OPTIONS if is_cpu and not use_plain else None)
        careful = compiled(compiler_options=CAREFUL_CPU_OPTIONS)
        if is_cpu:
            jitted = chosen(
                jitted,
                careful if is_worth_a_look else None,
                is_whole=is_pmap or self.num_devices == 1,
                is_shared=not self.has_all,
            )

        def run(state: PyTree, draw: Mapping[str, Any]):
            draw = dict(draw)
            if not self.has_all:
                draw = jax.tree.map(lambda x: _global(x, drawn), draw)
            return jitted(state, resident, draw)

        return run

    def _split(self, x: Any) -> Any:
        x = np.asarray(x)
        return np.reshape(x, (self.num_devices, len(x) // self.num_devices, *x.shape[1:]))

    def _from_rows(self, x: Any) -> Array:
        """A global array from this process's rows of it."""
        cut = NamedSharding(self.mesh, P(BATCH))
        num_parts = self.num_parts
        num_rows = len(x) * num_parts // len(self.rows(num_parts))
        rows = self.rows(num_rows)

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(num_rows)
            begin = int(np.searchsorted(rows, first))
            return np.asarray(x)[begin : begin + last - first]

        return jax.make_array_from_callback((num_rows, *np.shape(x)[1:]), cut, part)


def _global(x: Any, sharding: NamedSharding) -> Array:
    """A global array of which every process has all; what is one already stays as it is."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class _Split(dict):
    """A batch that is cut into the devices' parts already."""


jax.tree_util.register_pytree_node(  # JAX takes a subclass of dict for a leaf
    _Split,
    lambda split: (tuple(split[name] for name in sorted(split)), tuple(sorted(split))),
    lambda names, leaves: _Split(zip(names, leaves, strict=True)),
)


def make_strategy(
    name: str = "jit",
    *,
    num_devices: int | None = None,
    sizes: Mapping[str, int] | None = None,
    rules: Rules | None = None,
    use_jit: bool = True,
    virtual_shards: int = 0,
) -> Strategy:
    """Choose how training runs.

    Args:
        name: "jit", each device a part of the batch and the whole state; "pmap", the same with explicit
            sums; "fsdp", the state is cut over all devices as well (Zhao et al. 2023, arXiv 2304.11277);
            "tensor", the model is, and each device has the whole batch (Shoeybi et al. 2019,
            arXiv 1909.08053).
        num_devices: over how many devices; all by default.
        sizes: of the mesh's axes "data", "fsdp" and "tensor", in place of the strategy's own.
        rules: where the leaves of the state lie. Without, the state is replicated, or where there is
            "fsdp" each array is cut along its longest axis; "tensor" needs the model's rules, and "pmap"
            keeps all of the state on each device.
        use_jit: false to run eagerly on one device, for debugging.
        virtual_shards: if not 0, steps are computed in the fixed order of so many shards of the batch,
            so that they are the same bit for bit on any number of devices that divides it.

    Raises:
        ConfigError: if the name is unknown, there are too few devices, or the options don't go
            together.
    """
    if name not in STRATEGIES:
        raise errors.unknown("strategy", name, STRATEGIES)
    if not use_jit and num_devices is None and sizes is None:
        num_devices = 1
    if sizes is not None and name != "jit":
        raise errors.ConfigError(f"a mesh is given in place of the strategy {name!r}, not beside it")
    if sizes is None and name in (FSDP, TENSOR):
        sizes = {name: make_mesh(num_devices).size}
    mesh = make_mesh(num_devices, sizes)
    if not use_jit and (name != "jit" or mesh.size > 1):
        raise errors.ConfigError("without jit a run uses one device and the strategy 'jit'")
    is_cut = mesh.shape[FSDP] > 1 or mesh.shape[TENSOR] > 1
    if rules is None:
        if name == TENSOR or mesh.shape[TENSOR] > 1:
            raise errors.ConfigError(
                "tensor parallelism needs sharding rules, and this model has none (Recipe.rules)"
            )
        rules = CUT_LARGEST if is_cut else REPLICATED
    if name == "pmap" and tuple(rules) != tuple(REPLICATED):
        raise errors.ConfigError("the strategy 'pmap' replicates the state and takes no rules")
    if virtual_shards:
        if name != "jit" or is_cut or not use_jit:
            raise errors.ConfigError("the fixed order takes the strategy 'jit', compiled, and no mesh")
        if virtual_shards < 0:
            raise errors.ConfigError(
                f"the fixed order has {virtual_shards} shards; it must be at least 1"
            )
        if virtual_shards % mesh.size:
            raise errors.ConfigError(
                f"{mesh.size} devices don't divide the {virtual_shards} shards of the fixed order"
            )
    return Strategy(name, mesh, rules, use_jit, virtual_shards)


def check_divides(
    batch_size: int, num_parts: int, accumulate: int = 1, *, parts: str = "devices"
) -> None:
    """Make sure that a batch splits evenly.

    Raises:
        ConfigError: if it doesn't.
    """
    if accumulate < 1:
        raise errors.ConfigError(f"accumulate must be at least 1, not {accumulate}")
    if batch_size % (num_parts * accumulate):
        raise errors.ConfigError(
            f"batch size {batch_size} is not divisible by {num_parts} {parts} x {accumulate} "
            "micro-batches"
        )
