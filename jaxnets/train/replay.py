"""A step's loss and gradients once more, on one device: compiled, or one operation at a time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxnets.ops.forms import is_plain
from jaxnets.ops.partition import micro_batch
from jaxnets.train.mesh import path_of
from jaxnets.train.programs import CPU_OPTIONS
from jaxnets.train.provenance import TAG, Node, Walk, count
from jaxnets.train.state import TrainState
from jaxnets.train.step import scales, weighted_sums
from jaxnets.typing import Array, Batch, LossFn, Params, PyTree, WeightsFn

Parts = dict[str, Array]
"""The parts of the loss by term."""


@dataclasses.dataclass
class Replay:
    """What a step computes of a batch, by micro-batches.

    Attributes:
        loss_fn: as the step was made with, as are weights_fn, coefficients and accumulate.
        state: from before the step, on one device.
        batch: `{name: [B, ...]}` there.
        weights_fn: of the loss.
        coefficients: of its terms.
        accumulate: the number of micro-batches.
        number: of the step, from 0.
        kinds: the class of each Linen module by its path, once `walk` has seen them.
    """

    loss_fn: LossFn
    state: TrainState
    batch: Batch
    weights_fn: WeightsFn | None
    coefficients: Mapping[str, float]
    accumulate: int
    number: int
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key = jax.random.fold_in(self.state.key, self.number)
        sizes = {x.shape[0] for x in jax.tree.leaves(self.batch)}
        self.num_rows = max(sizes) // self.accumulate
        self.scale = scales(self._totals(), self.coefficients)

    def rows(self, m: int) -> Batch:
        """The rows of micro-batch m, of all devices."""
        return jax.tree.map(lambda x: x[m :: self.accumulate], dict(self.batch))

    def forward(self, params: Params, model_state: PyTree, micro: Batch, m: Any) -> tuple[Parts, PyTree]:
        """The parts of the loss by term, and the model's state after it."""
        with micro_batch(m, self.accumulate):
            terms, model_state, _ = self.loss_fn(params, model_state, micro, key=self.key)
            sums = weighted_sums(terms, micro, self.weights_fn)
        return {name: self.scale[name] * x for name, (x, _) in sums.items()}, model_state

    def gradients(
        self, params: Params, model_state: PyTree, micro: Batch, m: Any
    ) -> tuple[Params, tuple[PyTree, Parts]]:
        """The gradients; the model's state and the parts of the loss."""

        def objective(params: Params):
            parts, after = self.forward(params, model_state, micro, m)
            return sum(parts.values()), (after, parts)

        return jax.grad(objective, has_aux=True)(params)

    @functools.cached_property
    def compiled(self) -> Callable[..., tuple[Params, tuple[PyTree, Parts]]]:
        """`gradients`, compiled as the step is."""
        options = CPU_OPTIONS if jax.default_backend() == "cpu" and not is_plain() else None
        return jax.jit(lambda *args: self.gradients(*args), compiler_options=options)

    def gradients_of_terms(
        self, params: Params, model_state: PyTree, micro: Batch, m: int
    ) -> dict[str, Params]:
        """The gradients of each term alone."""

        def of_one(name: str, params: Params) -> Params:
            # With the others in hand, 0 x infinity would come of their gradients.
            return jax.grad(lambda x: self.forward(x, model_state, micro, m)[0][name])(params)

        return jax.jit(lambda params: {name: of_one(name, params) for name in self.scale})(params)

    def walk(
        self, function: Callable[..., PyTree], *args: PyTree
    ) -> tuple[Walk, list[tuple[str, Node]]]:
        """Evaluate one operation at a time.

        Args:
            function: `function(params, model_state, micro)`.
            args: those three.

        Returns:
            the walk, whose tags are of modules, and the results that aren't finite, by path.
        """
        try:
            return self._walk(function, args, has_tags=True)
        except TypeError:  # a loss that takes forward-mode derivatives itself, which a tag has none of
            return self._walk(function, args, has_tags=False)

    def _walk(self, function: Callable[..., PyTree], args: tuple[PyTree, ...], *, has_tags: bool):
        walk = Walk(self.num_rows)

        def seen(*args: Any):
            with nn.intercept_methods(functools.partial(self._intercept, has_tags)):
                return function(*args)

        closed, shapes = jax.make_jaxpr(seen, return_shape=True)(*args)
        leaves = [
            walk.argument(x, f"{name}/{path_of(path)}" if path else name)
            for name, tree in zip(("params", "model_state", "batch"), args, strict=True)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        ]
        outs = walk.run(closed, leaves)
        names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        return walk, [(name, out.node) for name, out in zip(names, outs, strict=True) if out.node]

    def _totals(self) -> dict[str, Array]:
        def losses(params: Params, model_state: PyTree, batch: Batch):
            return self.loss_fn(params, model_state, batch, key=self.key)[0]

        shapes = jax.eval_shape(losses, self.state.params, self.state.model_state, self.batch)
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        sums = weighted_sums(zeros, self.batch, self.weights_fn)
        return {name: weight for name, (_, weight) in sums.items()}

    def _intercept(self, has_tags: bool, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Name what goes into a module and comes out of it, and with that their gradients."""
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        path = "/".join(context.module.path)
        self.kinds[path] = type(context.module).__name__
        with jax.named_scope(f"module<{path}>"):
            if not has_tags:
                return method(*args, **kwargs)
            args, kwargs = _name_all((args, kwargs), f"input of {path or 'the model'}")
            return _name_all(method(*args, **kwargs), f"output of {path or 'the model'}")


def gradient_of(name: str) -> str:
    """What the gradient of a named value is called."""
    return f"gradient of the {name}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _named(x: Array, name: str) -> Array:
    return checkpoint_name(x, TAG + name)


def _named_forward(x: Array, name: str) -> tuple[Array, None]:
    return _named(x, name), None


def _named_backward(name: str, _: None, gradient: Array) -> tuple[Array]:
    return (checkpoint_name(gradient, TAG + gradient_of(name)),)


_named.defvjp(_named_forward, _named_backward)


def _name_all(tree: PyTree, name: str) -> PyTree:
    def one(x: Any) -> Any:
        is_floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
        return _named(x, name) if is_floating else x

    return jax.tree.map(one, tree)


def is_bad(tree: PyTree) -> bool:
    """Whether anything of a tree isn't finite."""
    return any(count(x) for x in jax.tree.leaves(tree))
