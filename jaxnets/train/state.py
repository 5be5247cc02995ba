"""The state of a training run: a pytree of arrays and nothing else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets.train.health import Health, fresh_health
from jaxnets.typing import Array, Params, PyTree

InitFn = Callable[[Array], tuple[Params, PyTree]]
"""`init_fn(key) -> (params, model_state)`"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
        step: int32 `[]`, the number of steps done, those that were skipped among them.
        params: what the optimizer changes.
        model_state: what the model changes itself, such as running statistics; may be empty.
        opt_state: of the Optax transformation.
        key: the run's PRNG key; it never changes, each step folds its number in.
        ema: an exponential moving average of the params, which evaluation then uses, or None.
        guard: int32 `[]`, the step at which the loss or a gradient wasn't finite, -1 if none: from
            then on no step is applied.
        health: of steps that were skipped, or None where none ever is.
    """

    step: Array
    params: Params
    model_state: PyTree
    opt_state: optax.OptState
    key: Array
    ema: Params | None
    guard: Array
    health: Health | None = None


def create_state(
    init_fn: InitFn,
    tx: optax.GradientTransformation,
    *,
    key: Array,
    use_ema: bool = False,
    use_health: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
        init_fn: `init_fn(key) -> (params, model_state)`.
        tx: the optimizer.
        key: a PRNG key, from which both the parameters and the run's key derive.
        use_ema: whether an average of the parameters is kept; it starts as they do.
        use_health: whether steps may be skipped, as `jaxnets.train.health.uses_health` says.

    Returns:
        the state; on which devices is for `Strategy.init` to say.
    """
    init_key, run_key = jax.random.split(key)
    params, model_state = init_fn(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=tx.init(params),
        key=run_key,
        ema=params if use_ema else None,
        guard=jnp.full((), -1, jnp.int32),
        health=fresh_health() if use_health else None,
    )


def as_dict(state: TrainState) -> dict[str, Any]:
    """The fields by name, as they are stored; those that came later only where they are in use."""
    found = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return found if found["health"] is not None else {k: v for k, v in found.items() if k != "health"}
