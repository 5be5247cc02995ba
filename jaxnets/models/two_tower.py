"""Two towers: a vector of the user and one of the item, whose product is the score.

Covington et al. 2016, "Deep neural networks for YouTube recommendations"; Yi et al. 2019,
"Sampling-bias-corrected neural modeling". The items' vectors don't depend on the user, so that the
best of a whole catalogue are one matrix product away. I: the items there are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers import Embedding, Linear
from jaxnets.models.matrix_factorization import split_pairs
from jaxnets.typing import Array


class Tower(nn.Module):
    """A table of vectors, and dense layers after it.

    Attributes:
        size: rows of the table.
        width: D, of its rows.
        hidden: widths of the layers, the last of which is that of the tower's vector; ReLU between.
        init_scale: standard deviation of the rows at the start.
        dtype: of the computation.
    """

    size: int
    width: int
    hidden: Sequence[int]
    init_scale: float
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Make table and layers."""
        init = nn.initializers.normal(self.init_scale)
        self.table = Embedding(self.size, self.width, dtype=self.dtype, embedding_init=init)
        self.dense = [Linear((size,), dtype=self.dtype) for size in self.hidden]

    def __call__(self, number: Array) -> Array:
        """Unit vectors `[..., D]` of integers `[...]`."""
        return self.after_table(self.table(number))

    def every(self) -> Array:
        """The vectors of all rows, `[size, D]`."""
        x_ID = self.table.embedding
        return self.after_table(x_ID.astype(self.dtype or x_ID.dtype))

    def after_table(self, x: Array) -> Array:
        """Unit vectors of rows of the table, `[..., D]` each."""
        for i, layer in enumerate(self.dense):
            x = layer(jax.nn.relu(x) if i else x)
        # In at least float32, with a bound below: a vector of zeros has no direction.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        norm = jnp.sqrt(jnp.maximum(jnp.sum(wide * wide, axis=-1, keepdims=True), 1e-12))
        return (wide / norm).astype(x.dtype)


class TwoTower(nn.Module):
    """`<user's vector, item's vector> / temperature`, both of length 1.

    Attributes:
        num_users: U.
        num_items: I.
        width: D, of the rows of the tables.
        hidden: widths of the layers of each tower.
        temperature: by which products, in [-1, 1], are divided to be logits.
        init_scale: standard deviation of the rows at the start.
        dtype: of the computation.

    Example:
        >>> model = TwoTower(num_users=5, num_items=7, width=4, hidden=(3,))
        >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.array([[0, 6]]))
        >>> jax.eval_shape(lambda p: model.apply(p, jnp.array([4, 1]), method="all_items"), params).shape
        (2, 7)
    """

    num_users: int
    num_items: int
    width: int = 32
    hidden: Sequence[int] = (64, 32)
    temperature: float = 0.1
    init_scale: float = 0.1
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Make the towers."""
        options = (self.width, self.hidden, self.init_scale, self.dtype)
        self.user = Tower(self.num_users, *options)
        self.item = Tower(self.num_items, *options)

    def __call__(
        self,
        pairs: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Score pairs.

        Args:
            pairs: integers `[..., 2]`, users and items.
            train: without effect here.
            rows: without effect here.
            mask: without effect here.

        Returns:
            logits `[...]`.
        """
        del train, rows, mask
        user, item = split_pairs(pairs)
        return jnp.sum(self.user(user) * self.item(item), axis=-1) / self.temperature

    def some_items(self, user: Array, items: Array) -> Array:
        """Logits `[B, J]` of users `[B]` for items `[B, J]`; the user's tower is computed once."""
        return jnp.einsum("BD,BJD->BJ", self.user(user), self.item(items)) / self.temperature

    def all_items(self, user: Array) -> Array:
        """Logits of every item, `[B, I]`, for users `[B]`."""
        return jnp.einsum("BD,ID->BI", self.user(user), self.item.every()) / self.temperature


def two_tower(num_users: int = 1000, num_items: int = 1000, **kwargs) -> TwoTower:
    """Tables of 32, layers of 64 and 32.

    Example:
        >>> two_tower(5, 7, temperature=0.2).hidden
        (64, 32)
    """
    return TwoTower(num_users, num_items, **kwargs)
