"""Weights of GPT-2 as `transformers` and nanoGPT name them, into `models.gpt` and back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxnets import errors
from jaxnets.interop.weights import Row, Table, as_array, to_torch

if TYPE_CHECKING:  # PyTorch's side of a duel never imports JAX
    from jaxnets.models.gpt import GPT

_PREFIX = "transformer."
_HEAD = "lm_head.weight"


def table(
    *,
    num_layers: int,
    num_heads: int,
    width: int,
    use_bias: bool = True,
    tie_embeddings: bool = True,
    is_linear: bool = False,
) -> Table:
    """The map of the weights of a model with learned positions.

    Args:
        num_layers: L.
        num_heads: N.
        width: D.
        use_bias: whether there are biases.
        tie_embeddings: whether the logits come from the table of token embeddings.
        is_linear: whether kernels are `[out, in]`, as of nanoGPT's `nn.Linear`, or `[in, out]`, as of
            the `Conv1D` in `transformers`.
    """
    layout, heads = "dense" if is_linear else "same", (num_heads, width // num_heads)

    def kernel(linen: str, torch: str, **fields: Any) -> tuple[Row, ...]:
        weight = Row(f"params/{linen}/kernel", f"{torch}.weight", layout, **fields)
        if not use_bias:
            return (weight,)
        part = {"part": fields["part"]} if "part" in fields else {}
        return weight, Row(f"params/{linen}/bias", f"{torch}.bias", **part)

    def norm(linen: str, torch: str) -> tuple[Row, ...]:
        scale = Row(f"params/{linen}/scale", f"{torch}.weight")
        bias = Row(f"params/{linen}/bias", f"{torch}.bias")
        return (scale, bias) if use_bias else (scale,)

    rows = [
        Row("params/token_embedding/embedding", f"{_PREFIX}wte.weight"),
        Row("params/position_embedding/embedding", f"{_PREFIX}wpe.weight"),
    ]
    for i in range(num_layers):
        ours, theirs = f"block{i + 1}", f"{_PREFIX}h.{i}"
        rows += norm(f"{ours}/norm1", f"{theirs}.ln_1")
        for k, name in enumerate(("query", "key", "value")):
            rows += kernel(
                f"{ours}/attention/{name}", f"{theirs}.attn.c_attn", shape=(width, *heads), part=(k, 3)
            )
        rows += kernel(f"{ours}/attention/out", f"{theirs}.attn.c_proj", shape=(*heads, width), inputs=2)
        rows += norm(f"{ours}/norm2", f"{theirs}.ln_2")
        rows += kernel(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc")
        rows += kernel(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj")
    rows += norm("norm", f"{_PREFIX}ln_f")
    if not tie_embeddings:
        rows.append(Row("params/head/kernel", _HEAD, "dense"))
    return tuple(rows)


def from_gpt2(model: "GPT", state_dict: Mapping[str, Any], *, is_linear: bool = False) -> dict[str, Any]:
    """Parameters from GPT-2's weights.

    Args:
        model: of the same sizes, with the vocabulary that the weights have.
        state_dict: of `GPT2LMHeadModel` or `GPT2Model`, or of nanoGPT (compiled or not), as arrays or
            tensors; also what `safetensors.numpy.load_file` reads. nanoGPT computes with the exact GELU:
            its model here has `use_tanh=False`, and `use_bias=False` where it was trained so.
        is_linear: as of `table`.

    Returns:
        `{"params": ...}`.

    Raises:
        ParityError: if weights are missing, have no place here, or another shape, with all of them.
        ConfigError: if the model has rotary positions, which GPT-2 hasn't.

    Example:
        >>> from jaxnets.models import gpt
        >>> from_gpt2(gpt(5, num_layers=0), {"wte.weight": 0})
        Traceback (most recent call last):
        ...
        jaxnets.errors.ParityError: these weights aren't those of the model: missing ...
    """
    weights = {
        name if name == _HEAD or name.startswith(_PREFIX) else _PREFIX + name: as_array(x)
        for name, x in ((name.removeprefix("_orig_mod."), x) for name, x in state_dict.items())
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # masks, not weights
    }
    also = ()
    if model.tie_embeddings and _HEAD in weights:
        head = weights.pop(_HEAD)
        if not np.array_equal(head, weights.get(f"{_PREFIX}wte.weight", head)):
            also = (f"{_HEAD} isn't the table of tokens, and the model ties them",)
    import jax
    import jax.numpy as jnp

    from jaxnets.interop.state_dict import from_state_dict

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return from_state_dict(_table_of(model, is_linear), weights, like, also=also)


def to_gpt2(model: "GPT", params: Any, *, is_linear: bool = False) -> dict[str, np.ndarray]:
    """GPT-2's weights from parameters; the inverse of `from_gpt2`.

    A tied head is among them, under its own name.
    """
    state_dict = to_torch(_table_of(model, is_linear), {"params": params})
    if model.tie_embeddings:
        state_dict[_HEAD] = state_dict[f"{_PREFIX}wte.weight"]
    return state_dict


def _table_of(model: "GPT", is_linear: bool) -> Table:
    if model.positions != "learned":
        raise errors.ConfigError(f"GPT-2 has learned positions, not {model.positions}")
    return table(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        width=model.width,
        use_bias=model.use_bias,
        tie_embeddings=model.tie_embeddings,
        is_linear=is_linear,
    )
