"""Recurrent layers: LSTM and GRU, of one or both directions of time, stacked.

Kernels are `[D, gates * H]` for the input and `[H, gates * H]` for the output that comes back, as in
Keras, whose start they share: uniform (Glorot & Bengio 2010), orthogonal (Saxe et al. 2013), and a bias
of 1 for the LSTM's forget gate (Jozefowicz et al. 2015). Gates are in PyTorch's order.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets import ops
from jaxnets.layers.dropout import Dropout
from jaxnets.typing import Array

_Gates = dict[str, int]
_NUM_GATES: _Gates = {"lstm": 4, "gru": 3}


class _Direction(nn.Module):
    """One layer in one direction of time.

    Attributes:
        kind: "lstm" or "gru".
        hidden: H.
        reverse: whether the last step is taken first.
        dropout_rate: of the input.
        recurrent_dropout_rate: of the output that comes back.
        dtype: of the computation.
    """

    kind: str
    hidden: int
    reverse: bool
    dropout_rate: float
    recurrent_dropout_rate: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self, x: Array, start: tuple[Array, ...], mask: Array | None, train: bool, rows: Array | None
    ) -> tuple[Array, tuple[Array, ...]]:
        """Outputs `[B, T, H]` and the state after the last step, of x `[B, T, D]` and mask `[B, T]`."""
        num_gates, size = _NUM_GATES[self.kind], self.hidden
        batch, _, width = x.shape
        init = nn.initializers
        kernel = self.param("kernel", init.glorot_uniform(), (width, num_gates * size), jnp.float32)
        recurrent = self.param(
            "recurrent_kernel", init.orthogonal(), (size, num_gates * size), jnp.float32
        )
        bias = self.param("bias", _first_bias(self.kind), (num_gates * size,), jnp.float32)
        dtype = self.dtype or jnp.result_type(x, kernel)
        if mask is not None:  # padding that isn't finite would get into the kernel's gradient
            x = jnp.where(mask[:, :, None], x, 0)
        ones = jnp.ones((batch, width), dtype)
        # The same elements at all steps (Gal & Ghahramani 2016, arXiv 1512.05287), as Keras has it.
        fed = Dropout(self.dropout_rate, name="dropout")(ones, train=train, rows=rows)
        x = x.astype(dtype)
        if fed is not ones:
            x = x * fed[:, None]
        ones = jnp.ones((batch, size), dtype)
        keep = Dropout(self.recurrent_dropout_rate, name="recurrent_dropout")(
            ones, train=train, rows=rows
        )
        x_TBD = x.swapaxes(0, 1)  # first: XLA's product that changes the order takes twice as long
        kernel, recurrent = kernel.astype(dtype), recurrent.astype(dtype)
        options = {
            "mask": None if mask is None else mask.T,
            "keep": None if keep is ones else keep,
            "reverse": self.reverse,
        }
        if self.kind == "lstm":
            y_TBH, *end = ops.lstm_of_input(x_TBD, kernel, bias, recurrent, *start, **options)
        else:
            hidden_bias = self.param("recurrent_bias", init.zeros, (size,), jnp.float32).astype(dtype)
            gates = ops.add_bias(ops.product(x_TBD, kernel), bias)
            y_TBH, *end = ops.gru(gates, recurrent, hidden_bias, *start, **options)
        y_BTH = y_TBH.swapaxes(0, 1)
        return y_BTH if mask is None else jnp.where(mask[:, :, None], y_BTH, 0), tuple(end)


class LSTM(nn.Module):
    """Long short-term memory; `jaxnets.ops.lstm` has the formula.

    Attributes:
        hidden: H.
        num_layers: L; each takes the outputs of the one before it.
        is_bidirectional: whether each has a second direction, from the last step to the first.
        dropout_rate: probability of dropping an element of a layer's input, at all steps alike.
        recurrent_dropout_rate: the same of the output that comes back to the gates.
        dtype: of the computation; that of input and parameters by default.
    """

    hidden: int
    num_layers: int = 1
    is_bidirectional: bool = False
    dropout_rate: float = 0.0
    recurrent_dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        start: tuple[Array, Array] | None = None,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Take all steps.

        Args:
            x: `[B, T, D]`.
            start: h and c before the first step, `[L, B, H]` each, with both directions `[2 L, B, H]`,
                of each layer the forward one first; zeros in at least float32 by default.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout masks belong.
            mask: boolean `[B, T]`, false for steps that a row doesn't take, such as padding.

        Returns:
            the last layer's outputs `[B, T, H]`, with both directions `[B, T, 2 H]`, 0 where the mask is
            false, and h and c after the last step that was taken, as `start` has them and in its dtypes.
        """
        y, (h, c) = _stacked(self, "lstm", x, start, train, rows, mask)
        return y, (h, c)


class GRU(nn.Module):
    """Gated recurrent unit; `jaxnets.ops.gru` has the formula. Fields and arguments are those of `LSTM`.

    Attributes:
        hidden: H.
        num_layers: L.
        is_bidirectional: whether each layer has a second direction.
        dropout_rate: of a layer's input.
        recurrent_dropout_rate: of the output that comes back.
        dtype: of the computation.
    """

    hidden: int
    num_layers: int = 1
    is_bidirectional: bool = False
    dropout_rate: float = 0.0
    recurrent_dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        start: Array | None = None,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, Array]:
        """Outputs, and h after the last step, `[L, B, H]`; see `LSTM`."""
        y, (h,) = _stacked(self, "gru", x, None if start is None else (start,), train, rows, mask)
        return y, h


def _stacked(layer, kind, x, start, train, rows, mask):
    if x.ndim != 3:
        raise ValueError(f"a recurrent layer takes [B, T, D], not {x.shape}")
    if layer.num_layers < 1 or layer.hidden < 1:
        raise ValueError(f"{layer.num_layers} layers of {layer.hidden} units; both are at least 1")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"the mask of {x.shape} is [B, T], not {mask.shape}")
    num_directions = 2 if layer.is_bidirectional else 1
    count = layer.num_layers * num_directions
    shape = (count, x.shape[0], layer.hidden)
    if start is None:
        dtype = jnp.promote_types(layer.dtype or x.dtype, jnp.float32)
        start = (jnp.zeros(shape, dtype),) * (2 if kind == "lstm" else 1)
    if any(part.shape != shape for part in start):
        raise ValueError(f"the first state is {shape}, not {[part.shape for part in start]}")
    ends = []
    for i in range(layer.num_layers):
        outputs = []
        for k in range(num_directions):
            direction = _Direction(
                kind,
                layer.hidden,
                bool(k),
                layer.dropout_rate,
                layer.recurrent_dropout_rate,
                layer.dtype,
                name=f"{'backward' if k else 'forward'}{i + 1}",
            )
            first = tuple(part[i * num_directions + k] for part in start)
            y_BTH, end = direction(x, first, mask, train, rows)
            outputs.append(y_BTH)
            ends.append(end)
        x = jnp.concatenate(outputs, axis=2)
    return x, tuple(jnp.stack(parts) for parts in zip(*ends, strict=True))


def _first_bias(kind: str) -> Callable[..., Array]:
    """Zeros, but 1 for the LSTM's forget gate."""

    def init(key, shape, dtype=jnp.float32):
        bias = jnp.zeros(shape, dtype)
        size = shape[0] // 4
        return bias.at[size : 2 * size].set(1) if kind == "lstm" else bias

    return init
