"""A tiny language model that its tests share, with a batch that has padding in it."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import losses, models
from jaxnets.models.gpt import GPT

V, B, T = 24, 8, 7
TINY = {"vocabulary_size": V, "max_length": 10, "num_layers": 2, "num_heads": 4, "width": 16}
QUICK = {"xla_backend_optimization_level": 0}
KEY = jax.random.key(1)


def tiny(**fields):
    return models.functional(GPT(**{**TINY, **fields}), jax.ShapeDtypeStruct((1, T), jnp.int32))


def shapes_of(model):
    init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, T), jnp.int32))
    return jax.eval_shape(init_fn, jax.random.key(0))[0]


@cache
def start(dtype=np.float32, **fields):
    """Parameters drawn by NumPy, large enough that each of them matters."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        size = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
        values = rng.normal(size=leaf.shape) / np.sqrt(size) + (path[-1].key == "scale")
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(GPT(**{**TINY, **fields})))


def batch_of():
    """Sequences of different lengths, filled up; the last row is padding alone."""
    rng = np.random.default_rng(0)
    lengths = np.array([T, 4, T, 1, 6, 3, 2, 0])
    is_real = np.arange(T)[None] < lengths[:, None]
    is_real[2, :3] = False  # on the left
    tokens, labels = rng.integers(0, V, (2, B, T))
    return {
        "tokens": tokens,
        "label": np.where(is_real, labels, -1),
        "token_mask": is_real,
        "index": rng.permutation(1000)[:B],
    }


def mean_loss(params, batch, **fields):
    """The mean over tokens that are real, and the logits."""
    _, apply_fn = tiny(**fields)
    mask, rows = batch["token_mask"], batch["index"]
    logits, _ = apply_fn(params, {}, batch["tokens"], train=True, key=KEY, rows=rows, mask=mask)
    loss_BT = losses.softmax_cross_entropy(logits, batch["label"])
    return jnp.where(mask, loss_BT, 0).sum() / mask.sum(), logits


@cache
def compiled(**fields):
    """`(params, batch) -> (loss, gradients)`."""
    step = jax.value_and_grad(lambda params, batch: mean_loss(params, batch, **fields)[0])
    return jax.jit(step, compiler_options=QUICK)


@cache
def evaluate(**fields):
    """`(params, tokens, mask=None) -> logits`."""
    _, apply_fn = tiny(**fields)

    def run(params, tokens, mask=None):
        return apply_fn(params, {}, tokens, train=False, mask=mask)[0]

    return jax.jit(run, compiler_options=QUICK)


def assert_close(left, right, tolerance):
    """Each leaf within a share of the largest number of all: some are rounding alone."""
    size = max(np.abs(x).max() for x in jax.tree.leaves(right))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size)


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
