"""What a checkpoint costs: how long training waits for it, how long all of it takes, and for what.

    python -m benchmarks.checkpoint_cost [--out runs/checkpoint-cost]

The state is that of a ResNet-18 with momentum, about 90 MB of numbers that hardly compress. Each save is
waited for, with nothing beside it. Digests are made while the files are synced: their share of the save
is that of both together, and how long they take alone stands beside it.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets import errors
from jaxnets.allocator import keep_freed_memory
from jaxnets.config import read_words
from jaxnets.models.resnet import resnet18
from jaxnets.train import Checkpoints, TrainState, create_state, files, make_strategy, manifest

GOAL_MS = 50.0
GOAL_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """What a checkpoint costs, in milliseconds."""

    out: Path = Path("runs/checkpoint-cost")
    """Folder for checkpoint_cost.json; checkpoints are written beside it, and deleted."""
    rounds: int = 15
    """How often the state is saved, after a first time that isn't counted."""


def make_state() -> TrainState:
    """The state of a ResNet-18 with momentum that isn't zero."""
    net = resnet18(num_classes=10)

    def init_fn(key: jax.Array) -> tuple[Any, Any]:
        variables = dict(net.init(key, jnp.zeros((1, 32, 32, 3)), train=False))
        return variables.pop("params"), variables

    state = create_state(init_fn, optax.sgd(0.1, momentum=0.9), key=jax.random.key(0))
    leaves, treedef = jax.tree.flatten(state.opt_state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return dataclasses.replace(state, opt_state=jax.tree.unflatten(treedef, noise))


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of each save, and how many bytes it has."""
    state = make_strategy(num_devices=1).init(make_state)
    sealing: list[float] = []
    seal_files = manifest.seal_files

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = seal_files(*args)
        sealing.append(time.perf_counter() - start)
        return result

    manifest.seal_files = timed
    times: dict[str, list[float]] = {name: [] for name in ("blocked", "total", "sealing", "digests")}
    size = 0
    try:
        with Checkpoints(folder) as checkpoints:
            for step in range(rounds + 1):
                state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
                jax.block_until_ready(state)
                start = time.perf_counter()
                checkpoints.save(state)
                blocked = time.perf_counter() - start
                checkpoints.wait()
                total = time.perf_counter() - start
                paths = [p for p in (folder / f"{step:08d}").rglob("*") if p.is_file()]
                size = sum(path.stat().st_size for path in paths)
                start = time.perf_counter()
                for path in paths:
                    files.digest(path)
                alone = time.perf_counter() - start
                if step:
                    for name, value in zip(times, (blocked, total, sealing[-1], alone), strict=True):
                        times[name].append(round(1e3 * value, 2))
    finally:
        manifest.seal_files = seal_files
    return {"ms": times, "bytes": size}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = read_words(Options, argv, prog="python -m benchmarks.checkpoint_cost")
    if options.rounds < 1:
        raise errors.ConfigError("rounds is at least 1")
    keep_freed_memory()  # as the commands do
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.out) as name:
        record = measure(Path(name), options.rounds)
    medians = {name: statistics.median(values) for name, values in record["ms"].items()}
    share = medians["sealing"] / medians["total"]
    record |= {
        "median_ms": medians,
        "share_of_sealing": round(share, 4),
        "rounds": options.rounds,
        "cpu_count": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    files.write_atomically(options.out / "checkpoint_cost.json", json.dumps(record, indent=1) + "\n")
    spread = f"{min(record['ms']['blocked']):.0f} to {max(record['ms']['blocked']):.0f}"
    print(
        f"{record['bytes'] / 1e6:.0f} MB; medians of {options.rounds} saves\n"
        f"training waits     {medians['blocked']:7.1f} ms   ({spread}; goal {GOAL_MS:.0f})\n"
        f"all of it          {medians['total']:7.1f} ms\n"
        f"digests and syncs  {medians['sealing']:7.1f} ms   ({share:.1%}; goal {GOAL_SHARE:.0%})\n"
        f"digests alone      {medians['digests']:7.1f} ms"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except errors.UserError as error:
        sys.exit(f"error: {error}")
