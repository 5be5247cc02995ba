"""A table of vectors, one for each token or position."""

import chex
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.ops.partition import constrain, has_some_rows
from jaxnets.ops.product import product
from jaxnets.typing import Array


def embed(table: Array, indices: Array) -> Array:
    """The rows of a table.

    Args:
        table: `[V, D]`.
        indices: integers `[...]` in [0, V). Another index gives NaN, which stops training, where the
            nearest row or one counted from the end would train on silently.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: if the indices are no integers.

    Example:
        >>> embed(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0, 2])).tolist()
        [[3.0, 4.0], [1.0, 2.0], [nan, nan]]
    """
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices of a table are integers, not {indices.dtype}")
    return (
        jnp.asarray(table).at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )


class Embedding(nn.Module):
    """`embed` with a learnt table, and its products with the table's rows.

    Attributes:
        num_embeddings: V, the number of rows.
        width: D, the length of a row.
        dtype: of the output; the table's by default.
        embedding_init: of the table.
        axis: what the rows are to a strategy that spreads them, such as "vocabulary".
    """

    num_embeddings: int
    width: int
    dtype: DTypeLike | None = None
    embedding_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    axis: str | None = None

    def setup(self) -> None:
        """Make the table, or take the one that is there: of a step on rows it has these alone."""
        shape = (self.num_embeddings, self.width)
        if has_some_rows():
            self.embedding = self.get_variable("params", "embedding")
            chex.assert_shape(self.embedding, (None, self.width))
        else:
            self.embedding = self.param("embedding", self.embedding_init, shape, jnp.float32)

    def __call__(self, indices: Array) -> Array:
        """Rows `[..., D]` for integers `[...]`."""
        # Rows that are cut over devices come together before the look-up: XLA has no good way after it.
        x = embed(constrain(self.embedding, self.axis, None), indices)
        return x.astype(self.dtype or x.dtype)

    def attend(self, x: Array) -> Array:
        """Products with every row, `[..., D]` to `[..., V]`."""
        dtype = self.dtype or jnp.result_type(x, self.embedding)
        return product(x.astype(dtype), self.embedding.astype(dtype).T)
