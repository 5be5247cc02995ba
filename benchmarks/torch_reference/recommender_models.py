"""Recommenders in PyTorch, as those of `jaxnets.models`, and the maps of their weights.

Each scores pairs, `model(user, item)` of `[B]` both, or J items a user, `some_items(user, items)`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.interop import module_tables
from jaxnets.interop.weights import Table, dense


class MatrixFactorization(nn.Module):
    """`mean + biases + <user, item>`, or without biases the dot product of two embeddings."""

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        is_sparse: bool,
        width: int,
        mean: float = 0.0,
        use_bias: bool = True,
    ):
        super().__init__()
        self.mean = mean
        self.use_bias = use_bias
        self.user = nn.Embedding(num_users, width, sparse=is_sparse)
        self.item = nn.Embedding(num_items, width, sparse=is_sparse)
        if use_bias:
            self.user_bias = nn.Embedding(num_users, 1, sparse=is_sparse)
            self.item_bias = nn.Embedding(num_items, 1, sparse=is_sparse)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Scores `[B]`."""
        scores = (self.user(user) * self.item(item)).sum(-1) + self.mean
        if self.use_bias:
            scores = scores + self.user_bias(user)[:, 0] + self.item_bias(item)[:, 0]
        return scores

    def some_items(self, user: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Scores `[B, J]`."""
        scores = (self.user(user)[:, None] * self.item(items)).sum(-1)
        if self.use_bias:
            scores = scores + self.user_bias(user) + self.item_bias(items)[..., 0]
        return scores + self.mean if self.mean else scores

    def squared_norms(self, user: torch.Tensor, item: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of vectors and of biases, `[B]` each."""
        vectors = (self.user(user) ** 2).sum(-1) + (self.item(item) ** 2).sum(-1)
        if not self.use_bias:
            return vectors, torch.zeros_like(vectors)
        return vectors, self.user_bias(user)[:, 0] ** 2 + self.item_bias(item)[:, 0] ** 2

    def table(self) -> Table:
        """The map of the weights."""
        names = ("user", "item", "user_bias", "item_bias")[: 4 if self.use_bias else 2]
        return tuple(row for name in names for row in module_tables.embedding(name, name))


class NeuMF(nn.Module):
    """Generalised matrix factorisation and an MLP, joined at the last layer."""

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        is_sparse: bool,
        width: int = 8,
        hidden: Sequence[int] = (64, 32, 16, 8),
    ):
        super().__init__()
        half = hidden[0] // 2
        self.user = nn.Embedding(num_users, width, sparse=is_sparse)
        self.item = nn.Embedding(num_items, width, sparse=is_sparse)
        self.mlp_user = nn.Embedding(num_users, half, sparse=is_sparse)
        self.mlp_item = nn.Embedding(num_items, half, sparse=is_sparse)
        self.dense = _layers(2 * half, hidden[1:])
        self.head = nn.Linear(width + hidden[-1], 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Logits `[B]`."""
        return self._logits(self.user(user), self.mlp_user(user), item)

    def some_items(self, user: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Logits `[B, J]`; the user's vectors are looked up once."""
        return self._logits(self.user(user)[:, None], self.mlp_user(user)[:, None], items)

    def _logits(self, of_user: torch.Tensor, mlp_user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        product = of_user * self.item(item)
        mlp_item = self.mlp_item(item)
        x = torch.cat([mlp_user.expand_as(mlp_item), mlp_item], -1)
        for layer in self.dense:
            x = F.relu(layer(x))
        return self.head(torch.cat([product, x], -1))[..., 0]

    def table(self) -> Table:
        """The map of the weights."""
        names = ("user", "item", "mlp_user", "mlp_item")
        tables = [row for name in names for row in module_tables.embedding(name, name)]
        return (*tables, *_rows("", self.dense), *dense("head"))


class Tower(nn.Module):
    """A table of vectors, and dense layers after it."""

    def __init__(self, size: int, width: int, hidden: Sequence[int], is_sparse: bool):
        super().__init__()
        self.table = nn.Embedding(size, width, sparse=is_sparse)
        self.dense = _layers(width, hidden)

    def forward(self, number: torch.Tensor) -> torch.Tensor:
        """Unit vectors `[..., D]` of integers `[...]`."""
        x = self.table(number)
        for i, layer in enumerate(self.dense):
            x = layer(F.relu(x) if i else x)
        return F.normalize(x, dim=-1, eps=1e-6)


class TwoTower(nn.Module):
    """`<user's vector, item's vector> / temperature`, both of length 1."""

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        is_sparse: bool,
        width: int,
        hidden: Sequence[int] = (64, 32),
        temperature: float = 0.1,
    ):
        super().__init__()
        self.temperature = temperature
        self.user = Tower(num_users, width, hidden, is_sparse)
        self.item = Tower(num_items, width, hidden, is_sparse)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Logits `[B]`."""
        return (self.user(user) * self.item(item)).sum(-1) / self.temperature

    def some_items(self, user: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Logits `[B, J]`; the user's tower is computed once."""
        return (self.user(user)[:, None] * self.item(items)).sum(-1) / self.temperature

    def table(self) -> Table:
        """The map of the weights."""
        towers = {"user": self.user, "item": self.item}
        rows = [
            (*module_tables.embedding(f"{name}/table", f"{name}.table"), *_rows(name, tower.dense))
            for name, tower in towers.items()
        ]
        return (*rows[0], *rows[1])


def _layers(width: int, sizes: Sequence[int]) -> nn.ModuleList:
    inputs = [width, *sizes][:-1]
    return nn.ModuleList(nn.Linear(*pair) for pair in zip(inputs, sizes, strict=True))


def _rows(name: str, layers: nn.ModuleList) -> Table:
    """Of a list of dense layers, which Linen numbers with an underscore."""
    ours, theirs = (f"{name}/dense_", f"{name}.dense.") if name else ("dense_", "dense.")
    return tuple(row for i in range(len(layers)) for row in dense(f"{ours}{i}", f"{theirs}{i}"))
