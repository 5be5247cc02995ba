"""Tiny models of translation that their tests share, with a batch that has padding in it."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import models, registry

V, B, S, T = 12, 8, 6, 5
KEY = jax.random.key(1)
QUICK = {"xla_backend_optimization_level": 0}
FIELDS = {
    "transformer": {"num_layers": 2, "width": 8, "num_heads": 2, "hidden": 12, "max_length": 16},
    "attention_rnn": {"width": 8, "hidden": 6},
}
NAMES = registry.names("translation_model")


def build(name, **fields):
    return registry.get("translation_model", name)(vocabulary_size=V, **{**FIELDS[name], **fields})


def functions(name, **fields):
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return models.functional(build(name, **fields), {"source": example, "target": example})


def draw(shapes, seed=2, dtype=np.float32):
    """Parameters drawn by NumPy, large enough that each of them matters."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        values = rng.normal(size=x.shape) / (np.sqrt(np.prod(x.shape[:-1])) if len(x.shape) > 1 else 4)
        return jnp.asarray(values + (path[-1].key == "scale"), dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@cache
def start(name, dtype=np.float32, **fields):
    return draw(jax.eval_shape(functions(name, **fields)[0], KEY)[0], dtype=dtype)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, S + 1, B)
    return {
        "tokens": {
            "source": jnp.asarray(rng.integers(3, V, (B, S)).astype(np.int32)),
            "target": jnp.asarray(rng.integers(0, V, (B, T)).astype(np.int32)),
        },
        "source_mask": jnp.asarray(np.arange(S) < lengths[:, None]),
        "label": jnp.asarray(rng.integers(0, V, (B, T)).astype(np.int32)),
        "label_mask": jnp.asarray(rng.random((B, T)) < 0.8),
        "index": jnp.asarray(rng.permutation(1000)[:B]),
    }
