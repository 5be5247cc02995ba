"""Where arrays lie, and how a step is compiled for several devices.

One step function runs under both strategies. "jit" gives XLA global arrays with shardings, from which
it derives the communication; "pmap" runs the step on each device's part of the batch, with explicit
sums. Both take and return the same state, so checkpoints, evaluation and hooks can't tell them apart.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnets import defects, errors
from jaxnets.ops import onednn
from jaxnets.ops.forms import is_plain, plain
from jaxnets.ops.partition import activation_rules
from jaxnets.train import program_cache
from jaxnets.train.flops import primitives
from jaxnets.typing import Array, PyTree

AXIS = "data"
STRATEGIES = ("jit", "pmap")

# On a CPU XLA hands float32 convolutions to YNNPACK, whose gradients are slow: SpeedNet's step takes 2.4
# times as long with it. Products and reductions stay there. Of the other platforms nothing is changed.
CPU_OPTIONS = {defects.YNN_OPTION: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
# For a program in which jaxlib's own defects would show: reductions are where those known are.
_CAREFUL_CPU_OPTIONS = {defects.YNN_OPTION: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

Rules = Sequence[tuple[str, P]]
"""Ordered (pattern, spec): a leaf takes the spec of the first pattern that is found in its path."""

REPLICATED: Rules = ((".*", P()),)


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of one axis, "data", over the first devices.

    Args:
        num_devices: how many; all of them by default.

    Raises:
        ConfigError: if there are fewer devices than that.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names a platform that isn't there
        why = (str(error) or "JAX_PLATFORMS names one that isn't there").splitlines()[0]
        raise errors.ConfigError(f"JAX found no devices: {why}") from None
    if num_devices is None:
        num_devices = len(devices)
    if not 1 <= num_devices <= len(devices):
        raise errors.ConfigError(
            f"{num_devices} devices asked for; there are {len(devices)} ({devices[0].platform}). "
            f"On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={max(num_devices, 1)} "
            "makes more"
        )
    return jax.make_mesh(
        (num_devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:num_devices]
    )


def path_of(path: tuple[Any, ...]) -> str:
    """The path of a leaf as the rules see it, such as "params/conv1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shard_by_rules(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """The sharding of every leaf.

    Args:
        tree: arrays, or shapes.
        rules: ordered (pattern, spec); patterns are searched for in `path_of` the leaf.
        mesh: the devices.

    Returns:
        a tree of NamedSharding.

    Raises:
        ValueError: if no pattern is found in a leaf's path, or its spec has more axes than the leaf.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_of(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                if len(spec) > len(leaf.shape):
                    raise ValueError(f"the rule {pattern!r} gives {name} {leaf.shape} {spec}")
                return NamedSharding(mesh, spec)
        raise ValueError(f"no sharding rule for {name}")

    return jax.tree_util.tree_map_with_path(sharding, tree)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How training runs on the devices of a mesh; make one with `make_strategy`.

    Attributes:
        name: "jit" or "pmap".
        mesh: the devices.
        rules: where the leaves of the state lie.
        use_jit: false to run eagerly, for debugging.
    """

    name: str
    mesh: Mesh
    rules: Rules = REPLICATED
    use_jit: bool = True

    @property
    def num_devices(self) -> int:
        """How many devices the batch is spread over."""
        return self.mesh.size

    @property
    def is_guarded(self) -> bool:
        """Whether steps in which a known defect of jaxlib would show are compiled without it."""
        return self.mesh.devices.flat[0].platform == "cpu" and self.use_jit

    def replicate(self, tree: PyTree) -> PyTree:
        """Put a copy of every array on each device."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def put_batch(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Spread a batch over the devices as the compiled step takes it; the copying goes on behind.

        Args:
            batch: `{name: [B, ...]}`, on the host and not to be changed after this.
        """
        rows = NamedSharding(self.mesh, P(AXIS))
        if self.name == "pmap":
            return _Split(jax.device_put({name: self._split(x) for name, x in batch.items()}, rows))
        return jax.device_put(dict(batch), rows)

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
                metrics, have an axis of so many in front; under "jit" only.

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
        if num_steps != 1 and (num_steps < 1 or self.name != "jit" or not self.use_jit):
            raise ValueError(f"{num_steps} steps in a call take the strategy 'jit', compiled")
        resident = self.replicate(dict(arrays or {}))
        has_arrays = arrays is not None
        is_pmap, use_plain = self.name == "pmap", is_plain()
        step = make_step(axis_name=AXIS if is_pmap else None)
        rows = NamedSharding(self.mesh, P(AXIS))
        drawn = rows if num_steps == 1 else NamedSharding(self.mesh, P(None, AXIS))

        def body(state: PyTree, resident: Mapping[str, Array], draw: Mapping[str, Array]):
            with plain() if use_plain else contextlib.nullcontext():
                if num_steps == 1:
                    return _body(state, draw, resident=resident)
                one = partial(_body, resident=resident)
                return _in_a_row(one, state, draw, self.num_devices)

        def _body(state: PyTree, draw: Mapping[str, Array], *, resident: Mapping[str, Array]):
            batch = gather_rows(resident, draw) if has_arrays else draw
            if is_pmap:
                return step(state, batch)
            batch = jax.lax.with_sharding_constraint(batch, rows)
            with activation_rules(self.mesh, {"batch": AXIS}):
                out = step(state, batch)
            if not returns_state:
                return out
            shardings = shard_by_rules(out[0], self.rules, self.mesh)
            return jax.lax.with_sharding_constraint(out[0], shardings), out[1]

        donated = (0,) if returns_state else ()
        if not self.use_jit:

            def run_eagerly(state: PyTree, draw: Mapping[str, Any]):
                with jax.disable_jit():
                    return body(state, resident, jax.tree.map(jnp.asarray, dict(draw)))

            return run_eagerly
        is_cpu = self.mesh.devices.flat[0].platform == "cpu"
        is_worth_a_look = self.is_guarded and defects.has_faulty_fusions(jaxlib.version.__version__)
        if is_pmap:
            mapped: Any = jax.pmap(
                body,
                axis_name=AXIS,
                in_axes=(None, None, 0),
                out_axes=None,
                devices=list(self.mesh.devices.flat),
                donate_argnums=donated,
            )
            # pmap takes no compiler options; jit around it does.
            careful = jax.jit(mapped, donate_argnums=donated, compiler_options=_CAREFUL_CPU_OPTIONS)
            if is_cpu:
                mapped = _chosen(mapped, careful if is_worth_a_look else None)

            def run_mapped(state: PyTree, draw: Mapping[str, Any]):
                if not isinstance(draw, _Split):
                    draw = {name: self._split(x) for name, x in draw.items()}
                return mapped(state, resident, dict(draw))

            return run_mapped
        compiled = partial(jax.jit, body, donate_argnums=donated, in_shardings=(None, None, drawn))
        jitted = compiled(compiler_options=CPU_OPTIONS if is_cpu and not use_plain else None)
        careful = compiled(compiler_options=_CAREFUL_CPU_OPTIONS)
        if is_cpu:
            is_whole = self.num_devices == 1
            jitted = _chosen(jitted, careful if is_worth_a_look else None, is_whole=is_whole)

        def run(state: PyTree, draw: Mapping[str, Any]):
            return jitted(state, resident, dict(draw))

        return run

    def _split(self, x: Any) -> Any:
        return np.reshape(np.asarray(x), (self.num_devices, -1, *np.shape(x)[1:]))


def _in_a_row(step: Callable, state: PyTree, draws: PyTree, num_devices: int) -> tuple[PyTree, Any]:
    """A step for each draw of a stack, one after the other."""
    unroll = 1
    if jax.default_backend() == "cpu":
        # XLA runs a convolution of its own in a loop on a CPU up to 100 times slower than outside of it.
        first = jax.tree.map(lambda x: x[0], draws)
        jaxpr = jax.make_jaxpr(step)(state, first).jaxpr
        slow = {"conv_general_dilated"} | ({onednn.NAME} if num_devices > 1 else set())
        has_convolution = not slow.isdisjoint(primitives(jaxpr))
        unroll = len(jax.tree.leaves(draws)[0]) if has_convolution else 1
    return jax.lax.scan(step, state, draws, unroll=unroll)


def _compiled_apart(program: Any, *args: PyTree, is_whole: bool) -> Any:
    """Compile a program where the next call finds it in JAX's memory.

    One that the cache of programs could not keep is compiled with the cache closed. Such a one isn't cut
    into parts for several devices by XLA.
    """
    trace = getattr(program, "trace", None)  # which what pmap returns hasn't
    traced: Any = trace(*args) if trace else jax.make_jaxpr(program)(*args)
    is_unkept = is_whole and onednn.NAME in primitives(traced.jaxpr)
    with program_cache.closed() if is_unkept else contextlib.nullcontext():
        lowered = traced.lower() if trace else program.lower(*args)
        return lowered.compile()


def _chosen(fast: Any, careful: Any | None, *, is_whole: bool = True) -> Callable:
    """Take the careful program of two where the fast one has a fusion that jaxlib computes wrongly."""
    chosen: dict[tuple, Any] = {}

    def run(*args: PyTree):
        leaves = jax.tree.leaves(args[-1])
        shapes = tuple((np.shape(x), getattr(x, "dtype", None)) for x in leaves)
        if shapes not in chosen:
            compiled = _compiled_apart(fast, *args, is_whole=is_whole)
            chosen[shapes] = fast
            text = compiled.as_text() if careful else ""
            if careful and (not text or defects.faulty_fusions(text, jaxlib.version.__version__)):
                _compiled_apart(careful, *args, is_whole=is_whole)
                chosen[shapes] = careful
        return chosen[shapes](*args)

    return run


class _Split(dict):
    """A batch that is cut into the devices' parts already."""


jax.tree_util.register_pytree_node(  # JAX takes a subclass of dict for a leaf
    _Split,
    lambda split: (tuple(split[name] for name in sorted(split)), tuple(sorted(split))),
    lambda names, leaves: _Split(zip(names, leaves, strict=True)),
)


def gather_rows(arrays: Mapping[str, Array], draw: Mapping[str, Array]) -> dict[str, Any]:
    """The batch that a draw names: the rows of every array, and the draw itself.

    If the draw has partners their rows and their index are `batch["partner"]`.
    """
    batch: dict[str, Any] = {name: jnp.take(x, draw["index"], axis=0) for name, x in arrays.items()}
    batch |= draw
    if "partner" in draw:
        rows = {name: jnp.take(x, draw["partner"], axis=0) for name, x in arrays.items()}
        batch["partner"] = rows | {"index": draw["partner"]}
    return batch


def make_strategy(
    name: str = "jit",
    *,
    num_devices: int | None = None,
    rules: Rules = REPLICATED,
    use_jit: bool = True,
) -> Strategy:
    """Choose how training runs.

    Args:
        name: "jit" or "pmap".
        num_devices: over how many devices; all by default.
        rules: where the leaves of the state lie; "pmap" keeps all of it on each device.
        use_jit: false to run eagerly on one device, for debugging.

    Raises:
        ConfigError: if the name is unknown, there are too few devices, or the options don't go
            together.
    """
    if name not in STRATEGIES:
        raise errors.unknown("strategy", name, STRATEGIES)
    if not use_jit and num_devices is None:
        num_devices = 1
    mesh = make_mesh(num_devices)
    if not use_jit and (name != "jit" or mesh.size > 1):
        raise errors.ConfigError("without jit a run uses one device and the strategy 'jit'")
    if name == "pmap" and tuple(rules) != tuple(REPLICATED):
        raise errors.ConfigError("the strategy 'pmap' replicates the state and takes no rules")
    return Strategy(name, mesh, rules, use_jit)


def check_divides(batch_size: int, num_devices: int, accumulate: int = 1) -> None:
    """Make sure that a batch splits evenly.

    Raises:
        ConfigError: if it doesn't.
    """
    if accumulate < 1:
        raise errors.ConfigError(f"accumulate must be at least 1, not {accumulate}")
    if batch_size % (num_devices * accumulate):
        raise errors.ConfigError(
            f"batch size {batch_size} is not divisible by {num_devices} devices x {accumulate} "
            "micro-batches"
        )
