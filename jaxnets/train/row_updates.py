"""Steps that cost what the rows of a batch cost, however many rows a table of embeddings has.

Of each table, and of what the optimizer keeps for it, the rows that a batch uses are gathered; an
ordinary step is taken on them as if they were all of the table; and the result is scattered back into
the state, in place where that is donated. The gradient of a whole table never exists.

So an optimizer changes the rows that were used, and no others: with moments or a decay of weights that
isn't what it does to all rows (`jaxnets.train.row_optim` says how they differ).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets import errors
from jaxnets.ops.partition import constrain, data_axis, data_gather, own_part, some_rows
from jaxnets.train.mesh import path_of
from jaxnets.train.state import TrainState
from jaxnets.train.step import make_train_step
from jaxnets.typing import Array, Batch, LossFn, PyTree


@dataclasses.dataclass(frozen=True)
class Tables:
    """Which parameters are tables, and which rows of them a batch uses.

    In a step the loss_fn sees the rows alone as the table, and in the batch their places among them. So
    it may use the entry for nothing else, and the table for nothing but these rows. Outside of steps,
    as where a faulty one is replayed, it sees both whole, and batches that aren't completed.

    Attributes:
        entries: the name of the batch's entry, integers `[B, ...]`, by the path of a table
            `[V, ...]`, as {"user/embedding": "user"}. Tables of one entry have as many rows.
        complete: `complete(batch) -> batch`, adds entries that aren't data, such as sampled negatives.
    """

    entries: Mapping[str, str]
    complete: Callable[[Batch], Batch] = lambda batch: batch


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a table that the global batch uses.

    Attributes:
        places: int32 `[R]`, ascending and each once; what is V or more is no row. None for all rows,
            of a table that has no more than the batch has entries.
        is_used: boolean `[R]`, or `[V]` in that case: false for rows that only masked examples use,
            which stay as they are.
    """

    places: Array | None
    is_used: Array

    def take(self, table: Array) -> Array:
        """These rows; what is no row is NaN, so that what should use none of it shows if it does."""
        if self.places is None:
            return table
        fill = jnp.nan if jnp.issubdtype(table.dtype, jnp.inexact) else 0
        how: Any = {"indices_are_sorted": True, "unique_indices": True}
        return table.at[self.places].get(mode="fill", fill_value=fill, **how)

    def put(self, table: Array, rows: Array) -> Array:
        """The table with other rows in their places."""
        is_used = self.is_used.reshape(-1, *(1,) * (table.ndim - 1))
        rows = jnp.where(is_used, rows, self.take(table))
        if self.places is None:
            return rows
        how: Any = {"indices_are_sorted": True, "unique_indices": True}
        return table.at[self.places].set(rows, mode="drop", **how)


def step_maker(tables: Tables | None) -> Callable[..., Callable]:
    """`make_train_step`, or for a model with tables what takes the same arguments and updates rows."""
    if tables is None:
        return make_train_step

    def make(loss_fn: LossFn, tx: optax.GradientTransformation, **options: Any) -> Callable:
        return make_row_step(tables, loss_fn, tx, **options)

    return make


def make_row_step(
    tables: Tables,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    ema_decay: float | None = None,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Make `step(state, batch) -> (state, metrics)` that updates the rows of tables.

    Every device applies the same update: the entries of all devices are gathered, so that all number the
    same rows alike, and the rows' gradients are added as any others are.

    Args:
        tables: which, and how they are indexed.
        loss_fn: as `make_train_step` takes it.
        tx: for all parameters. What it does to a row must depend on that row alone.
        axis_name: the mapped axis over which the batch is split, under `pmap`; None under `jit`.
        ema_decay: None; an average of a whole table would be a pass over it.
        options: others of `make_train_step`.

    Returns:
        the step. It isn't made of parts as `TrainStep` is, so there is no fixed order of it.

    Raises:
        ConfigError: if ema_decay is given; when it is traced, if a table isn't there, a batch lacks an
            entry, or tables of one entry differ in size.
    """
    if ema_decay is not None:
        raise errors.ConfigError("tables that are updated by rows have no moving average (ema_decay)")
    small_step = make_train_step(loss_fn, tx, axis_name=axis_name, **options)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        sizes = _sizes(tables, state.params, batch := dict(tables.complete(batch)))
        rows = {}
        with data_axis(axis_name):
            for entry, size in sizes.items():
                rows[entry], batch[entry] = _find(batch[entry], size, batch.get("mask"))
        paths = _paths(state.params)

        def rows_of(path: tuple[Any, ...], leaf: Array) -> _Rows | None:
            # A leaf of the optimizer's state that mirrors a parameter ends in its path.
            name, ends = path_of(path), [p for p in paths if path_of(path).endswith(f"/{p}")]
            entry = tables.entries.get(max(ends, key=len)) if ends else None
            is_table = entry is not None and leaf.shape[:1] == (sizes[entry],)
            return rows[entry] if is_table and name.split("/")[0] != "model_state" else None

        def take(path: tuple[Any, ...], leaf: Array) -> Array:
            found = rows_of(path, leaf)
            return leaf if found is None else found.take(leaf)

        def put(path: tuple[Any, ...], leaf: Array, new: Array) -> Array:
            found = rows_of(path, leaf)
            return new if found is None else found.put(leaf, new)

        small = jax.tree_util.tree_map_with_path(take, state)
        with some_rows():
            small, metrics = small_step(small, batch)
        return jax.tree_util.tree_map_with_path(put, state, small), metrics

    return step


def _find(index: Array, size: int, mask: Array | None) -> tuple[_Rows, Array]:
    """The rows that the global batch uses, and for these rows of the batch their places among them."""
    real = jnp.ones(len(index), bool) if mask is None else mask.astype(bool)
    real = jnp.broadcast_to(real.reshape(-1, *(1,) * (index.ndim - 1)), index.shape).reshape(-1)
    real = data_gather(constrain(real, None))
    if size <= index.size:
        used = data_gather(constrain(index.reshape(-1), None))
        return _Rows(None, jnp.zeros(size, bool).at[used].max(real, mode="drop")), index
    if index.dtype.itemsize < 4:  # V may be more than its integers
        index = index.astype(jnp.int32)
    # Another row than there are is the row V, which is filled with NaN.
    own = jnp.where((index >= 0) & (index < size), index, size).astype(jnp.int32).reshape(-1)
    every = data_gather(constrain(own, None))
    sorted_ = jnp.argsort(every)
    values = every[sorted_]
    is_first = jnp.concatenate([jnp.ones(1, bool), values[1:] != values[:-1]])
    slots = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    # What is left over is filled up with numbers that are no rows, each once and in order.
    spare = size + 1 + jnp.arange(every.size, dtype=jnp.int32)
    places = spare.at[slots].set(values)
    slot = jnp.zeros_like(every).at[sorted_].set(slots, unique_indices=True)
    is_used = jnp.zeros(every.size, bool).at[slots].max(real[sorted_])
    return _Rows(places, is_used), own_part(slot, own.size).reshape(index.shape)


def _paths(params: PyTree) -> dict[str, Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {path_of(path): leaf for path, leaf in leaves}


def _sizes(tables: Tables, params: PyTree, batch: Batch) -> dict[str, int]:
    """How many rows the tables of each entry have."""
    paths, sizes = _paths(params), {}
    for path, entry in tables.entries.items():
        if path not in paths:
            raise errors.ConfigError(f"there is no table {path}: the parameters are {', '.join(paths)}")
        if entry not in batch:
            raise errors.ConfigError(f"the table {path} is indexed by {entry!r}, which no batch has")
        size = paths[path].shape[0]
        if sizes.setdefault(entry, size) != size:
            raise errors.ConfigError(
                f"the table {path} has {size} rows, and another that {entry!r} indexes {sizes[entry]}"
            )
    return sizes
