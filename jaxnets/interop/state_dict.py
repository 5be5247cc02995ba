"""Weights of layers and models in and out of PyTorch's `state_dict` and of safetensors files.

The tables name PyTorch's own modules: `torch.nn.MultiheadAttention`, `TransformerEncoder`,
`TransformerDecoder`, `LSTM`, `GRU`, and BERT of the library transformers. PyTorch's recurrent layers add
two biases in each gate; here there is one, their sum, but for the GRU's new gate, of which the second
stands behind the reset gate. On the way out the second bias is 0 where there is none.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import errors
from jaxnets.interop.weights import Row, Table, as_array, dense, to_linen, to_torch
from jaxnets.train.files import write_atomically

# The library's own table for NumPy has no bfloat16.
_DTYPES = {"BF16": jnp.bfloat16, "BOOL": np.bool_, "C64": np.complex64} | {
    f"{letter}{8 * size}": np.dtype(f"{kind}{size}")
    for letter, kind, sizes in (
        ("F", "f", (2, 4, 8)),
        ("I", "i", (1, 2, 4, 8)),
        ("U", "u", (1, 2, 4, 8)),
    )
    for size in sizes
}
_SECOND_BIAS = re.compile(r"(|.*\.)bias_hh_(l\d+(?:_reverse)?)$")


def layer_norm(linen: str, torch: str) -> Table:
    """The rows of a layer normalisation."""
    return (
        Row(f"params/{linen}/scale", f"{torch}.weight"),
        Row(f"params/{linen}/bias", f"{torch}.bias"),
    )


def embedding(linen: str, torch: str) -> Table:
    """The row of a table of embeddings."""
    return (Row(f"params/{linen}/embedding", f"{torch}.weight"),)


def attention(linen: str, torch: str, *, width: int, num_heads: int) -> Table:
    """The rows of `layers.MultiHeadAttention`, or `SelfAttention`, and `torch.nn.MultiheadAttention`."""
    heads = (num_heads, width // num_heads)
    rows = []
    linen, torch = (f"{name}{sign}" if name else "" for name, sign in ((linen, "/"), (torch, ".")))
    for i, name in enumerate(("query", "key", "value")):
        path = f"params/{linen}{name}"
        rows += [
            Row(f"{path}/kernel", f"{torch}in_proj_weight", "dense", shape=(width, *heads), part=(i, 3)),
            Row(f"{path}/bias", f"{torch}in_proj_bias", part=(i, 3)),
        ]
    path = f"params/{linen}out"
    return (
        *rows,
        Row(f"{path}/kernel", f"{torch}out_proj.weight", "dense", shape=(*heads, width), inputs=2),
        Row(f"{path}/bias", f"{torch}out_proj.bias"),
    )


def encoder(
    linen: str, torch: str, *, num_layers: int, width: int, num_heads: int, use_final_norm: bool
) -> Table:
    """The rows of `Encoder` and `torch.nn.TransformerEncoder`; "" where they are all there is."""
    sizes = {"width": width, "num_heads": num_heads}
    linen, torch = (f"{name}{sign}" if name else "" for name, sign in ((linen, "/"), (torch, ".")))
    rows: list[Row] = []
    for i in range(num_layers):
        ours, theirs = f"{linen}layer{i + 1}", f"{torch}layers.{i}"
        rows += attention(f"{ours}/attention", f"{theirs}.self_attn", **sizes)
        rows += _mlp(ours, theirs)
        rows += layer_norm(f"{ours}/part1/norm", f"{theirs}.norm1")
        rows += layer_norm(f"{ours}/part2/norm", f"{theirs}.norm2")
    return (*rows, *(layer_norm(f"{linen}norm", f"{torch}norm") if use_final_norm else ()))


def decoder(
    linen: str, torch: str, *, num_layers: int, width: int, num_heads: int, use_final_norm: bool
) -> Table:
    """The rows of `Decoder` and `torch.nn.TransformerDecoder`."""
    sizes = {"width": width, "num_heads": num_heads}
    linen, torch = (f"{name}{sign}" if name else "" for name, sign in ((linen, "/"), (torch, ".")))
    rows: list[Row] = []
    for i in range(num_layers):
        ours, theirs = f"{linen}layer{i + 1}", f"{torch}layers.{i}"
        rows += attention(f"{ours}/attention", f"{theirs}.self_attn", **sizes)
        rows += attention(f"{ours}/cross_attention", f"{theirs}.multihead_attn", **sizes)
        rows += _mlp(ours, theirs)
        for k in (1, 2, 3):
            rows += layer_norm(f"{ours}/part{k}/norm", f"{theirs}.norm{k}")
    return (*rows, *(layer_norm(f"{linen}norm", f"{torch}norm") if use_final_norm else ()))


def _mlp(linen: str, torch: str) -> Table:
    up = dense(f"{linen}/mlp/up", f"{torch}.linear1")
    return (*up, *dense(f"{linen}/mlp/down", f"{torch}.linear2"))


def bert(*, num_layers: int, width: int, num_heads: int) -> Table:
    """The rows of `models.BERT` and `BertModel` of transformers, made with `add_pooling_layer=False`."""
    heads, rows = (num_heads, width // num_heads), []
    for ours, theirs in (("token", "word"), ("position", "position"), ("type", "token_type")):
        rows += embedding(f"{ours}_embedding", f"embeddings.{theirs}_embeddings")
    rows += layer_norm("norm", "embeddings.LayerNorm")
    for i in range(num_layers):
        ours, theirs = f"encoder/layer{i + 1}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            path, module = f"params/{ours}/attention/{name}", f"{theirs}.attention.self.{name}"
            rows.append(Row(f"{path}/kernel", f"{module}.weight", "dense", shape=(width, *heads)))
            rows.append(Row(f"{path}/bias", f"{module}.bias"))
        path, module = f"params/{ours}/attention/out", f"{theirs}.attention.output.dense"
        rows.append(Row(f"{path}/kernel", f"{module}.weight", "dense", shape=(*heads, width), inputs=2))
        rows.append(Row(f"{path}/bias", f"{module}.bias"))
        rows += layer_norm(f"{ours}/part1/norm", f"{theirs}.attention.output.LayerNorm")
        rows += dense(f"{ours}/mlp/up", f"{theirs}.intermediate.dense")
        rows += dense(f"{ours}/mlp/down", f"{theirs}.output.dense")
        rows += layer_norm(f"{ours}/part2/norm", f"{theirs}.output.LayerNorm")
    return tuple(rows)


def recurrent(
    linen: str, torch: str, *, kind: str, num_layers: int = 1, is_bidirectional: bool = False
) -> Table:
    """The rows of `layers.LSTM` and `torch.nn.LSTM`, or `GRU`; second biases are added by themselves.

    Args:
        linen: path of the layer; "" if it is all there is.
        torch: name of the module; "" if it is all there is.
        kind: "lstm" or "gru".
        num_layers: L.
        is_bidirectional: whether each has a second direction.
    """
    if kind not in ("lstm", "gru"):
        raise errors.unknown("recurrent layer", kind, ("lstm", "gru"))
    linen, torch = (f"{name}{sign}" if name else "" for name, sign in ((linen, "/"), (torch, ".")))
    rows = []
    for i in range(num_layers):
        for direction, ending in (("forward", ""), ("backward", "_reverse"))[: 1 + is_bidirectional]:
            path, end = f"params/{linen}{direction}{i + 1}", f"l{i}{ending}"
            rows += [
                Row(f"{path}/kernel", f"{torch}weight_ih_{end}", "dense"),
                Row(f"{path}/recurrent_kernel", f"{torch}weight_hh_{end}", "dense"),
                Row(f"{path}/bias", f"{torch}bias_ih_{end}"),
            ]
            if kind == "gru":
                rows.append(Row(f"{path}/recurrent_bias", f"{torch}bias_hh_{end}"))
    return tuple(rows)


def to_state_dict(table: Table, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state_dict of arrays, for `module.load_state_dict` once they are tensors.

    Args:
        table: the rows of the model.
        variables: `{"params": ...}`, nested, of arrays.

    Raises:
        ParityError: if an array has no row, or a row no array.
    """
    found = to_torch(table, variables)
    state_dict = {}
    for name, array in found.items():
        if not _SECOND_BIAS.match(name):
            state_dict[name] = array
        second = re.sub(r"(^|\.)bias_ih_(l\d+(?:_reverse)?)$", r"\1bias_hh_\2", name)
        if second != name:
            state_dict[second] = np.zeros_like(array)
            if second in found:  # the GRU's new gate
                state_dict[second][-len(found[second]) :] = found[second]
    return state_dict


def from_state_dict(
    table: Table,
    state_dict: Mapping[str, Any],
    like: Mapping[str, Any],
    *,
    also: Sequence[str] = (),
) -> dict[str, Any]:
    """Linen variables from a state_dict.

    Args:
        table: the rows of the model.
        state_dict: names to arrays or tensors.
        like: the model's variables, or their shapes.
        also: what else is known to be wrong, for the message.

    Returns:
        variables of the shapes of `like` and the dtypes of the state_dict.

    Raises:
        ParityError: in one message all that is missing, unexpected, or has another shape.
    """
    empty = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), dict(like))
    expected = {name: array.shape for name, array in to_state_dict(table, empty).items()}
    given = {name: as_array(array) for name, array in state_dict.items()}
    wrong = []
    if missing := [name for name in expected if name not in given]:
        wrong.append(f"missing {', '.join(missing)}")
    if unexpected := [name for name in given if name not in expected]:
        wrong.append(f"unexpected {', '.join(unexpected)}")
    wrong += [
        f"{name} is {given[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    wrong += also
    if wrong:
        raise errors.ParityError(f"these weights aren't those of the model: {'; '.join(wrong)}")
    named = {row.torch for row in table}
    folded = dict(given)
    for name in given:
        if not (match := _SECOND_BIAS.match(name)):
            continue
        second, first = folded.pop(name), f"{match[1]}bias_ih_{match[2]}"
        if name in named:  # a GRU
            size = len(second) // 3
            folded[name], second = (
                second[2 * size :],
                np.concatenate([second[: 2 * size], 0 * second[:size]]),
            )
        folded[first] = given[first] + second
    return to_linen(table, folded)


def save_safetensors(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a safetensors file, all of it or nothing.

    Raises:
        ConfigError: if the library safetensors isn't installed.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    write_atomically(Path(path), _library().numpy.save(arrays))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises:
        ConfigError: if the library safetensors isn't installed.
        DataError: if the file can't be read.
    """
    library = _library()
    try:
        found = library.deserialize(Path(path).read_bytes())
        return {
            name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in found
        }
    except Exception as error:  # the library has errors of its own
        raise errors.DataError(f"{path} is no safetensors file: {errors.first_line(error)}") from error


def _library():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise errors.ConfigError(
            "safetensors files need the library safetensors, which isn't installed: "
            "pip install 'jaxnets[text]'"
        ) from error
    return safetensors
