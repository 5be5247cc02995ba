"""A check at the start that all processes of a run have the same code, config and data."""

import hashlib
import platform
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxnets.config import RunOptions, to_json
from jaxnets.evaluation import row_of
from jaxnets.recipe import Recipe, count_examples
from jaxnets.train import hosts

_LONG_S = 3600.0
# May differ from host to host: where things lie, and which process this is.
_OF_A_HOST = ("run_dir", "data_dir", "program_cache", "process_id", "plugin", "coordinator", "threads")


def check_start(config: Mapping[str, Any], options: RunOptions, make_recipe: Callable[..., Any]) -> None:
    """Compare this process with the others, before anything is read; with one nothing is done.

    Args:
        config: the experiment's, as JSON holds it.
        options: of this process.
        make_recipe: of the experiment, whose file is compared beside those of this package.

    Raises:
        ConfigError: on every process, naming what differs.
    """
    if hosts.count() == 1:
        return
    here = {name: value for name, value in to_json(options).items() if name not in _OF_A_HOST}
    hosts.agree("config", dict(config))
    hosts.agree("options", here)
    hosts.agree("code", _code(make_recipe, options))


def check_data(recipe: Recipe, max_unreadable: int = 0) -> None:
    """Compare the data, by a checksum of arrays and by a few examples of a source.

    Args:
        recipe: whose data.
        max_unreadable: how many training examples may be left out.

    Raises:
        ConfigError: on every process, naming what differs.
    """
    if hosts.count() == 1:
        return
    found = {"train": _data(recipe.train, max_unreadable), "test": _data(recipe.test)}
    hosts.agree("data", found, timeout_s=_LONG_S)


def data_of(recipe: Recipe) -> dict[str, str]:
    """What a run's data is known by when it is gone on with: sizes, and checksums of arrays.

    Returns:
        of "train" and "test".
    """
    parts = {"train": recipe.train, "test": recipe.test}
    return {
        name: _data(data) if isinstance(data, Mapping) else f"{count_examples(data)} examples"
        for name, data in parts.items()
    }


def _code(make_recipe: Callable[..., Any], options: RunOptions) -> dict[str, str]:
    """Versions, and digests of every source file that is ours or the user's."""
    package = Path(__file__).parent
    files = {f"jaxnets/{path.relative_to(package)}": path for path in sorted(package.rglob("*.py"))}
    if code := getattr(make_recipe, "__code__", None):
        files["the experiment"] = Path(code.co_filename)
    files |= {f"plugin {path.name}": path for path in options.plugin}
    versions = {
        name: getattr(sys.modules.get(name), "__version__", "absent")
        for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    versions["python"] = platform.python_version()
    versions["devices"] = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    return versions | {name: _digest(path) for name, path in files.items()}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:  # of a program that was typed in
        return "unknown"


def _data(data: Any, max_unreadable: int = 0) -> str:
    size = count_examples(data)
    if isinstance(data, Mapping):
        return f"{size} examples, {_checksum(data)}"
    shown = sorted({0, size // 2, size - 1})
    sums = [_checksum(row_of(data, i, max_unreadable)) for i in shown]
    return f"{size} examples, {', '.join(sums)}"


def _checksum(arrays: Mapping[str, Any]) -> str:
    total = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8).data if array.size else b"", total)
    return f"{total:08x}"
