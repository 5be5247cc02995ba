"""One training step as a pure function.

The loss is the weighted mean over the global batch by construction: weights depend on the batch
alone, so their sum over all devices and micro-batches is known before anything is differentiated,
and every device differentiates its own part of the sum. Nothing is ever a mean of means.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnets.ops.partition import data_axis, data_sum, micro_batch
from jaxnets.train.health import judge, uses_health
from jaxnets.train.state import TrainState
from jaxnets.typing import Array, Batch, LossFn, Params, PyTree, WeightsFn

Sums = tuple[dict[str, Array], dict[str, Any]]
"""The parts of the loss by term, and the metrics of the loss_fn."""


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step, `step(state, batch) -> (state, metrics)`, and the three pure parts it is made of.

    The parts see one device's rows and add nothing over devices. Who calls them apart does that in
    between, and opens `ops.partition.data_axis` around them where an axis is mapped.

    Attributes:
        weigh: `weigh(state, batch) -> totals`: for each term of the loss the sum of the weights of these
            rows.
        differentiate: `differentiate(state, batch, totals) -> (grads, model_state, sums)`, with totals
            of the global batch: these rows' part of the gradients and of the sums (the parts of the loss
            by term, the metrics of the loss_fn), and the model's state after them.
        apply: `apply(state, grads, model_state, sums) -> (state, metrics)`, with gradients and sums of
            the global batch.
        axis_name: the mapped axis over which the step adds; None for none.
    """

    weigh: Callable[[TrainState, Batch], dict[str, Array]]
    differentiate: Callable[[TrainState, Batch, Mapping[str, Array]], tuple[Params, PyTree, Sums]]
    apply: Callable[[TrainState, Params, PyTree, Sums], tuple[TrainState, dict[str, Array]]]
    axis_name: str | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """Take the step."""
        with data_axis(self.axis_name):
            totals = {name: data_sum(x) for name, x in self.weigh(state, batch).items()}
            grads, model_state, sums = self.differentiate(state, batch, totals)
            grads, sums = data_sum((grads, sums))
            return self.apply(state, grads, model_state, sums)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    weights_fn: WeightsFn | None = None,
    coefficients: Mapping[str, float] | None = None,
    accumulate: int = 1,
    ema_decay: float | None = None,
    axis_name: str | None = None,
    on_nonfinite: str = "stop",
    max_spike: float | None = None,
) -> TrainStep:
    """Make `step(state, batch) -> (state, metrics)`.

    The total loss is the sum over terms of `coefficient * sum(loss * weight) / sum(weight)`, with
    both sums over the global batch.

    If the loss or the norm of the gradients isn't finite the old state is kept, its guard is set to
    this step, and every later step is without effect. (An update that overflows although its gradient
    does not shows in the next step's loss.)

    Where steps may be skipped, one that isn't finite, or is a spike, changes nothing but `state.step`
    and `state.health`: the order of the data goes on, schedules of the optimizer wait. There is a limit
    to the skipped steps in a row, `jaxnets.train.health.MAX_IN_A_ROW`: after it a step that isn't finite
    stops the run as above, and a spike is taken for a new level and applied.

    Args:
        loss_fn: `loss_fn(params, model_state, batch, *, key) -> (terms, model_state, metrics)`, where
            terms maps names to losses `[B, ...]` and metrics maps names to pytrees of sums with
            `compute()`. It knows nothing of devices.
        tx: the optimizer.
        weights_fn: `weights_fn(batch) -> {term: [B, ...]}`; by default every term is weighted by
            `batch["mask"]` (by 1 where the batch has no mask).
        coefficients: of the terms; 1 for those that aren't named.
        accumulate: number of micro-batches k that a device's rows are split into; micro-batch m takes
            the rows m, m + k, m + 2 k, ..., so that no row changes device.
        ema_decay: d in [0, 1) of `ema = d * ema + (1 - d) * params` after each step, for a state that
            has an average; running statistics are not averaged again.
        axis_name: the mapped axis over which the batch is split, under `pmap`; None under `jit`.
        on_nonfinite: "stop", or "skip" for going on with the next step.
        max_spike: skip a step whose loss or norm of gradients is more than so many standard deviations
            above the mean of about the last 128 applied steps; None for never.

    Returns:
        the step. Its metrics are scalars: "loss" (the total), "loss/TERM" where there are several,
        "grad_norm", "guard", "skipped" (the number so far, where steps may be), and those of loss_fn,
        computed over the global batch.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1; it is {accumulate}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay lies in [0, 1), not {ema_decay}")
    coefficients = dict(coefficients or {})
    use_health = uses_health(on_nonfinite, max_spike)

    def weigh(state: TrainState, batch: Batch) -> dict[str, Array]:
        def losses(params: Params, model_state: PyTree, batch: Batch):
            return loss_fn(params, model_state, batch, key=step_key(state))[0]

        # Of the losses only the shapes matter here.
        shapes = jax.eval_shape(losses, state.params, state.model_state, batch)
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        return {name: weight for name, (_, weight) in weighted_sums(zeros, batch, weights_fn).items()}

    def differentiate(
        state: TrainState, batch: Batch, totals: Mapping[str, Array]
    ) -> tuple[Params, PyTree, Sums]:
        key, scale = step_key(state), scales(totals, coefficients)

        def objective(params: Params, model_state: PyTree, batch: Batch):
            terms, model_state, metrics = loss_fn(params, model_state, batch, key=key)
            sums = weighted_sums(terms, batch, weights_fn)
            parts = {name: scale[name] * total for name, (total, _) in sums.items()}
            return sum(parts.values()), (model_state, (parts, dict(metrics)))

        grad_fn = jax.grad(objective, has_aux=True)
        if accumulate > 1:
            return _accumulate(grad_fn, state, batch, accumulate)
        grads, (model_state, sums) = grad_fn(state.params, state.model_state, batch)
        return grads, model_state, sums

    def apply(
        state: TrainState, grads: Params, model_state: PyTree, sums: Sums
    ) -> tuple[TrainState, dict[str, Array]]:
        parts, metrics = sums
        loss: Any = sum(parts.values())
        grad_norm = optax.tree.norm(grads)
        if (state.health is not None) != use_health:
            raise ValueError(
                "a state with health goes with on_nonfinite='skip' or max_spike, and a state without it "
                "with neither"
            )
        is_skipped, health = None, None
        if state.health is None:
            is_fault = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        else:
            is_skipped, is_fault, health = judge(
                state.health, loss, grad_norm, on_nonfinite=on_nonfinite, max_spike=max_spike
            )
        is_first_fault = is_fault & (state.guard < 0)
        guard = jnp.where(is_first_fault, state.step, state.guard).astype(jnp.int32)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            ema=_average(state.ema, params, ema_decay),
        )
        is_on = guard < 0
        is_applied = is_on if is_skipped is None else is_on & ~is_skipped
        # Without the key, which never changes: to choose between it and itself would use it twice.
        new_state, old_state = (dataclasses.replace(x, key=None) for x in (new_state, state))
        new_state = _select(is_applied, new_state, old_state)
        if health is not None:
            step, health = _select(is_on, (state.step + 1, health), (state.step, state.health))
            new_state = dataclasses.replace(new_state, step=step, health=health)
        values = {"loss": loss, "grad_norm": grad_norm, "guard": guard}
        if len(parts) > 1:
            values |= {f"loss/{name}": part for name, part in parts.items()}
        values |= {name: metric.compute() for name, metric in metrics.items()}
        if health is not None:
            values["skipped"] = health.skipped
        return dataclasses.replace(new_state, guard=guard, key=state.key), values

    return TrainStep(weigh, differentiate, apply, axis_name)


def step_key(state: TrainState) -> Array:
    """The key that the loss of the next step gets."""
    return jax.random.fold_in(state.key, state.step)


def weighted_sums(
    terms: Mapping[str, Array], batch: Batch, weights_fn: WeightsFn | None
) -> dict[str, tuple[Array, Array]]:
    """For each term the sums of loss x weight and of weight, over this part of the batch.

    Args:
        terms: losses `[B, ...]` by name.
        batch: what the weights are taken from.
        weights_fn: as `make_train_step` takes it.

    Raises:
        ValueError: if it gives no weights for a term.
    """
    weights = None if weights_fn is None else weights_fn(batch)
    sums = {}
    for name, loss in terms.items():
        if weights is None:
            weight = batch["mask"] if "mask" in batch else jnp.ones(loss.shape[:1], bool)
            weight = weight.reshape(weight.shape + (1,) * (loss.ndim - weight.ndim))
        elif name in weights:
            weight = weights[name]
        else:
            raise ValueError(f"weights_fn gives no weights for the loss term {name!r}")
        dtype = jnp.promote_types(loss.dtype, jnp.float32)
        weight = jnp.broadcast_to(weight, loss.shape).astype(dtype)
        # What has weight 0 does not enter the loss, not even as NaN. (Its gradient would be 0 x NaN:
        # rows that fill up a batch are copies of a real one.)
        product = jnp.where(weight != 0, loss.astype(dtype) * weight, 0)
        sums[name] = jnp.sum(product), jnp.sum(weight)
    return sums


def scales(totals: Mapping[str, Array], coefficients: Mapping[str, float]) -> dict[str, Array]:
    """What the sum of loss x weight of each term is multiplied by.

    Args:
        totals: the sums of the weights over the global batch.
        coefficients: of the terms; 1 for those that aren't named.

    Raises:
        ValueError: if a coefficient is of no term.
    """
    unused = sorted(set(coefficients) - set(totals))
    if unused:
        raise ValueError(f"coefficients for {unused}, but the loss has the terms {sorted(totals)}")
    return {
        name: coefficients.get(name, 1.0) / jnp.where(total == 0, 1, total)
        for name, total in totals.items()
    }


def _select(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _average(ema: Params | None, params: Params, decay: float | None) -> Params | None:
    if (ema is None) != (decay is None):
        raise ValueError("a state with an average needs ema_decay, and a step with it such a state")
    if decay is None:
        return None
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def _accumulate(grad_fn: Callable, state: TrainState, batch: Batch, accumulate: int):
    """Add gradients and sums over micro-batches; the model's state goes from one to the next."""

    def split(x: Array) -> Array:
        if x.shape[0] % accumulate:
            raise ValueError(
                f"{x.shape[0]} rows on a device can't be split into {accumulate} micro-batches"
            )
        return jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)

    def body(carry, numbered):
        (added, model_state), (number, micro) = carry, numbered
        with micro_batch(number, accumulate):
            grads, (model_state, sums) = grad_fn(state.params, model_state, micro)
        return (jax.tree.map(jnp.add, added, (grads, sums)), model_state), None

    micros = jax.tree.map(split, dict(batch))
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(grad_fn, state.params, state.model_state, first)
    grads, (_, sums) = shapes
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, sums))
    # XLA runs a convolution in a loop on a CPU up to 100 times slower than outside of it.
    unroll = accumulate if jax.default_backend() == "cpu" else 1
    numbered = jnp.arange(accumulate), micros
    (added, model_state), _ = lax.scan(body, (zeros, state.model_state), numbered, unroll=unroll)
    return added[0], model_state, added[1]
