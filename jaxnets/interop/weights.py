"""Weight maps between Linen and PyTorch, as ordered tables that are read in both directions.

A table lists every array of a model, in the order of its computation:

    TABLE = (
        *conv("conv1"),
        *batch_norm("norm1"),
        *dense("dense1", flattened=(4, 4, 128)),
        *dense("head"),
    )

Every array on either side must have exactly one row, so nothing is left at its initial value.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxnets import errors

LAYOUTS = ("same", "conv", "dense", "counter")


@dataclasses.dataclass(frozen=True)
class Row:
    """One array on both sides.

    Attributes:
        linen: its path in the variables, such as "params/conv1/kernel"; "" for a counter.
        torch: its name in the state_dict, such as "conv1.weight".
        layout: "same"; "conv" for HWIO against OIHW; "dense" for `[in, out]` against `[out, in]`;
            "counter" for a number that only PyTorch keeps, 0 at the start.
        flattened: for a dense layer after a flattened image, that image's (H, W, C): Linen's inputs
            come in the order of NHWC, PyTorch's in that of NCHW.
        shape: in Linen, where the array has more axes there than in PyTorch, such as (D, N, K) of the
            queries of several heads; () otherwise.
        inputs: how many of the first axes of that shape are those of the input.
        part: (i, n) of the i-th of n arrays in Linen that PyTorch has as one, one after another along
            the outputs, such as queries, keys and values.
    """

    linen: str
    torch: str
    layout: str = "same"
    flattened: tuple[int, int, int] | None = None
    shape: tuple[int, ...] = ()
    inputs: int = 1
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise errors.unknown("layout", self.layout, LAYOUTS)

    @property
    def module(self) -> tuple[str, str]:
        """The layer that the array belongs to: its path in Linen and its name in PyTorch."""
        if self.part[1] > 1:
            return "", self.torch.rpartition(".")[0]  # its output is that of several
        parts = self.linen.split("/")[1:-1]
        return "/".join(parts), self.torch.rpartition(".")[0]

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The array as PyTorch has it.

        Raises:
            ValueError: if its shape isn't that of the row's layout.
        """
        if self.shape:
            if array.shape != self.shape:
                raise ValueError(f"{self.linen} is {array.shape}; this table is for {self.shape}")
            array = array.reshape(math.prod(self.shape[: self.inputs]), -1)
        if self.layout == "conv":
            self._check(array, 4)
            return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        if self.layout == "dense":
            self._check(array, 2)
            if self.flattened:
                self._check_inputs(array.shape[0])
                array = array.reshape(*self.flattened, -1).transpose(2, 0, 1, 3)
                array = array.reshape(-1, array.shape[-1])
            return np.ascontiguousarray(array.T)
        return array

    def to_linen(self, array: np.ndarray) -> np.ndarray:
        """The array as Linen has it; the inverse of `to_torch`, and of several parts its own.

        Raises:
            ValueError: if its shape isn't that of the row's layout.
        """
        i, count = self.part
        if count > 1:
            if array.shape[self.outputs_axis] % count:
                raise ValueError(f"{self.torch} is {array.shape}, not {count} equal parts")
            array = np.split(array, count, axis=self.outputs_axis)[i]
        array = self._without_axes(array)
        if self.shape and array.size != math.prod(self.shape):
            raise ValueError(f"{self.torch} has {array.size:,} numbers; {self.linen} is {self.shape}")
        return array.reshape(self.shape) if self.shape else array

    @property
    def outputs_axis(self) -> int:
        """The axis of PyTorch's array along which its outputs lie."""
        return 0 if self.layout in ("dense", "conv") else -1

    def _without_axes(self, array: np.ndarray) -> np.ndarray:
        if self.layout == "conv":
            self._check(array, 4)
            return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
        if self.layout == "dense":
            self._check(array, 2)
            array = array.T
            if self.flattened:
                self._check_inputs(array.shape[0])
                height, width, channels = self.flattened
                array = array.reshape(channels, height, width, -1).transpose(1, 2, 0, 3)
                array = array.reshape(-1, array.shape[-1])
            return np.ascontiguousarray(array)
        return array

    def _check(self, array: np.ndarray, rank: int) -> None:
        if array.ndim != rank:
            raise ValueError(
                f"{self.linen} = {self.torch}: a {self.layout} weight has rank {rank}, "
                f"not the shape {array.shape}"
            )

    def _check_inputs(self, size: int) -> None:
        if self.flattened and size != math.prod(self.flattened):
            raise ValueError(
                f"{self.linen} = {self.torch}: has {size} inputs; an image of {self.flattened} "
                f"flattened has {math.prod(self.flattened)}"
            )


Table = Sequence[Row]


def conv(linen: str, torch: str = "", *, use_bias: bool = True) -> tuple[Row, ...]:
    """The rows of a convolution; PyTorch's name is Linen's path with dots by default."""
    torch = torch or linen.replace("/", ".")
    kernel = Row(f"params/{linen}/kernel", f"{torch}.weight", "conv")
    return (kernel, Row(f"params/{linen}/bias", f"{torch}.bias")) if use_bias else (kernel,)


def dense(
    linen: str,
    torch: str = "",
    *,
    use_bias: bool = True,
    flattened: tuple[int, int, int] | None = None,
) -> tuple[Row, ...]:
    """The rows of a dense layer; `flattened` is the (H, W, C) of the image that it takes flat."""
    torch = torch or linen.replace("/", ".")
    kernel = Row(f"params/{linen}/kernel", f"{torch}.weight", "dense", flattened)
    return (kernel, Row(f"params/{linen}/bias", f"{torch}.bias")) if use_bias else (kernel,)


def batch_norm(linen: str, torch: str = "", *, use_scale: bool = True) -> tuple[Row, ...]:
    """The rows of a batch normalisation, running statistics included."""
    torch = torch or linen.replace("/", ".")
    scale = (Row(f"params/{linen}/scale", f"{torch}.weight"),) if use_scale else ()
    return (
        *scale,
        Row(f"params/{linen}/bias", f"{torch}.bias"),
        Row(f"batch_stats/{linen}/mean", f"{torch}.running_mean"),
        Row(f"batch_stats/{linen}/var", f"{torch}.running_var"),
        Row("", f"{torch}.num_batches_tracked", "counter"),
    )


def only_params(table: Table) -> tuple[Row, ...]:
    """The rows of what the optimizer changes; gradients have these and no others."""
    return tuple(row for row in table if row.linen.startswith("params/"))


def to_torch(table: Table, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state_dict from Linen variables.

    Args:
        table: the rows of the model.
        variables: `{"params": ..., "batch_stats": ...}`, nested, of arrays.

    Returns:
        names to arrays, in the order of the table.

    Raises:
        ParityError: if an array has no row, a row has no array, a name comes twice, or arrays have
            other shapes than their rows; it names all of them.

    Example:
        >>> variables = {"params": {"head": {"kernel": np.zeros((3, 2)), "bias": np.ones(2)}}}
        >>> {name: x.shape for name, x in to_torch(dense("head"), variables).items()}
        {'head.weight': (2, 3), 'head.bias': (2,)}
    """
    arrays = flatten(variables)
    linen = [row.linen for row in table if row.linen]
    _check_names("Linen", linen, arrays)
    by_torch = _by_torch(table)
    given = ((row, np.asarray(arrays[row.linen])) for row in table if row.linen)
    changed, state_dict = _each("to_torch", given), {}
    for name, rows in by_torch.items():
        parts = [changed[row.linen] for row in rows if row.linen]
        if len(rows) == 1:
            state_dict[name] = parts[0] if parts else np.zeros((), np.int64)
        else:
            state_dict[name] = np.concatenate(parts, axis=rows[0].outputs_axis)
    return state_dict


def to_linen(table: Table, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Linen variables from a state_dict; the inverse of `to_torch`, counters left out.

    Args:
        table: the rows of the model.
        state_dict: names to arrays or tensors.

    Returns:
        `{"params": ..., "batch_stats": ...}`, nested.

    Raises:
        ParityError: if an array has no row, a row has no array, a path comes twice, or arrays have
            other shapes than their rows; it names all of them.
    """
    _check_names("PyTorch", list(_by_torch(table)), state_dict)
    _check_unique("Linen", [row.linen for row in table if row.linen])
    variables: dict[str, Any] = {}
    given = ((row, as_array(state_dict[row.torch])) for row in table if row.linen)
    for path, array in _each("to_linen", given).items():
        *folders, name = path.split("/")
        place = variables
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return variables


def _each(
    change: Literal["to_torch", "to_linen"], given: Iterable[tuple[Row, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What each array becomes, by its path in Linen; all that can't in one message."""
    changed, wrong = {}, []
    for row, array in given:
        try:
            changed[row.linen] = getattr(row, change)(array)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise errors.ParityError(f"weights: {'; '.join(dict.fromkeys(wrong))}")
    return changed


def as_array(x: Any) -> np.ndarray:
    """An array, or a copy of a tensor of PyTorch, as an array of the same dtype, bfloat16 too."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    if str(x.dtype) != "torch.bfloat16":
        return x.numpy().copy()  # which a step of the module doesn't change
    import ml_dtypes  # JAX brings it

    return x.float().numpy().astype(ml_dtypes.bfloat16)


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of arrays as one, with paths such as "params/conv1/kernel"."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}/")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(variables, ""))


def _check_names(side: str, rows: Sequence[str], arrays: Iterable[str]) -> None:
    _check_unique(side, rows)
    missing = sorted(set(rows) - set(arrays))
    unused = sorted(set(arrays) - set(rows))
    wrong = []
    if missing:
        wrong.append(f"{side} has no {', '.join(missing)}, which the table names")
    if unused:
        wrong.append(f"the table has no row for {', '.join(unused)} of {side}")
    if wrong:
        raise errors.ParityError(f"weights: {'; '.join(wrong)}")


def _by_torch(table: Table) -> dict[str, list[Row]]:
    """The rows of each of PyTorch's arrays, its parts in order."""
    found: dict[str, list[Row]] = {}
    for row in table:
        found.setdefault(row.torch, []).append(row)
    for name, rows in found.items():
        rows.sort(key=lambda row: row.part)
        count = rows[0].part[1]
        if [row.part for row in rows] != [(i, count) for i in range(count)]:
            # One part twice, or one that is missing.
            is_twice = len({row.part for row in rows}) < len(rows) or count == 1
            what = "twice" if is_twice else f"for {len(rows)} of {count} parts"
            raise errors.ParityError(f"weights: the table names {name} of PyTorch {what}")
    return found


def _check_unique(side: str, rows: Sequence[str]) -> None:
    twice = sorted({name for name in rows if list(rows).count(name) > 1})
    if twice:
        raise errors.ParityError(f"weights: the table names {', '.join(twice)} of {side} twice")
