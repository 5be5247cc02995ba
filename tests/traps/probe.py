"""What the tests of traps share: a metric that keeps what each row saw, and exact comparison."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
