"""A tiny experiment with a PyTorch reference, and the records of both sides for a few steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import losses, metrics, models, ops, registry
from jaxnets.recipe import Recipe
from tests.image_classifier import make_loss_fn

CLASSES = 5


def recipe(
    model="lenet",
    *,
    image_shape=(16, 16, 1),
    batch_size=8,
    optimizer="sgd",
    learning_rate=0.05,
    weight_decay=0.0,
    label_smoothing=0.0,
    **changes,
):
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (64, *image_shape), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, 64).astype(np.int32),
    }
    init_fn, apply_fn = models.functional(
        registry.get("model", model)(num_classes=CLASSES),
        jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    )

    def eval_fn(params, model_state, batch):
        x_BHWC = ops.normalize_images(batch["image"])
        logits_BV, _ = apply_fn(params, model_state, x_BHWC, train=False)
        loss = losses.softmax_cross_entropy(logits_BV, batch["label"])
        return {"loss": metrics.Mean.of(loss, batch["mask"])}

    arguments = {
        "model": model,
        "image_shape": image_shape,
        "num_classes": CLASSES,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "momentum": 0.9,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
    }
    tx = registry.get("optimizer", optimizer)(learning_rate, momentum=0.9, weight_decay=weight_decay)
    whole = Recipe(
        name="tiny",
        init_fn=lambda key: _draw(jax.eval_shape(init_fn, key)),
        loss_fn=make_loss_fn(apply_fn, label_smoothing),
        eval_fn=eval_fn,
        tx=tx,
        train=arrays,
        test=arrays,
        num_positions=64,
        batch_size=batch_size,
        torch_reference="benchmarks.torch_reference.classifier:reference",
        torch_arguments=arguments,
    )
    return dataclasses.replace(whole, **changes)


def _draw(shapes):
    """Variables from NumPy: quick, and no bias is 0, no scale 1, no running mean 0."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        name = path[-1].key
        if name in ("scale", "var"):
            return 1 + 0.1 * np.abs(noise)
        return noise / np.sqrt(np.prod(x.shape[:-1])) if name == "kernel" else 0.1 * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def sides(model="lenet", dtype="float64", num_steps=2):
    """What both sides compute, and the tables of the weights; cached, so don't change it."""
    from jaxnets.data import Batches
    from jaxnets.interop.reference import load_reference
    from jaxnets.interop.sides import initial_variables, run_jax, run_torch

    made = recipe(model)
    reference = load_reference(made.name, made.torch_reference, made.torch_arguments)
    variables = initial_variables(made)
    draws = tuple(Batches(64, 8, 8 * num_steps))
    ours = run_jax(made, variables, draws, dtype)
    theirs = run_torch(reference, made.train, variables, draws, dtype)
    return made, reference, variables, draws, ours, theirs
