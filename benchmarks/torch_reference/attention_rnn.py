"""The attention RNN in PyTorch: ATen's GRU over the source, a loop over the target.

Written for speed as well: nothing is packed, the direction from the end reads each sentence turned
round, and what the gates take from the target's tokens is one product. A GRU of PyTorch has two biases
where one counts; of the second only the part behind the reset gate is a parameter here, as Adam would
take every step of the others twice. Layers whose outputs at padding, which nobody sees, are other ones
than in JAX are lists of parameters: the duel compares what modules give.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.data.subwords import BEGIN, PAD
from jaxnets.interop import module_tables
from jaxnets.interop.weights import Row, Table, dense


class AttentionRNN(nn.Module):
    """As `jaxnets.models.AttentionRNN`. H: width of the states; S, T: tokens of source and target."""

    def __init__(self, vocabulary_size: int, width: int, hidden: int, dropout_rate: float):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.ahead = _gru_parameters(hidden, kernel=width)
        self.back = _gru_parameters(hidden, kernel=width)
        self.start = nn.Linear(hidden, hidden)
        square = (hidden, hidden)
        sizes = {"key": (hidden, 2 * hidden), "bias": (hidden,), "query": square, "score": (1, hidden)}
        self.look = nn.ParameterDict(_empty(**sizes))
        self.cell = _gru_parameters(hidden, kernel=width, context_kernel=2 * hidden)
        self.readout = nn.Linear(width + 3 * hidden, width)
        self.source_dropout = nn.Dropout(dropout_rate)
        self.target_dropout = nn.Dropout(dropout_rate)
        self.memory_dropout = nn.Dropout(dropout_rate)
        self.readout_dropout = nn.Dropout(dropout_rate)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]` of each token of the target `[B, T]`, given those before it."""
        is_padding = source == PAD
        memory, state = self._encode(source, (~is_padding).sum(1))
        memory = self.memory_dropout(memory)
        look = self.look
        keys = F.linear(memory, look["key"], look["bias"])
        said = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        x = self.target_dropout(self._embedded(said))
        cell = self.cell
        states, looks = [], []
        for gates in F.linear(x, cell["kernel"], cell["bias"]).unbind(1):
            asked = torch.tanh(F.linear(state, look["query"])[:, None] + keys)
            score = F.linear(asked, look["score"])[..., 0]
            weights = score.masked_fill(is_padding, -torch.inf).softmax(1)
            seen = torch.bmm(weights[:, None], memory)[:, 0]
            state = _step(cell, gates + F.linear(seen, cell["context_kernel"]), state)
            states.append(state)
            looks.append(seen)
        y = torch.cat([x, torch.stack(states, 1), torch.stack(looks, 1)], 2)
        y = self.readout_dropout(torch.tanh(self.readout(y)))
        return F.linear(y, self.embedding.weight)

    def _encode(self, source: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs `[B, S, 2 H]`, at padding any, and the state that the target begins with."""
        x = self.source_dropout(self._embedded(source))
        places = torch.arange(source.shape[1], device=source.device)
        turned = length[:, None] - 1 - places
        turned = torch.where(turned < 0, places, turned)[..., None]
        from_end = _gru(self.back, x.gather(1, turned.expand_as(x)))
        from_end = from_end.gather(1, turned.expand_as(from_end))
        state = torch.tanh(self.start(from_end[:, 0]))
        return torch.cat([_gru(self.ahead, x), from_end], 2), state

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens) * self.width**0.5


def table() -> Table:
    """The map of the weights."""
    return (
        *module_tables.embedding("embedding", "embedding"),
        *_gru_rows("encoder/forward1/", "ahead", "kernel"),
        *_gru_rows("encoder/backward1/", "back", "kernel"),
        *dense("start"),
        *(
            Row(f"params/cross_attention/{name}/kernel", f"look.{name}", "dense")
            for name in ("query", "key", "score")
        ),
        Row("params/cross_attention/key/bias", "look.bias"),
        *_gru_rows("", "cell", "kernel", "context_kernel"),
        *dense("readout"),
    )


def _gru_parameters(hidden: int, **inputs: int) -> nn.ParameterDict:
    """Of gates in the order r, z, n; `inputs` are names of kernels, and how much each takes."""
    kernels = {name: (3 * hidden, size) for name, size in inputs.items()}
    kernels |= {"recurrent_kernel": (3 * hidden, hidden)}
    return nn.ParameterDict(_empty(**kernels, bias=(3 * hidden,), recurrent_bias=(hidden,)))


def _empty(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}


def _gru_rows(linen: str, torch_name: str, *kernels: str) -> Table:
    rows = [
        Row(f"params/{linen}{name}", f"{torch_name}.{name}", "dense")
        for name in (*kernels, "recurrent_kernel")
    ]
    biases = ("bias", "recurrent_bias")
    return (*rows, *(Row(f"params/{linen}{name}", f"{torch_name}.{name}") for name in biases))


def _gru(p: nn.ParameterDict, x: torch.Tensor) -> torch.Tensor:
    """Outputs `[B, S, H]` of x `[B, S, D]`, from a state of zeros."""
    start = x.new_zeros(1, len(x), len(p["recurrent_bias"]))
    second_bias = F.pad(p["recurrent_bias"], (2 * start.shape[2], 0))
    weights: Any = (p["kernel"], p["recurrent_kernel"], p["bias"], second_bias)
    return torch.gru(x, start, weights, True, 1, 0.0, False, False, True)[0]  # as nn.GRU calls it


def _step(p: nn.ParameterDict, gates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The state `[B, H]` after one more step, to whose gates `[B, 3 H]` the input is given."""
    size = state.shape[1]
    of_state = F.linear(state, p["recurrent_kernel"])
    reset, keep = torch.sigmoid(gates[:, : 2 * size] + of_state[:, : 2 * size]).chunk(2, 1)
    new = torch.tanh(gates[:, 2 * size :] + reset * (of_state[:, 2 * size :] + p["recurrent_bias"]))
    return torch.lerp(new, state, keep)
