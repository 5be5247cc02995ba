"""The language model in PyTorch, as nanoGPT has it, and its experiment.

Written for speed as well: one product for queries, keys and values, PyTorch's own attention, and in
prediction logits of the last place alone.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_reference.parts import adamw
from jaxnets import errors
from jaxnets.interop import gpt2
from jaxnets.interop.reference import Reference


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, num_heads: int, use_bias: bool, dropout_rate: float):
        super().__init__()
        self.num_heads = num_heads
        self.c_attn = nn.Linear(width, 3 * width, bias=use_bias)
        self.c_proj = nn.Linear(width, width, bias=use_bias)
        self.attn_dropout = nn.Dropout(dropout_rate)
        self.resid_dropout = nn.Dropout(dropout_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        batch, length, width = x.shape
        query, key, value = (
            y.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for y in self.c_attn(x).split(width, dim=2)
        )
        rate = self.attn_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, length, width)))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, use_bias: bool, use_tanh: bool, dropout_rate: float):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=use_bias)
        self.gelu = nn.GELU(approximate="tanh" if use_tanh else "none")
        self.c_proj = nn.Linear(4 * width, width, bias=use_bias)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention and an MLP, each behind a normalisation."""

    def __init__(self, width: int, num_heads: int, use_bias: bool, use_tanh: bool, dropout_rate: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=use_bias)
        self.attn = Attention(width, num_heads, use_bias, dropout_rate)
        self.ln_2 = nn.LayerNorm(width, bias=use_bias)
        self.mlp = MLP(width, use_bias, use_tanh, dropout_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer with a tied embedding."""

    def __init__(
        self,
        vocabulary_size: int,
        context: int,
        num_layers: int,
        num_heads: int,
        width: int,
        use_bias: bool,
        use_tanh: bool,
        dropout_rate: float,
    ):
        super().__init__()
        block = (width, num_heads, use_bias, use_tanh, dropout_rate)
        parts = {
            "wte": nn.Embedding(vocabulary_size, width),
            "wpe": nn.Embedding(context, width),
            "drop": nn.Dropout(dropout_rate),
            "h": nn.ModuleList([Block(*block) for _ in range(num_layers)]),
            "ln_f": nn.LayerNorm(width, bias=use_bias),
        }
        self.transformer = nn.ModuleDict(parts)

    def forward(self, tokens: torch.Tensor, *, only_last: bool = False) -> torch.Tensor:
        """Logits `[B, T, V]` for tokens `[B, T]`, or `[B, 1, V]` of the last place."""
        parts: Any = self.transformer
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = parts.drop(parts.wte(tokens) + parts.wpe(places))
        for block in parts.h:
            x = block(x)
        return F.linear(parts.ln_f(x[:, -1:] if only_last else x), parts.wte.weight)


def reference(
    *,
    vocabulary_size: int,
    context: int,
    num_layers: int,
    num_heads: int,
    width: int,
    learning_rate: float,
    second_moment: float,
    weight_decay: float,
    use_bias: bool = False,
    use_tanh: bool = False,
    dropout_rate: float = 0.0,
    dtype: str = "float32",
    **others: Any,
) -> Reference:
    """Build a language model's reference.

    Args:
        vocabulary_size: V.
        context: T.
        num_layers: L.
        num_heads: N.
        width: D.
        learning_rate: of AdamW, per step.
        second_moment: decay of its second moment; that of the first is 0.9.
        weight_decay: of matrices alone.
        use_bias: whether biases are learnt.
        use_tanh: whether GELU is the one with tanh.
        dropout_rate: in four places.
        dtype: of the computation: "float32" is PyTorch's default dtype; "bfloat16" is autocast.
        others: parts of the recipe in use that the reference doesn't have.

    Raises:
        ConfigError: if there are other parts.
    """
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise errors.ConfigError(f"the PyTorch reference does not have {flags}; leave it out")
    sizes = (vocabulary_size, context, num_layers, num_heads, width)

    def run(model: nn.Module, tokens: torch.Tensor, *, only_last: bool = False) -> torch.Tensor:
        if dtype == "float32":
            return model(tokens, only_last=only_last)
        with torch.autocast(tokens.device.type, getattr(torch, dtype)):
            return model(tokens, only_last=only_last).to(torch.get_default_dtype())

    def predict_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return run(model, batch["tokens"][:, :-1], only_last=True)[:, 0]

    def loss_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        logits = run(model, tokens[:, :-1])
        return F.cross_entropy(logits.reshape(-1, vocabulary_size), tokens[:, 1:].reshape(-1))

    make_optimizer = partial(
        adamw, learning_rate=learning_rate, weight_decay=weight_decay, betas=(0.9, second_moment)
    )

    weights = gpt2.table(
        num_layers=num_layers,
        num_heads=num_heads,
        width=width,
        use_bias=use_bias,
        is_linear=True,
    )
    return Reference(
        make_model=lambda: GPT(*sizes, use_bias, use_tanh, dropout_rate),
        loss_fn=loss_fn,
        predict_fn=predict_fn,
        make_optimizer=make_optimizer,
        make_resident=make_resident,
        take=take,
        weights=weights,
    )


def make_resident(
    arrays: Mapping[str, np.ndarray], *, channels_last: bool = False
) -> dict[str, torch.Tensor]:
    """The windows `tokens` `[N, T + 1]` in memory; channels_last is for images."""
    del channels_last
    tokens = arrays["tokens"]
    if tokens.dtype != np.uint8:  # PyTorch does little with uint16
        tokens = tokens.astype(np.int32)
    return {"tokens": torch.from_numpy(np.require(tokens, requirements=["C", "W"]))}


def take(
    resident: Mapping[str, torch.Tensor], index: torch.Tensor, *, channels_last: bool = False
) -> dict[str, torch.Tensor]:
    """The windows of a draw, int64 `[B, T + 1]`."""
    del channels_last
    return {"tokens": resident["tokens"].index_select(0, index).long()}
