"""Matrix factorisation: a rating as a product of two vectors, and biases.

Koren, Bell & Volinsky 2009, "Matrix factorization techniques for recommender systems". A pair of user
and item is a row `[2]` of integers, so that `[B, J, 2]` are J items for each of B users.
I: the items there are.
"""

import chex
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxnets.layers import Embedding
from jaxnets.typing import Array


class MatrixFactorization(nn.Module):
    """`mean + bias of the user + bias of the item + <user, item>`.

    Attributes:
        num_users: U.
        num_items: I.
        width: D, of the vectors.
        use_bias: whether there are biases; without, it is the plain product of embeddings.
        mean: what the rest is added to, such as the mean rating; it isn't learnt.
        init_scale: standard deviation of the vectors at the start.
        dtype: of the computation.
    """

    num_users: int
    num_items: int
    width: int = 32
    use_bias: bool = True
    mean: float = 0.0
    init_scale: float = 0.05
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Make the tables."""
        init = nn.initializers.normal(self.init_scale)
        sizes = {"user": self.num_users, "item": self.num_items}
        for name, size in sizes.items():
            table = Embedding(size, self.width, dtype=self.dtype, embedding_init=init)
            setattr(self, name, table)
            if self.use_bias:
                zero = nn.initializers.zeros_init()
                table = Embedding(size, 1, dtype=self.dtype, embedding_init=zero)
                setattr(self, f"{name}_bias", table)

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
            `[...]`, ratings or logits.
        """
        del train, rows, mask
        user, item = split_pairs(pairs)
        scores = jnp.sum(self.user(user) * self.item(item), axis=-1) + self.mean
        if self.use_bias:
            scores = scores + self.user_bias(user)[..., 0] + self.item_bias(item)[..., 0]
        return scores

    def some_items(self, user: Array, items: Array) -> Array:
        """Scores `[B, J]` of users `[B]` for items `[B, J]`; the user's vector is looked up once."""
        scores_BJ = jnp.einsum("BD,BJD->BJ", self.user(user), self.item(items)) + self.mean
        if self.use_bias:
            scores_BJ = scores_BJ + self.user_bias(user) + self.item_bias(items)[..., 0]
        return scores_BJ

    def all_items(self, user: Array) -> Array:
        """Scores of every item, `[B, I]`, for users `[B]`."""
        scores_BI = self.item.attend(self.user(user)) + self.mean
        if self.use_bias:
            scores_BI = scores_BI + self.user_bias(user) + self.item_bias.embedding.T
        return scores_BI

    def squared_norms(self, pairs: Array) -> tuple[Array, Array]:
        """What a penalty is of: `|user|**2 + |item|**2` of vectors and of biases, `[...]` each."""
        user, item = split_pairs(pairs)
        vectors = jnp.sum(self.user(user) ** 2, axis=-1) + jnp.sum(self.item(item) ** 2, axis=-1)
        if not self.use_bias:
            return vectors, jnp.zeros_like(vectors)
        return vectors, self.user_bias(user)[..., 0] ** 2 + self.item_bias(item)[..., 0] ** 2


def sharding_rules() -> tuple[tuple[str, P], ...]:
    """Where the leaves of the training state of any recommender lie: vectors are cut along their width.

    Returns:
        ordered (pattern, spec), as of `jaxnets.models.gpt.sharding_rules`.
    """
    return ("_bias/embedding$", P()), ("embedding$", P(None, ("fsdp", "tensor"))), (".*", P())


def split_pairs(pairs: Array) -> tuple[Array, Array]:
    """Users and items, `[...]` each, of pairs `[..., 2]`.

    Raises:
        AssertionError: if the last axis isn't of two.
    """
    chex.assert_axis_dimension(pairs, -1, 2)
    return pairs[..., 0], pairs[..., 1]


def matrix_factorization(num_users: int = 1000, num_items: int = 1000, **kwargs) -> MatrixFactorization:
    """Vectors of 32 and biases."""
    return MatrixFactorization(num_users, num_items, **kwargs)


def embedding_dot(num_users: int = 1000, num_items: int = 1000, **kwargs) -> MatrixFactorization:
    """Vectors of 32 without biases: the dot product of two embeddings."""
    return MatrixFactorization(num_users, num_items, use_bias=False, **kwargs)
