"""The PyTorch reference of recommenders, with optimizers for whole tables and for rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_reference import parts
from benchmarks.torch_reference.recommender_models import MatrixFactorization, NeuMF, TwoTower
from benchmarks.torch_reference.sampled_items import make_sampler
from jaxnets import errors
from jaxnets.interop.reference import Reference

_DENSE = ("sgd", "adam", "adamw")
_SPARSE = ("sgd", "adagrad", "lazy_adam")
_LOSSES = ("squared_error", "bce", "softmax")
_MODELS: dict[str, Callable[..., Any]] = {
    "matrix_factorization": MatrixFactorization,
    "embedding_dot": partial(MatrixFactorization, use_bias=False),
    "neumf": NeuMF,
    "two_tower": TwoTower,
}


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
    sampling_key: Sequence[int],
    num_negatives: int,
    num_tries: int,
    dtype: str = "float32",
    **others: Any,
) -> Reference:
    """Build the reference.

    Args:
        model: matrix_factorization, embedding_dot, neumf or two_tower.
        num_users: U.
        num_items: I.
        mean: what ratings are about.
        loss: squared_error of ratings; bce, or softmax, of items that were rated and sampled ones.
        width: D, of the vectors; NeuMF has the paper's.
        penalty: times the squared length of the vectors, for each example.
        bias_penalty: the same of the biases.
        update_rows: whether the tables have sparse gradients, and the optimizer is one for these.
        optimizer: sgd, adam or adamw; for rows sgd, adagrad or lazy_adam, which is SparseAdam.
        learning_rate: per step.
        weight_decay: as PyTorch's optimizer has it; none for rows.
        sampling_key: the words of the PRNG key of sampled items.
        num_negatives: J, how many are sampled for each that was rated.
        num_tries: to sample one that the user hasn't rated.
        dtype: float32.
        others: parts of the recipe in use that the reference doesn't have.

    Raises:
        ConfigError: if it has no such model, loss, optimizer or dtype, or there are other parts.
    """
    for name, given, known in (
        ("model", model, tuple(_MODELS)),
        ("loss", loss, _LOSSES),
        ("optimizer", optimizer, _SPARSE if update_rows else _DENSE),
        ("dtype", dtype, ("float32",)),
    ):
        if given not in known:
            raise errors.unknown(f"{name} of the PyTorch reference", given, known)
    if update_rows and weight_decay:
        raise errors.ConfigError("PyTorch's optimizers for rows have no weight decay")
    if optimizer == "lazy_adam" and model in ("neumf", "two_tower"):
        raise errors.ConfigError(f"PyTorch's Adam for rows is for tables alone, and {model} has layers")
    if loss == "softmax" and model in ("matrix_factorization", "neumf"):
        raise errors.ConfigError(
            f"softmax doesn't depend on one of {model}'s biases, whose steps would be rounding, which "
            "can't be compared: say --loss bce"
        )
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise errors.ConfigError(f"the PyTorch reference takes {flags} at its plainest alone")

    fields: dict[str, Any] = {"is_sparse": update_rows}
    if model != "neumf":
        fields["width"] = width
    if model == "matrix_factorization":
        fields["mean"] = mean
    make_model = partial(_MODELS[model], num_users, num_items, **fields)
    is_explicit = loss == "squared_error"
    sampler = make_sampler(sampling_key, num_items, num_negatives, num_tries)

    def predict_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["user"], batch["item"])

    def loss_fn(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if is_explicit:
            ratings = predict_fn(model, batch)
            total = F.mse_loss(ratings, batch["rating"].to(ratings.dtype))
        else:
            scores = model.some_items(batch["user"], sampler(batch))
            if loss == "bce":
                is_rated = torch.zeros_like(scores)
                is_rated[:, 0] = 1
                total = F.binary_cross_entropy_with_logits(scores, is_rated)
            else:
                total = F.cross_entropy(scores, torch.zeros_like(batch["item"]))
        if (penalty or bias_penalty) and model.training:
            vectors, biases = model.squared_norms(batch["user"], batch["item"])
            total = total + (penalty * vectors + bias_penalty * biases).mean()
        return total

    def make_resident(
        arrays: Mapping[str, np.ndarray], *, channels_last: bool = False
    ) -> dict[str, torch.Tensor]:
        resident = parts.make_resident(arrays, channels_last=channels_last)
        if not is_explicit:
            seen = torch.zeros(num_users, num_items, dtype=torch.bool)
            seen[resident["user"], resident["item"]] = True
            resident["seen"] = seen
        return resident

    def take_sampled(
        resident: Mapping[str, torch.Tensor],
        index: torch.Tensor,
        position: torch.Tensor,
        *,
        channels_last: bool = False,
    ) -> dict[str, torch.Tensor]:
        columns = {name: x for name, x in resident.items() if name != "seen"}
        batch = parts.take(columns, index, channels_last=channels_last)
        return {**batch, "position": position, "seen": resident["seen"]}

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

    with torch.device("meta"):
        weights = make_model().table()
    return Reference(
        make_model=make_model,
        loss_fn=loss_fn,
        predict_fn=predict_fn,
        make_optimizer=make_optimizer,
        make_resident=make_resident,
        take=parts.take if is_explicit else take_sampled,
        weights=weights,
        takes_position=not is_explicit,
    )
