"""What the tests of traps share: a metric that keeps what each row saw, and exact comparison."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets import losses, metrics, ops
from jaxnets.layers import BatchNorm, Dropout
from jaxnets.models import functional
from jaxnets.recipe import Recipe
from tests.image_classifier import make_loss_fn

NUM_CLASSES = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """`[N, ...]`, to which each row of a batch adds at its own place, wherever it was computed."""

    total: Any

    @classmethod
    def of(cls, values, rows, size: int) -> "Table":
        return cls(jnp.zeros((size, *values.shape[1:]), values.dtype).at[rows].add(values))

    def compute(self):
        return self.total


class Normed(nn.Module):
    """Batch normalisation and dropout in the least that compiles to something."""

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, image, *, train=False, rows=None, mask=None):
        x_BF = nn.Dense(8, dtype=self.dtype, name="dense")(image.reshape(image.shape[0], -1))
        x_BF = BatchNorm(dtype=self.dtype, name="norm")(x_BF, train=train, mask=mask)
        x_BF = Dropout(0.3, name="dropout")(jax.nn.relu(x_BF), train=train, rows=rows)
        return nn.Dense(NUM_CLASSES, dtype=self.dtype, name="head")(x_BF)


def normed(**fields):
    """`(init_fn, apply_fn, loss_fn)` for the images of `arrays`."""
    example = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.result_type(float))
    init_fn, apply_fn = functional(Normed(**fields), example)
    return init_fn, apply_fn, make_loss_fn(apply_fn)


def arrays(num_examples: int, seed: int = 0):
    """Images whose mean tells their class, more or less."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, NUM_CLASSES, num_examples).astype(np.int32)
    image = rng.normal(50 + 50 * label[:, None, None, None], 40, (num_examples, 4, 4, 1))
    return {"image": np.clip(image, 0, 255).astype(np.uint8), "label": label}


def recipe(data=None, *, batch_size: int = 16, eval_batch_size: int = 16) -> Recipe:
    """To train `Normed` on some data and to evaluate it on the same."""
    data = arrays(40) if data is None else data
    init_fn, apply_fn, loss_fn = normed()

    def eval_fn(params, model_state, batch):
        logits, _ = apply_fn(params, model_state, ops.normalize_images(batch["image"]), train=False)
        loss = losses.softmax_cross_entropy(logits, batch["label"])
        correct = metrics.is_correct(logits, batch["label"])
        return {
            "accuracy": metrics.Mean.of(correct, batch["mask"]),
            "loss": metrics.Mean.of(loss, batch["mask"]),
        }

    return Recipe(
        name="probe",
        init_fn=init_fn,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        tx=optax.sgd(0.05, momentum=0.9),
        train=data,
        test=data,
        num_positions=10 * batch_size,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
    )


def host(tree):
    """The leaves as arrays of NumPy, keys as their words."""

    def one(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(one, tree)


def assert_same(one, two):
    """Bit for bit, dtypes and shapes included."""
    one, two = (jax.tree_util.tree_leaves_with_path(host(tree)) for tree in (one, two))
    assert len(one) == len(two)
    for (path, x), (other, y) in zip(one, two, strict=True):
        assert path == other
        assert (x.dtype, x.shape) == (y.dtype, y.shape), jax.tree_util.keystr(path)
        assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)
