"""The model alone out of a checkpoint: what inference needs, without the optimizer, recipe or data."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxnets import errors
from jaxnets.train import array_store, manifest
from jaxnets.train.checkpoint import STATE, Checkpoints
from jaxnets.typing import Params, PyTree


def read_model(checkpoints: Checkpoints, step: int) -> tuple[Params, PyTree]:
    """The parameters of a step, their average where the run keeps one, and the model's own state.

    Args:
        checkpoints: of a run, which may still go on.
        step: one of `checkpoints.steps()`.

    Returns:
        params and model_state, nested dicts of arrays on the first device.

    Raises:
        DamagedError: if a file isn't what was written.
        CheckpointError: if there is no such step, or it can't be read.
    """
    checkpoints.check_files(step)
    arrays = checkpoints.manifest(step).arrays
    params = "ema" if any(name.startswith("ema/") for name in arrays) else "params"
    wanted = {part: _tree(arrays, part) for part in (params, "model_state")}
    folder = checkpoints.path(step)
    try:
        loaded = array_store.load(folder / STATE, wanted, is_part=True)
    except Exception as error:
        manifest.check_is_there(folder, step)
        why = errors.first_line(error)
        raise errors.CheckpointError(f"the checkpoint in {folder} can't be read: {why}") from error
    return loaded[params], loaded["model_state"]


def _tree(arrays: Mapping[str, str], part: str) -> dict[str, Any]:
    """Shapes and dtypes by nested names, from a manifest's "dtype[shape]" by path."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree: dict[str, Any] = {}
    for path, text in arrays.items():
        first, *names = path.split("/")
        if first != part:
            continue
        found = re.fullmatch(r"(\w+)\[([\d, ]*)\]", text)
        assert found, text
        shape = tuple(int(size) for size in found[2].split(",") if size.strip())
        inner = tree
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        dtype = jax.numpy.dtype(found[1])
        inner[names[-1]] = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=place)
    return tree
