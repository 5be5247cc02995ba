"""A Linen module as two pure functions, which is all that training knows of a model."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jaxnets.typing import Array, Params, PyTree


def functional(
    model: nn.Module, example: PyTree
) -> tuple[Callable[[Array], tuple[Params, PyTree]], Callable[..., tuple[Array, PyTree]]]:
    """Split a module into its parameters' start and its computation.

    Args:
        model: called as `model(x, train=..., rows=..., mask=...)`.
        example: shape and dtype of its input, or of each of them, as a `jax.ShapeDtypeStruct`; the
            shape counts, its content doesn't.

    Returns:
        `init_fn(key) -> (params, model_state)` and
        `apply_fn(params, model_state, x, *, train, key=None, rows=None, mask=None) -> (output,
        model_state)`. model_state holds every collection but the parameters, and is {} if there is
        none; only training changes it. key is for dropout.

    Example:
        >>> import jax.numpy as jnp, jaxnets.models
        >>> image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        >>> init_fn, apply_fn = functional(jaxnets.models.mlp(num_classes=3), image)
        >>> params, model_state = init_fn(jax.random.key(0))
        >>> apply_fn(params, model_state, jnp.ones((5, 8, 8, 1)), train=False)[0].shape
        (5, 3)
    """

    def init_fn(key: Array) -> tuple[Params, PyTree]:
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), example)
        variables = dict(model.init(key, zeros))
        return variables.pop("params"), variables

    def apply_fn(
        params: Params,
        model_state: PyTree,
        x: PyTree,
        *,
        train: bool,
        key: Array | None = None,
        rows: Array | None = None,
        mask: PyTree = None,
    ) -> tuple[Array, PyTree]:
        variables = {"params": params, **model_state}
        rngs: Any = {} if key is None else {"dropout": key}
        arguments = {"train": train, "rows": rows, "mask": mask, "rngs": rngs}
        changing = list(model_state) if train else []
        output: Any
        output, changed = model.apply(variables, x, **arguments, mutable=changing)
        return output, {**model_state, **changed}

    return init_fn, apply_fn
