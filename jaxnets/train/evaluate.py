"""Evaluation that counts every example exactly once, on any number of devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.ops.partition import data_axis, data_sum
from jaxnets.train.shapes import shapes_of
from jaxnets.train.state import TrainState
from jaxnets.typing import Batch, EvalFn, Indexed, PyTree

IN_FLIGHT = 4  # batches


class Stopped(Exception):
    """An evaluation was broken off; nothing of it counts."""


def make_eval_step(eval_fn: EvalFn, *, axis_name: str | None = None) -> Callable[..., PyTree]:
    """Make `step(state, batch) -> sums` over the global batch.

    Args:
        eval_fn: `eval_fn(params, model_state, batch) -> {name: metric}`; metrics are pytrees of sums
            with `compute()`, over the rows that `batch["mask"]` has.
        axis_name: the mapped axis under `pmap`.

    Returns:
        the step; its sums hold the metrics and "count", the number of rows.
    """

    def step(state: TrainState, batch: Batch) -> PyTree:
        with data_axis(axis_name):
            params = state.params if state.ema is None else state.ema
            sums = dict(eval_fn(params, state.model_state, batch))
            sums["count"] = jnp.sum(batch["mask"], dtype=jnp.int32)
            return data_sum(sums)

    return step


def evaluate(
    eval_step: Callable[..., PyTree],
    state: TrainState,
    batches: Indexed,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[str], None] = lambda section: None,
    known: set[tuple] | None = None,
) -> dict[str, float | int]:
    """Evaluate over all batches.

    Sums of the batches are added on the host, in float64 and int64, and divided once.

    Args:
        eval_step: compiled, `eval_step(state, batch_or_draw) -> sums`.
        state: read only.
        batches: an indexable sequence of batches or draws, with masks.
        should_stop: asked before each batch.
        beat: told what begins: "evaluate" with each batch, but "compile" with the first of a shape.
        known: the shapes of batches that eval_step has been called with before; new ones are added.

    Returns:
        each metric's value, and "count", the number of examples.

    Raises:
        Stopped: if it should stop.
    """
    parts, known = [], set() if known is None else known
    for i in range(len(batches)):
        if should_stop():
            raise Stopped
        batch = batches[i]
        shapes = shapes_of(batch)
        is_new = shapes not in known
        beat("compile" if is_new else "evaluate")
        parts.append(eval_step(state, batch))
        if is_new:
            known.add(shapes)
            jax.block_until_ready(parts)
            beat("evaluate")
        if i >= IN_FLIGHT:  # or batches would pile up on the device
            jax.block_until_ready(parts[i - IN_FLIGHT])

    def add(*leaves: Any) -> np.ndarray:
        stacked = np.stack([np.asarray(leaf) for leaf in leaves])
        is_floating = jnp.issubdtype(stacked.dtype, jnp.floating)  # NumPy doesn't know of bfloat16
        return stacked.sum(0, dtype=np.float64 if is_floating else np.int64)

    sums = jax.tree.map(add, *jax.device_get(parts))
    count = int(sums.pop("count"))
    return {name: float(metric.compute()) for name, metric in sums.items()} | {"count": count}
