"""Weights of layers and models in and out of PyTorch's `state_dict` and of safetensors files.

The tables of `module_tables`, which are here as well, name PyTorch's own modules:
`torch.nn.MultiheadAttention`, `TransformerEncoder`, `TransformerDecoder`, `LSTM`, `GRU`, and BERT of the
library transformers. PyTorch's recurrent layers add two biases in each gate; here there is one, their
sum, but for the GRU's new gate, of which the second stands behind the reset gate. On the way out the
second bias is 0 where there is none.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import errors
from jaxnets.interop.module_tables import attention as attention
from jaxnets.interop.module_tables import bert as bert
from jaxnets.interop.module_tables import decoder as decoder
from jaxnets.interop.module_tables import embedding as embedding
from jaxnets.interop.module_tables import encoder as encoder
from jaxnets.interop.module_tables import layer_norm as layer_norm
from jaxnets.interop.module_tables import recurrent as recurrent
from jaxnets.interop.weights import Table, as_array, to_linen, to_torch
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


def to_state_dict(table: Table, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state_dict of arrays, for `module.load_state_dict` once they are tensors.

    Args:
        table: the rows of the model.
        variables: `{"params": ...}`, nested, of arrays.

    Raises:
        ParityError: as of `weights.to_torch`.
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
        DataError: if the file can't be read, or has an array of a dtype that NumPy and JAX don't.
    """
    library = _library()
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise errors.DataError(f"{path} can't be read: {error.strerror}") from error
    try:
        found = library.deserialize(content)
    except Exception as error:  # the library has errors of its own
        raise errors.DataError(f"{path} is no safetensors file: {errors.first_line(error)}") from error
    for name, x in found:
        if x["dtype"] not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise errors.DataError(f"{path}: {name} is of dtype {x['dtype']}; known are {known}")
    return {name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in found}


def _library():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise errors.ConfigError(
            "safetensors files need the library safetensors, which isn't installed: "
            "pip install 'jaxnets[text]'"
        ) from error
    return safetensors
