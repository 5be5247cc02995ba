"""What the code of a model may know of the devices: how to sum over them, and what to spread.

A strategy of `jaxnets.train` sets a context while it traces the step; outside of it both functions
do nothing, so a model runs alone as it stands.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnets.typing import Array, PyTree

AxisRules = Mapping[str, str | tuple[str, ...] | None]
"""The mesh axes that the named axes of activations are spread over."""

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("data_axis", default=None)
_micro: contextvars.ContextVar[tuple[Array | int, int]] = contextvars.ContextVar(
    "micro_batch", default=(0, 1)
)
_first: contextvars.ContextVar[Array | int] = contextvars.ContextVar("first_row", default=0)
_some_rows: contextvars.ContextVar[bool] = contextvars.ContextVar("some_rows", default=False)
_rules: contextvars.ContextVar[tuple[Mesh, AxisRules] | None] = contextvars.ContextVar(
    "activation_rules", default=None
)


@contextlib.contextmanager
def data_axis(name: str | None) -> Iterator[None]:
    """While this is open, `data_sum` adds over the mapped axis of that name (None: over nothing)."""
    token = _axis.set(name)
    try:
        yield
    finally:
        _axis.reset(token)


@contextlib.contextmanager
def activation_rules(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """While this is open, `constrain` spreads named axes over the mesh axes that `rules` gives.

    A mesh axis that an array has no even part for is left out, as for a short sequence.
    """
    token = _rules.set((mesh, rules))
    try:
        yield
    finally:
        _rules.reset(token)


def is_on_one_device() -> bool:
    """Whether the arrays in hand are known to lie on one device, whole or as a mapped axis's part.

    Where there are several devices, a caller's own `jit` may spread any array over them.
    """
    context = _rules.get()
    if context is not None:
        return context[0].size == 1
    return _axis.get() is not None or jax.device_count() == 1


def data_sum(tree: PyTree) -> PyTree:
    """Add every leaf over the devices that hold the parts of a batch.

    Under `jit` arrays are global and this does nothing; under `pmap` it is `lax.psum`.
    """
    name = _axis.get()
    return tree if name is None else lax.psum(tree, name)


def data_gather(x: Array) -> Array:
    """The rows of all devices that hold the parts of a batch, `[B, ...]`, in order.

    Under `jit` arrays are global and this does nothing; under `pmap` it is `lax.all_gather`.
    """
    name = _axis.get()
    return x if name is None else lax.all_gather(x, name, tiled=True)


def own_part(x: Array, num_rows: int) -> Array:
    """This device's rows, `[num_rows, ...]`, of what is the same on all devices; under `jit` all."""
    name = _axis.get()
    if name is None:
        return x
    return lax.dynamic_slice_in_dim(x, lax.axis_index(name) * num_rows, num_rows)


@contextlib.contextmanager
def micro_batch(number: Array | int, of: int) -> Iterator[None]:
    """While this is open, the rows in hand are `number`, `number + of`, ... of a device's part."""
    token = _micro.set((number, of))
    try:
        yield
    finally:
        _micro.reset(token)


@contextlib.contextmanager
def first_row(row: Array | int) -> Iterator[None]:
    """While this is open, the rows in hand are those of the global batch from this one on."""
    token = _first.set(row)
    try:
        yield
    finally:
        _first.reset(token)


@contextlib.contextmanager
def some_rows() -> Iterator[None]:
    """While this is open, tables of embeddings may have other numbers of rows than they should."""
    token = _some_rows.set(True)
    try:
        yield
    finally:
        _some_rows.reset(token)


def has_some_rows() -> bool:
    """Whether `some_rows` is open: in a step on the rows that a batch uses."""
    return _some_rows.get()


def default_rows(num_rows: int) -> Array:
    """The places in the global batch of the rows in hand.

    Args:
        num_rows: how many are in hand, on this device and in this micro-batch.

    Returns:
        integers `[num_rows]`.
    """
    number, of = _micro.get()
    rows = jnp.arange(num_rows) * of + number + _first.get()
    name = _axis.get()
    return rows if name is None else rows + lax.axis_index(name) * num_rows * of


def constrain(x: Array, *axes: str | None) -> Array:
    """Say what the axes of an activation are, so that a strategy can spread it over devices.

    Args:
        x: `[...]` with one axis for each name.
        *axes: "batch", "time", "model", ... or None for an axis that is never spread.

    Returns:
        x, `[...]`.

    Raises:
        ValueError: if there are not as many names as axes.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of shape {x.shape}")
    context = _rules.get()
    if context is None:
        return x
    mesh, rules = context
    places = [None if axis is None else rules.get(axis) for axis in axes]
    spec = PartitionSpec(*(_fitting(mesh, at, n) for at, n in zip(places, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _fitting(mesh: Mesh, axes: str | tuple[str, ...] | None, length: int) -> Any:
    """The mesh axes to cut an array's axis over; None where it has no even part for each device."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if names and length % math.prod(mesh.shape[name] for name in names) == 0 else None
