"""The PyTorch reference of the classifiers of texts: word vectors, `nn.LSTM`, a linear layer.

Written for speed as well: `nn.LSTM` is oneDNN's on a CPU. Where all texts of a batch are of one length,
as in the benchmark, nothing is packed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_reference.parts import make_resident, take
from jaxnets import errors
from jaxnets.interop import module_tables, weights
from jaxnets.interop.reference import Reference


class LSTMClassifier(nn.Module):
    """As `jaxnets.models.text_classifier.LSTMClassifier` in its tutorial's form, without dropout."""

    def __init__(self, vocabulary_size: int, num_classes: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        # It adds nothing to the first one, and Adam would take every step twice.
        zeros = torch.zeros(4 * hidden)
        del self.lstm.bias_hh_l0
        self.lstm.register_buffer("bias_hh_l0", zeros, persistent=False)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Logits `[B, V]` of tokens `[B, T]`, of which `length` of each row count."""
        x = self.embedding(tokens)
        y, _ = self.lstm(x)
        last = (length - 1).clamp(min=0)
        return self.head(y[torch.arange(len(y), device=y.device), last])


def reference(
    *,
    model: str,
    vocabulary_size: int,
    num_classes: int,
    optimizer: str,
    learning_rate: float,
    width: int,
    hidden: int,
    num_layers: int,
    is_bidirectional: bool,
    pooling: str,
    dropout_rate: float,
    recurrent_dropout_rate: float,
    dtype: str = "float32",
    **others: Any,
) -> Reference:
    """Build the reference of the tutorial's network.

    Raises:
        ConfigError: for any other network, an optimizer but Adam, dropout, another dtype than float32,
            or other parts in use.
    """
    if (model, num_layers, is_bidirectional, pooling) != ("lstm_classifier", 1, False, "last"):
        raise errors.ConfigError(
            "the PyTorch reference is an lstm_classifier of one layer in one direction, with "
            "--pooling last"
        )
    if dropout_rate or recurrent_dropout_rate:
        raise errors.ConfigError(
            "the PyTorch reference has no dropout on the recurrent output, which nn.LSTM can't: say "
            "--dropout-rate 0 --recurrent-dropout-rate 0"
        )
    if optimizer != "adam":
        raise errors.unknown("PyTorch optimizer", optimizer, ("adam",))
    if dtype != "float32":
        raise errors.unknown("dtype of the PyTorch reference", dtype, ("float32",))
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise errors.ConfigError(f"the PyTorch reference does not have {flags}; leave it out")

    def predict_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["tokens"], batch["length"])

    def loss_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(predict_fn(model, batch), batch["label"])

    def make_optimizer(
        parameters: Iterable[nn.Parameter],
        *,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused, foreach=foreach
        )

    return Reference(
        make_model=lambda: LSTMClassifier(vocabulary_size, num_classes, width, hidden),
        loss_fn=loss_fn,
        predict_fn=predict_fn,
        make_optimizer=make_optimizer,
        make_resident=make_resident,
        take=take,
        weights=(
            *module_tables.embedding("embedding", "embedding"),
            *module_tables.recurrent("lstm", "lstm", kind="lstm"),
            *weights.dense("head"),
        ),
    )
