"""The PyTorch reference of matrix factorisation, with optimizers for whole tables and for rows."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.torch_reference.parts import make_resident, take
from jaxnets import errors
from jaxnets.interop.reference import Reference
from jaxnets.interop.weights import Row, Table

_DENSE = ("sgd", "adam", "adamw")
_SPARSE = ("sgd", "adagrad", "lazy_adam")
TABLES = ("user", "item", "user_bias", "item_bias")


class MatrixFactorization(nn.Module):
    """`mean + biases + <user, item>`; takes users and items `[B]`, gives ratings `[B]`."""

    def __init__(self, num_users: int, num_items: int, width: int, mean: float, is_sparse: bool):
        super().__init__()
        self.mean = mean
        self.user = nn.Embedding(num_users, width, sparse=is_sparse)
        self.item = nn.Embedding(num_items, width, sparse=is_sparse)
        self.user_bias = nn.Embedding(num_users, 1, sparse=is_sparse)
        self.item_bias = nn.Embedding(num_items, 1, sparse=is_sparse)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Ratings `[B]`."""
        scores = (self.user(user) * self.item(item)).sum(-1) + self.mean
        return scores + self.user_bias(user)[:, 0] + self.item_bias(item)[:, 0]

    def squared_norms(self, user: torch.Tensor, item: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of vectors and of biases, `[B]` each."""
        vectors = (self.user(user) ** 2).sum(-1) + (self.item(item) ** 2).sum(-1)
        return vectors, self.user_bias(user)[:, 0] ** 2 + self.item_bias(item)[:, 0] ** 2


def table() -> Table:
    """The map of the weights."""
    return tuple(Row(f"params/{name}/embedding", f"{name}.weight") for name in TABLES)


def reference(
    *,
    model: str,
    num_users: int,
    num_items: int,
    mean: float,
    loss: str,
    width: int,
    penalty: float,
    bias_penalty: float,
    update_rows: bool,
    optimizer: str,
    learning_rate: float,
    weight_decay: float,
    dtype: str = "float32",
    **others: Any,
) -> Reference:
    """Build the reference.

    Args:
        model: matrix_factorization.
        num_users: U.
        num_items: I.
        mean: what ratings are about.
        loss: squared_error.
        width: D, of the vectors.
        penalty: times the squared length of the vectors, for each example.
        bias_penalty: the same of the biases.
        update_rows: whether the tables have sparse gradients, and the optimizer is one for these.
        optimizer: sgd, adam or adamw; for rows sgd, adagrad or lazy_adam, which is SparseAdam.
        learning_rate: per step.
        weight_decay: as PyTorch's optimizer has it; none for rows.
        dtype: float32.
        others: parts of the recipe in use that the reference doesn't have.

    Raises:
        ConfigError: if it has no such model, loss, optimizer or dtype, or there are other parts.
    """
    for name, given, known in (
        ("model", model, ("matrix_factorization",)),
        ("loss", loss, ("squared_error",)),
        ("optimizer", optimizer, _SPARSE if update_rows else _DENSE),
        ("dtype", dtype, ("float32",)),
    ):
        if given not in known:
            raise errors.unknown(f"{name} of the PyTorch reference", given, known)
    if update_rows and weight_decay:
        raise errors.ConfigError("PyTorch's optimizers for rows have no weight decay")
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise errors.ConfigError(f"the PyTorch reference takes {flags} at its plainest alone")

    def predict_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["user"], batch["item"])

    def loss_fn(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ratings = predict_fn(model, batch)
        error = ratings - batch["rating"].to(ratings.dtype)
        total = (error * error).mean()
        if (penalty or bias_penalty) and model.training:
            vectors, biases = model.squared_norms(batch["user"], batch["item"])
            total = total + (penalty * vectors + bias_penalty * biases).mean()
        return total

    def make_optimizer(
        parameters: Iterable[nn.Parameter],
        *,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> torch.optim.Optimizer:
        if update_rows:
            if fused or foreach:
                raise ValueError("not for sparse gradients")
            torch.sparse.check_sparse_tensor_invariants.disable()  # or Adagrad warns that it is
            kinds = {
                "sgd": torch.optim.SGD,
                "adagrad": torch.optim.Adagrad,
                "lazy_adam": torch.optim.SparseAdam,
            }
            return kinds[optimizer](parameters, lr=learning_rate)
        how: Any = {"lr": learning_rate, "weight_decay": weight_decay}
        how |= {"fused": fused, "foreach": foreach}
        if optimizer == "sgd":
            return torch.optim.SGD(parameters, **how)
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, betas=(0.9, 0.999), eps=1e-8, **how)

    return Reference(
        make_model=lambda: MatrixFactorization(num_users, num_items, width, mean, update_rows),
        loss_fn=loss_fn,
        predict_fn=predict_fn,
        make_optimizer=make_optimizer,
        make_resident=make_resident,
        take=take,
        weights=table(),
    )
