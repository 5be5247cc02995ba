"""What references of texts and ratings share: rows in memory, AdamW that decays matrices alone."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn


def make_resident(
    arrays: Mapping[str, np.ndarray], *, channels_last: bool = False
) -> dict[str, torch.Tensor]:
    """The training set in memory, integers as those that embeddings are fastest with."""
    del channels_last  # is for images
    return {
        name: torch.from_numpy(x.astype(np.int64 if x.dtype.kind in "iu" else x.dtype))
        for name, x in arrays.items()
    }


def take(
    resident: Mapping[str, torch.Tensor], index: torch.Tensor, *, channels_last: bool = False
) -> dict[str, torch.Tensor]:
    """The rows of a draw, `[B, ...]` each."""
    del channels_last
    return {name: x.index_select(0, index) for name, x in resident.items()}


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool | None = None,
    foreach: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW whose weight decay is of matrices alone."""
    given = list(parameters)
    groups = [
        {"params": [p for p in given if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in given if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused, foreach=foreach
    )
