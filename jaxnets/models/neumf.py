"""NeuMF: a weighted product of embeddings beside a multilayer perceptron.

He et al. 2017, "Neural collaborative filtering" (arXiv 1708.05031): both parts have tables of their own,
and one linear layer over both gives the logit. I: the items there are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers import Embedding, Linear
from jaxnets.models.matrix_factorization import split_pairs
from jaxnets.typing import Array


class NeuMF(nn.Module):
    """Generalised matrix factorisation and an MLP, joined at the last layer.

    Attributes:
        num_users: U.
        num_items: I.
        width: D, of the vectors of the product.
        hidden: widths F of the perceptron's layers; its vectors are half of the first one.
        init_scale: standard deviation of the vectors at the start.
        dtype: of the computation.

    Example:
        >>> model = NeuMF(num_users=5, num_items=7, width=2, hidden=(4, 2))
        >>> pairs = jnp.array([[0, 6], [4, 1], [4, 2]])
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), pairs)[0].shape
        (3,)
    """

    num_users: int
    num_items: int
    width: int = 8
    hidden: Sequence[int] = (64, 32, 16, 8)
    init_scale: float = 0.01
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Make tables and layers."""
        init = nn.initializers.normal(self.init_scale)

        def table(size: int, width: int) -> Embedding:
            return Embedding(size, width, dtype=self.dtype, embedding_init=init)

        self.user = table(self.num_users, self.width)
        self.item = table(self.num_items, self.width)
        self.mlp_user = table(self.num_users, self.hidden[0] // 2)
        self.mlp_item = table(self.num_items, self.hidden[0] // 2)
        glorot = nn.initializers.glorot_uniform()
        self.dense = [Linear((size,), dtype=self.dtype, kernel_init=glorot) for size in self.hidden[1:]]
        self.head = Linear((1,), dtype=self.dtype, kernel_init=nn.initializers.lecun_uniform())

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
        return self._logits(self.user(user), self.mlp_user(user), item)

    def some_items(self, user: Array, items: Array) -> Array:
        """Logits `[B, J]` of users `[B]` for items `[B, J]`; the user's vectors are looked up once."""
        return self._logits(self.user(user)[:, None], self.mlp_user(user)[:, None], items)

    def _logits(self, of_user: Array, mlp_user: Array, item: Array) -> Array:
        """Logits `[...]` of items `[...]` for the vectors of their users."""
        product = of_user * self.item(item)
        mlp_item = self.mlp_item(item)
        x = jnp.concatenate([jnp.broadcast_to(mlp_user, mlp_item.shape), mlp_item], axis=-1)
        for layer in self.dense:
            x = jax.nn.relu(layer(x))
        return self.head(jnp.concatenate([product, x], axis=-1))[..., 0]

    def all_items(self, user: Array) -> Array:
        """Logits of every item, `[B, I]`, for users `[B]`."""
        items_I = jnp.arange(self.num_items)
        return self.some_items(user, jnp.broadcast_to(items_I[None], (len(user), self.num_items)))


def neumf(num_users: int = 1000, num_items: int = 1000, **kwargs) -> NeuMF:
    """The paper's NeuMF with 8 predictive factors: a perceptron of 64, 32, 16 and 8.

    Example:
        >>> neumf(5, 7).width
        8
    """
    return NeuMF(num_users, num_items, **kwargs)
