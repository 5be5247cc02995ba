"""The rows that name PyTorch's own modules beside the layers here; see `state_dict`.

Without JAX, as PyTorch's processes of a duel take them from here.
"""

from collections.abc import Mapping

from jaxnets import errors
from jaxnets.interop.weights import Row, Table, dense


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
    linen, torch = _prefixes(linen, torch)
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
    return _stack(linen, torch, {"attention": "self_attn"}, num_layers, use_final_norm, sizes)


def decoder(
    linen: str, torch: str, *, num_layers: int, width: int, num_heads: int, use_final_norm: bool
) -> Table:
    """The rows of `Decoder` and `torch.nn.TransformerDecoder`."""
    sizes = {"width": width, "num_heads": num_heads}
    attentions = {"attention": "self_attn", "cross_attention": "multihead_attn"}
    return _stack(linen, torch, attentions, num_layers, use_final_norm, sizes)


def _stack(
    linen: str,
    torch: str,
    attentions: Mapping[str, str],
    num_layers: int,
    use_final_norm: bool,
    sizes: Mapping[str, int],
) -> Table:
    linen, torch = _prefixes(linen, torch)
    rows: list[Row] = []
    for i in range(num_layers):
        ours, theirs = f"{linen}layer{i + 1}", f"{torch}layers.{i}"
        for name, of_torch in attentions.items():
            rows += attention(f"{ours}/{name}", f"{theirs}.{of_torch}", **sizes)
        rows += _mlp(ours, theirs)
        for k in range(1, len(attentions) + 2):
            rows += layer_norm(f"{ours}/part{k}/norm", f"{theirs}.norm{k}")
    return (*rows, *(layer_norm(f"{linen}norm", f"{torch}norm") if use_final_norm else ()))


def _prefixes(linen: str, torch: str) -> tuple[str, str]:
    """What stands before the names of parts."""
    return linen and f"{linen}/", torch and f"{torch}."


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
    linen, torch = _prefixes(linen, torch)
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
