"""The layers of a model with what each costs; nothing is compiled or computed.

Flax's own table is not used: it takes FLOPs from XLA's cost analysis, which counts the program that the
compiler made, layer by layer out of their context.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxnets.ops.forms import plain
from jaxnets.train.flops import products


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of one layer. What belongs to a layer inside it is that layer's alone.

    Attributes:
        path: its name within the model, such as "block1/conv2"; "" is the model itself.
        kind: the name of its class.
        output_shape: of its output's first array.
        output_bytes: memory of its output.
        num_params: numbers that are learnt; 0 if it was called before.
        params_bytes: their memory.
        flops: of the forward pass, for the whole batch: two for each multiply-add in matrix products
            and convolutions; what is elementwise isn't counted.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...]
    output_bytes: int
    num_params: int
    params_bytes: int
    flops: int


def layer_table(
    model: nn.Module, input_shape: Sequence[int], *, dtype: Any = jnp.float32
) -> list[Layer]:
    """The layers in the order in which they are called; one that only holds others is left out.

    Args:
        model: called as `model(x, train=False)`.
        input_shape: of its input, the batch first.
        dtype: of its input.

    Returns:
        the layers.

    Raises:
        ValueError: if the model can't take such an input.

    Example:
        >>> from jaxnets import models
        >>> [row.num_params for row in layer_table(models.mlp(hidden=(8,)), (1, 4, 4, 1))]
        [136, 0, 90]
    """
    x = jax.ShapeDtypeStruct(tuple(input_shape), dtype)
    calls: list[tuple[tuple[str, ...], str, Any]] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        number = len(calls)
        calls.append((context.module.path, type(context.module).__name__, None))
        with jax.named_scope(f"call[{number}]"):
            output = call(*args, **kwargs)
        calls[number] = (*calls[number][:2], jax.eval_shape(lambda: output))
        return output

    def forward(variables: Any, x: Any) -> Any:
        with nn.intercept_methods(record):
            return model.apply(variables, x, train=False)

    with plain():
        variables = jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), train=False)
        )
        jaxpr = jax.make_jaxpr(forward)(variables, x)
    flops: collections.Counter[int] = collections.Counter()
    for scope, number in products(jaxpr.jaxpr):
        flops[int(re.findall(r"call\[(\d+)\]", scope)[-1])] += number  # the innermost
    rows, seen = [], set()
    for number, (path, kind, output) in enumerate(calls):
        params = [] if path in seen else _own_params(variables.get("params", {}), path)
        holds_others = any(other != path and other[: len(path)] == path for other, _, _ in calls)
        seen.add(path)
        if holds_others and not params and not flops[number]:
            continue
        outputs = jax.tree.leaves(output)
        rows.append(
            Layer(
                path="/".join(path),
                kind=kind,
                output_shape=outputs[0].shape,
                output_bytes=sum(_bytes(leaf) for leaf in outputs),
                num_params=sum(math.prod(leaf.shape) for leaf in params),
                params_bytes=sum(_bytes(leaf) for leaf in params),
                flops=flops[number],
            )
        )
    return rows


def format_table(rows: Sequence[Layer]) -> str:
    """The table and its totals as text."""
    header = ("layer", "kind", "output", "parameters", "FLOPs", "output memory", "parameter memory")
    cells = [
        (
            row.path or "(the model)",
            row.kind,
            " x ".join(map(str, row.output_shape)),
            f"{row.num_params:,}",
            f"{row.flops:,}",
            _size(row.output_bytes),
            _size(row.params_bytes),
        )
        for row in rows
    ]
    total = (
        "total",
        "",
        "",
        f"{sum(row.num_params for row in rows):,}",
        f"{sum(row.flops for row in rows):,}",
        _size(sum(row.output_bytes for row in rows)),
        _size(sum(row.params_bytes for row in rows)),
    )
    lines = [header, *cells, total]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def _own_params(params: Any, path: Sequence[str]) -> list[Any]:
    """The arrays of the module at a path, without those of modules in it."""
    for name in path:
        params = params.get(name, {})
    return [leaf for leaf in params.values() if not isinstance(leaf, dict)]


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _size(size_bytes: int) -> str:
    """A size for people: 1,536 is 1.5 KiB."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size, units = size_bytes / 1024, iter(("KiB", "MiB", "GiB"))
    unit = next(units)
    while size >= 1024 and unit != "GiB":
        size, unit = size / 1024, next(units)
    return f"{size:.1f} {unit}"
