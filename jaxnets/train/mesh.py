"""The devices as a mesh, and which part of every array lies where.

A mesh always has the axes "data", "fsdp" and "tensor", of size 1 where they aren't used. The batch is
cut over "data" and "fsdp" together; rules cut the state over "fsdp" and "tensor".
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnets import errors
from jaxnets.typing import Array, PyTree

DATA, FSDP, TENSOR = AXES = "data", "fsdp", "tensor"
BATCH = (DATA, FSDP)
"""The axes that a batch is cut over."""


@dataclasses.dataclass(frozen=True)
class Largest:
    """In place of a spec: cut the longest axis that divides evenly over a mesh axis, if there is one."""

    axis: str = FSDP

    def spec(self, shape: Sequence[int], mesh: Mesh) -> P:
        """The spec of an array of this shape."""
        size = mesh.shape[self.axis]
        fitting = [i for i, length in enumerate(shape) if length and length % size == 0]
        if size == 1 or not fitting:
            return P()
        longest = max(fitting, key=lambda i: shape[i])  # the first of equal ones
        return P(*(self.axis if i == longest else None for i in range(longest + 1)))


Rules = Sequence[tuple[str, P | Largest]]
"""Ordered (pattern, spec): a leaf takes the spec of the first pattern that is found in its path."""

REPLICATED: Rules = ((".*", P()),)
CUT_LARGEST: Rules = (("^(params|opt_state|ema)/", Largest()), (".*", P()))
"""For any model: parameters, moments and averages are cut along their longest axis over "fsdp"."""


def make_mesh(num_devices: int | None = None, sizes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over the first devices.

    Args:
        num_devices: how many; by default as many as `sizes` says, or all of them.
        sizes: of the axes, 1 for those that aren't named. By default "data" has all devices.

    Raises:
        ConfigError: if there are fewer devices than that, the sizes don't multiply to their number, or
            some of a run of several processes would be left out.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names a platform that isn't there
        names = getattr(jax.config, "jax_platforms")  # noqa: B009
        why = errors.first_line(error) if str(error) else f"there is no {names}"
        raise errors.ConfigError(f"JAX found no devices: {why}") from None
    asked = math.prod((sizes or {}).values()) if sizes else None
    if num_devices is None:
        num_devices = len(devices) if asked is None else asked
    if asked is not None and asked != num_devices:
        shown = ", ".join(f"{name}={size}" for name, size in (sizes or {}).items())
        raise errors.ConfigError(f"a mesh of {shown} has {asked} devices, not {num_devices}")
    if num_devices < 1:
        raise errors.ConfigError(f"{num_devices} devices asked for; it must be at least 1")
    if num_devices > len(devices):
        raise errors.ConfigError(
            f"{num_devices} devices asked for; there are {len(devices)} ({devices[0].platform}). "
            f"On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} "
            "makes more"
        )
    if jax.process_count() > 1 and num_devices != len(devices):
        raise errors.ConfigError(
            f"a run of {jax.process_count()} processes takes all of their {len(devices)} devices, "
            f"not {num_devices}"
        )
    shape = tuple((sizes or {DATA: num_devices}).get(name, 1) for name in AXES)
    return Mesh(_arranged(shape, devices[:num_devices]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the form of a mesh: neighbours on a TPU, and otherwise those of a host together."""
    is_one_slice = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    if devices[0].platform == "tpu" and is_one_slice:
        return mesh_utils.create_device_mesh(shape, devices)
    return np.asarray(in_order(devices)).reshape(shape)


def in_order(devices: Sequence[Any]) -> list[Any]:
    """Devices by process, and by number within it."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def read_sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes from "data=2,tensor=4".

    Raises:
        ConfigError: if it isn't of that form.

    Example:
        >>> read_sizes("data=2,tensor=4")
        {'data': 2, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for word in text.split(","):
        name, _, size = word.strip().partition("=")
        if name not in AXES:
            raise errors.unknown("mesh axis", name, AXES)
        if not size.isdigit() or int(size) < 1 or name in sizes:
            raise errors.ConfigError(f"a mesh is written as data=2,fsdp=2,tensor=2, not {text!r}")
        sizes[name] = int(size)
    return sizes


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
        ConfigError: if no pattern is found in a leaf's path, or its spec has more axes than the leaf, or
            an axis of the leaf doesn't divide evenly.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_of(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _fitted(pattern, spec, name, leaf.shape, mesh))
        raise errors.ConfigError(f"no sharding rule for {name}: add one to the model's rules")

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gather_to_first(tree: PyTree, *, beat: Callable[[], None] = lambda: None) -> PyTree:
    """Bring arrays that are cut over several processes to the host of the first one.

    All processes call it. One array at a time is whole on the devices.

    Args:
        tree: of arrays.
        beat: called before each array that is brought.

    Returns:
        the tree, in which such arrays are NumPy's; on the other processes they are empty.
    """

    def gather(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        beat()
        everywhere = NamedSharding(x.sharding.mesh, P())  # pyright: ignore[reportAttributeAccessIssue]
        whole = jax.block_until_ready(jax.jit(_same, out_shardings=everywhere)(x))
        return np.asarray(whole) if jax.process_index() == 0 else np.empty(0, x.dtype)

    return jax.tree.map(gather, tree)


def _same(x: Array) -> Array:
    return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Overlapping:
    """Rows that overlap, such as windows of a text, kept as what they are cut out of.

    Attributes:
        whole: `[N + L - 1]`.
        length: L; row i is `whole[i : i + L]`.
    """

    whole: Any
    length: int = dataclasses.field(metadata={"static": True})


def without_overlap(x: Any) -> Any:
    """An array `[N, L]` whose rows are windows of one row in memory as `Overlapping`; others stay.

    `numpy.lib.stride_tricks.sliding_window_view` makes such arrays; a device would get L copies.
    """
    if not isinstance(x, np.ndarray) or x.ndim != 2 or min(x.shape) < 2:
        return x
    if x.strides[0] != x.strides[1] or x.strides[1] != x.itemsize:
        return x
    size = x.shape[0] + x.shape[1] - 1
    whole = np.lib.stride_tricks.as_strided(x, (size,), (x.itemsize,), writeable=False)
    return Overlapping(whole, x.shape[1])


def _rows(x: Any, index: Array) -> Array:
    if isinstance(x, Overlapping):
        return jnp.take(
            x.whole, index[..., None] + jnp.expand_dims(jnp.arange(x.length), range(index.ndim))
        )
    return jnp.take(x, index, axis=0)


def gather_rows(arrays: Mapping[str, Array], draw: Mapping[str, Array]) -> dict[str, Any]:
    """The batch that a draw names: the rows of every array, and the draw itself.

    If the draw has partners their rows and their index are `batch["partner"]`.
    """
    batch: dict[str, Any] = {name: _rows(x, draw["index"]) for name, x in arrays.items()}
    batch |= draw
    if "partner" in draw:
        rows = {name: _rows(x, draw["partner"]) for name, x in arrays.items()}
        batch["partner"] = rows | {"index": draw["partner"]}
    return batch


def _fitted(pattern: str, spec: P | Largest, name: str, shape: Sequence[int], mesh: Mesh) -> P:
    if isinstance(spec, Largest):
        return spec.spec(shape, mesh)
    if len(spec) > len(shape):
        raise errors.ConfigError(f"the rule {pattern!r} gives {name} {tuple(shape)} {spec}")
    for length, axes in zip(shape, spec, strict=False):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if length % parts:
            raise errors.ConfigError(
                f"the rule {pattern!r} cuts {name} {tuple(shape)} into {parts} parts over "
                f"{', '.join(axes)}, but {length} is not divisible by {parts}"
            )
    return spec
