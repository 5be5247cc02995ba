"""The references of translation; the transformer is of PyTorch's own layers, with one tied embedding.

Written for speed as well: attention is PyTorch's fused one, with booleans for padding and for what comes
later.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_reference import attention_rnn
from benchmarks.torch_reference.parts import adamw, make_resident, take
from jaxnets import errors
from jaxnets.data.subwords import BEGIN, PAD
from jaxnets.interop import module_tables
from jaxnets.interop.reference import Reference
from jaxnets.interop.weights import Table


class Translator(nn.Module):
    """As `jaxnets.models.Transformer` in its default form: sinusoidal places, normalisation first."""

    def __init__(
        self,
        vocabulary_size: int,
        max_length: int,
        num_layers: int,
        num_heads: int,
        width: int,
        hidden: int,
        dropout_rate: float,
    ):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary_size, width)
        wavelengths = 10_000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.arange(max_length, dtype=torch.float64)[:, None] / wavelengths[None]
        places = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]
        places = places.to(torch.get_default_dtype())
        self.register_buffer("places", places, persistent=False)
        self.source_dropout = nn.Dropout(dropout_rate)
        self.target_dropout = nn.Dropout(dropout_rate)
        how: dict[str, Any] = {"batch_first": True, "norm_first": True, "dropout": dropout_rate}
        how |= {"dim_feedforward": hidden}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, num_heads, **how),
            num_layers,
            nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, num_heads, **how), num_layers, nn.LayerNorm(width)
        )

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]` of each token of the target `[B, T]`, given those before it."""
        is_padding = source == PAD
        x = self.source_dropout(self._embedded(source))
        memory = self.encoder(x, src_key_padding_mask=is_padding)
        said = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        length = target.shape[1]
        is_later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        y = self.decoder(
            self.target_dropout(self._embedded(said)),
            memory,
            tgt_mask=is_later,
            memory_key_padding_mask=is_padding,
            tgt_is_causal=True,
        )
        return F.linear(y, self.embedding.weight)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        places: Any = self.places
        return self.embedding(tokens) * self.width**0.5 + places[: tokens.shape[1]]


def reference(
    *,
    model: str,
    vocabulary_size: int,
    max_length: int,
    num_layers: int,
    num_heads: int,
    width: int,
    hidden: int,
    dropout_rate: float,
    label_smoothing: float,
    optimizer: str,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    dtype: str = "float32",
    **others: Any,
) -> Reference:
    """Build the reference.

    Args:
        model: transformer or attention_rnn, which takes no layers and heads.
        vocabulary_size: V, of both sides together.
        max_length: the longest sentence that it takes.
        num_layers: of encoder and decoder each.
        num_heads: N.
        width: D.
        hidden: F, or H of the RNN's states.
        dropout_rate: probability of dropping an element.
        label_smoothing: probability taken from the right token.
        optimizer: adamw.
        learning_rate: per step.
        momentum: decay of the first moment.
        weight_decay: of matrices alone.
        dtype: float32.
        others: parts of the recipe in use that the reference doesn't have.

    Raises:
        ConfigError: if it has no such model, optimizer or dtype, or there are other parts.
    """
    for name, given, known in (
        ("model", model, ("transformer", "attention_rnn")),
        ("optimizer", optimizer, ("adamw",)),
        ("dtype", dtype, ("float32",)),
    ):
        if given not in known:
            raise errors.unknown(f"{name} of the PyTorch reference", given, known)
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise errors.ConfigError(f"the PyTorch reference does not have {flags}; leave it out")

    def predict_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["source"], batch["target"])

    def loss_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits = predict_fn(model, batch).reshape(-1, vocabulary_size)
        return F.cross_entropy(
            logits, batch["target"].reshape(-1), ignore_index=PAD, label_smoothing=label_smoothing
        )

    make_optimizer = partial(
        adamw, learning_rate=learning_rate, weight_decay=weight_decay, betas=(momentum, 0.999)
    )

    if model == "transformer":
        sizes = (vocabulary_size, max_length, num_layers, num_heads, width, hidden, dropout_rate)
        make_model, weights = partial(Translator, *sizes), _table(num_layers, num_heads, width)
    else:
        sizes = (vocabulary_size, width, hidden, dropout_rate)
        make_model, weights = partial(attention_rnn.AttentionRNN, *sizes), attention_rnn.table()
    return Reference(
        make_model=make_model,
        loss_fn=loss_fn,
        predict_fn=predict_fn,
        make_optimizer=make_optimizer,
        make_resident=make_resident,
        take=take,
        weights=weights,
    )


def _table(num_layers: int, num_heads: int, width: int) -> Table:
    """The map of the transformer's weights."""
    stack: Any = {"num_layers": num_layers, "width": width, "num_heads": num_heads}
    return (
        *module_tables.embedding("embedding", "embedding"),
        *module_tables.encoder("encoder", "encoder", use_final_norm=True, **stack),
        *module_tables.decoder("decoder", "decoder", use_final_norm=True, **stack),
    )
