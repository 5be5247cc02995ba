"""The same steps in JAX and in PyTorch, recorded in one form so that they can be compared.

Both start from the same weights and see the same rows. The JAX side runs the training step that
training runs, compiled in the same way; dropout is off on both sides, since masks can't agree.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.extend.core import get_opaque_trace_state

from jaxnets import errors
from jaxnets.data import take
from jaxnets.interop.reference import Reference
from jaxnets.interop.torch_side import dropout_places
from jaxnets.interop.weights import flatten, only_params, to_linen, to_torch
from jaxnets.layers.dropout import Dropout, without_dropout
from jaxnets.recipe import Recipe
from jaxnets.train import create_state, make_strategy
from jaxnets.train.row_updates import step_maker

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Record:
    """What one side computed; arrays by Linen's paths and in Linen's layouts.

    Attributes:
        outputs: of the layers and of the model (""), on the first batch, in training.
        eval_outputs: the same in evaluation, after the last step, so with running statistics.
        losses: of each step.
        grads: of the first step.
        after_one: parameters and running statistics after the first step.
        after_all: the same after the last.
        dropout_rates: of the model's dropout layers that drop something, sorted.
    """

    outputs: Arrays
    eval_outputs: Arrays
    losses: list[float]
    grads: Arrays
    after_one: Arrays
    after_all: Arrays
    dropout_rates: list[float]


def initial_variables(recipe: Recipe) -> dict[str, Any]:
    """Parameters and model state as training starts with them, on the host."""
    key = jax.random.key(recipe.seed)
    state = make_strategy("jit", num_devices=1).init(
        lambda: create_state(recipe.init_fn, recipe.tx, key=key)
    )
    return jax.device_get({"params": state.params, **state.model_state})


def output_bytes(recipe: Recipe, variables: Mapping[str, Any], draw: Mapping[str, Any]) -> int:
    """The size in float64 of what all layers of the recipe give for this draw; nothing is computed."""
    model_state = dict(variables)
    params = model_state.pop("params")
    key = jax.random.key(recipe.seed)
    run = _recording(lambda batch: recipe.loss_fn(params, model_state, batch, key=key), [])
    shapes = jax.eval_shape(run, dict(take(recipe.train_arrays, draw)))
    return 8 * sum(x.size for x in jax.tree.leaves(shapes))


def run_jax(
    recipe: Recipe, variables: Mapping[str, Any], draws: Sequence[Mapping[str, Any]], dtype: str
) -> Record:
    """Train for a few steps with the recipe's own step.

    Args:
        recipe: of the experiment.
        variables: what to start from.
        draws: one for each step.
        dtype: "float64" or "float32".
    """
    strategy = make_strategy("jit", num_devices=1)
    # An optimizer whose state keeps the gradients: they come out of the very step that trains.
    keep_grads = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )
    tx = optax.chain(keep_grads, recipe.tx)
    predict_fn = recipe.predict_fn or recipe.eval_fn
    with (
        without_dropout(),
        jax.enable_x64(dtype == "float64"),
        jax.default_matmul_precision("highest"),
    ):
        cast = jax.tree.map(lambda x: x.astype(dtype), dict(variables))
        params, model_state = cast.pop("params"), cast
        first = take(recipe.train_arrays, draws[0])
        key = jax.random.key(recipe.seed)
        outputs, rates = _layer_outputs(
            lambda batch: recipe.loss_fn(params, model_state, batch, key=key), first
        )
        state = strategy.init(lambda: create_state(lambda _: (params, model_state), tx, key=key))
        step = strategy.compile_step(
            partial(
                step_maker(recipe.tables),
                recipe.loss_fn,
                tx,
                weights_fn=recipe.weights_fn,
                coefficients=recipe.coefficients,
            ),
            recipe.train_arrays,
        )
        losses, snapshots, grads = [], [], {}
        for i, draw in enumerate(draws):
            state, metrics = step(state, draw)
            losses.append(float(metrics["loss"]))
            if i == 0:
                grads = flatten({"params": jax.device_get(state.opt_state[0])})
            if i in (0, len(draws) - 1):
                snapshots.append(flatten(jax.device_get({"params": state.params, **state.model_state})))
        eval_outputs, _ = _layer_outputs(
            lambda batch: predict_fn(state.params, state.model_state, batch), first
        )
    after_one, after_all = snapshots[0], snapshots[-1]
    return Record(outputs, eval_outputs, losses, grads, after_one, after_all, rates)


def run_torch(
    reference: Reference,
    arrays: Mapping[str, np.ndarray],
    variables: Mapping[str, Any],
    draws: Sequence[Mapping[str, Any]],
    dtype: str,
) -> Record:
    """The same in PyTorch, eagerly; arguments as in `run_jax`, `arrays` being the training set."""
    import torch

    with _torch_settings(dtype):
        model = reference.make_model()
        state_dict = to_torch(reference.weights, jax.tree.map(lambda x: x.astype(dtype), variables))
        load_weights(model, state_dict)
        rates = []
        for place in dropout_places(model):
            rates += [rate] if (rate := float(getattr(*place))) else []
            setattr(*place, 0.0)
        optimizer = reference.make_optimizer(model.parameters())
        batch_of = _batch_maker(reference, arrays)
        first = batch_of(draws[0])
        with _torch_outputs(model, reference) as outputs, torch.no_grad():
            copy = {name: x.clone() for name, x in model.state_dict().items()}
            reference.loss_fn(model.train(), first)
            model.load_state_dict(copy)  # the running statistics have moved
        losses, snapshots, grads = [], [], {}
        for i, draw in enumerate(draws):
            optimizer.zero_grad(set_to_none=True)
            loss = reference.loss_fn(model, batch_of(draw))
            loss.backward()
            if i == 0:
                grad = {name: p.grad for name, p in model.named_parameters()}
                found = {
                    name: (x.to_dense() if x.is_sparse else x).numpy().copy() for name, x in grad.items()
                }
                grads = flatten(to_linen(only_params(reference.weights), found))
            optimizer.step()
            losses.append(loss.item())
            if i in (0, len(draws) - 1):
                found = {name: x.numpy().copy() for name, x in model.state_dict().items()}
                snapshots.append(flatten(to_linen(reference.weights, found)))
        with _torch_outputs(model, reference) as eval_outputs, torch.no_grad():
            reference.predict_fn(model.eval(), first)
    after_one, after_all = snapshots[0], snapshots[-1]
    return Record(outputs, eval_outputs, losses, grads, after_one, after_all, sorted(rates))


def _batch_maker(reference: Reference, arrays: Mapping[str, np.ndarray]) -> Callable[[Any], Any]:
    """`batch_of(draw)` in PyTorch; only what is sampled may need more of the set than a draw's rows."""
    import torch

    whole = reference.make_resident(arrays) if reference.takes_position else {}

    def batch_of(draw: Mapping[str, Any]) -> Any:
        if whole:
            return reference.take(whole, *map(torch.from_numpy, reference.places(draw)))
        rows = {name: np.take(x, draw["index"], axis=0) for name, x in arrays.items()}
        return reference.take(reference.make_resident(rows), torch.arange(len(draw["index"])))

    return batch_of


def load_weights(model: Any, state_dict: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into a PyTorch model.

    Raises:
        ParityError: if a name or a shape differs from the model's own.
    """
    import torch

    own = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    given = {name: x.shape for name, x in state_dict.items()}
    for name in [*own, *given]:
        if own.get(name) != given.get(name):
            raise errors.ParityError(
                f"weights: PyTorch's {name} is {own.get(name, 'missing')}, the map gives "
                f"{given.get(name, 'nothing')}"
            )
    model.load_state_dict({name: torch.tensor(x) for name, x in state_dict.items()})


def _layer_outputs(function: Any, batch: Mapping[str, Any]) -> tuple[Arrays, list[float]]:
    """The outputs of all Linen modules while function(batch) runs, and the dropout rates."""
    rates: list[float] = []
    outputs = jax.jit(_recording(function, rates))(dict(batch))
    return jax.device_get(outputs), sorted(rates)


def _recording(function: Any, rates: list[float]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What gives the outputs of Linen modules while function(batch) runs; it adds dropout rates.

    Those within a loop of JAX's can't leave it, and are left out.
    """

    def run(batch: Mapping[str, Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        outside = get_opaque_trace_state()

        def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out = next_fun(*args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out  # of a recurrent layer, beside its state
            is_outside = get_opaque_trace_state() == outside
            if context.method_name == "__call__" and is_outside and isinstance(first, jax.Array):
                _add(seen, "/".join(context.module.path), first)
                if isinstance(context.module, Dropout) and context.module.rate:
                    rates.append(float(context.module.rate))
            return out

        with nn.intercept_methods(record):
            function(batch)
        return seen

    return run


@contextlib.contextmanager
def _torch_outputs(model: Any, reference: Reference) -> Iterator[Arrays]:
    """The outputs of the layers in the table and of the model, filled while the block runs."""
    names = {torch: linen for linen, torch in (row.module for row in reference.weights) if linen}
    names[""] = ""
    seen: Arrays = {}

    def hook_of(name: str) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            array = (out[0] if isinstance(out, tuple) else out).detach().numpy()
            _add(seen, name, array.transpose(0, 2, 3, 1) if array.ndim == 4 else array.copy())

        return hook

    handles = [
        module.register_forward_hook(hook_of(names[name]))
        for name, module in model.named_modules()
        if name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _add(seen: dict[str, Any], name: str, value: Any) -> None:
    """A layer that is called again has one entry for each call."""
    count = sum(key.partition(" #")[0] == name for key in seen)
    seen[f"{name} #{count + 1}" if count else name] = value


@contextlib.contextmanager
def _torch_settings(dtype: str) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_float32_matmul_precision(before[1])
