"""A small classification problem that the tests of training share."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets import models, registry
from jaxnets.train import create_state, make_strategy, make_train_step
from tests.image_classifier import make_loss_fn

TINY = {
    "lenet": {},
    "convnet": {"features": (4, 8), "hidden": 16},
    "mlp": {"hidden": (16, 16), "dropout_rate": 0.3},
    "resnet18": {"stages": (1, 1), "width": 4},
    "resnet50": {"stages": (1, 1), "width": 4, "small_images": False},
    "speednet": {"widths": (4, 8)},
}
HAS_BATCH_STATISTICS = ("convnet", "resnet18", "resnet50", "speednet")


def arrays(num_examples: int = 96, size: int = 16, num_classes: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (num_examples, size, size, 1), dtype=np.uint8),
        "label": rng.integers(0, num_classes, num_examples).astype(np.int32),
    }


def classifier(name: str, size: int = 16, num_classes: int = 4):
    """`(init_fn, loss_fn)` of a registered model in a tiny variant."""
    model = registry.get("model", name)(num_classes=num_classes, **TINY[name])
    example = jax.ShapeDtypeStruct((1, size, size, 1), jnp.result_type(float))
    init_fn, apply_fn = models.functional(model, example)
    return init_fn, make_loss_fn(apply_fn)


def to_float(tree, dtype):
    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def run(
    init_fn,
    loss_fn,
    draws,
    data,
    *,
    strategy: str = "jit",
    num_devices: int = 1,
    accumulate: int = 1,
    tx: optax.GradientTransformation | None = None,
    dtype=jnp.float32,
):
    """Train over the draws; the last state and the losses."""
    tx = tx or optax.sgd(0.01, momentum=0.9)
    where = make_strategy(strategy, num_devices=num_devices)

    def make_state():
        return to_float(create_state(init_fn, tx, key=jax.random.key(1)), dtype)

    make_step = functools.partial(make_train_step, loss_fn, tx, accumulate=accumulate)
    step = where.compile_step(make_step, data)
    state, seen = where.init(make_state), []
    for draw in draws:
        state, values = step(state, draw)
        seen.append(float(values["loss"]))  # many steps of eight devices in flight starve one another
    return state, np.asarray(seen)


def draws(batches) -> list[Mapping[str, np.ndarray]]:
    return [batches[i] for i in range(len(batches))]


def relative_difference(a, b) -> float:
    """The largest difference, each leaf relative to its own largest magnitude."""

    def one(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) if x.size else 0.0

    return max(jax.tree.leaves(jax.tree.map(one, a, b)))


def learnt(state):
    """What training changed, without the key and the counters."""
    return state.params, state.model_state, state.opt_state


def restore_latest(checkpoints, abstract):
    """`(state, manifest, lines)` of the newest whole step, or Nones, as a run that goes on takes it."""
    step, lines = checkpoints.newest_whole()
    return (None, None, lines) if step is None else (*checkpoints.restore(step, abstract), lines)
