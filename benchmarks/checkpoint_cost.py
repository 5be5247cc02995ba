"""What saving costs a run: how long it blocks the loop, its digests, and what it slows the steps by.

    python -m benchmarks.checkpoint_cost [--num-processes 2] [--out runs/checkpoint-cost]

ResNet-18 with momentum on generated images. Steps run in groups, with a save at the beginning of every
other one; what a save costs is the difference of the two kinds' medians, so the work that it does behind
is in it. What digests add is measured in the same way, by saves with and without. The goals: the loop is
blocked for less than 50 ms, digests take less than 10 % of a save, and a run that saves every 100 steps
pays less than 1 %.

Several processes of this machine stand in for hosts. They share its cores, disk and memory, and what
they say to one another before, in and after a save is in the figures, which are those of the first.
"""

import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxnets import errors
from jaxnets.config import read_words
from jaxnets.launch import launch
from jaxnets.version import __version__

BLOCKED_MS, DIGEST_SHARE, COST_SHARE, EVERY = 50.0, 0.10, 0.01, 100


@dataclasses.dataclass(frozen=True)
class Options:
    """What a checkpoint of ResNet-18 costs."""

    batch_size: int = 128
    """Images in a step."""
    rounds: int = 7
    """Groups of steps with a save, and as many without."""
    group: int = 3
    """Steps in a group; a save should be done within one."""
    saves: int = 15
    """Saves that are timed alone, and as many without digests."""
    out: Path = Path("runs/checkpoint-cost")
    """Folder for checkpoint_cost.json, or with several processes checkpoint_cost_N.json."""
    num_processes: int = 1
    """Processes with one device each, which cut the batch among them."""
    coordinator: str | None = None
    """HOST:PORT of the first; given by the command that starts the others, as is the next."""
    process_id: int | None = None
    """Which this is, from 0."""


def measure(options: Options) -> dict[str, Any]:
    """Medians, in seconds."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxnets import losses, models, ops, registry, train
    from jaxnets.allocator import keep_freed_memory
    from jaxnets.train import hosts, optim

    shape = options.batch_size, 32, 32, 3
    model = registry.get("model", "resnet18")(num_classes=10)
    init_fn, apply_fn = models.functional(model, jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32))

    def loss_fn(params, model_state, batch, *, key):
        images = ops.normalize_images(batch["image"])
        logits, model_state = apply_fn(params, model_state, images, train=True, key=key)
        return {"loss": losses.softmax_cross_entropy(logits, batch["label"])}, model_state, {}

    tx = optim.sgd(0.01, momentum=0.9)
    strategy = train.make_strategy("jit", num_devices=options.num_processes)
    state = strategy.init(lambda: train.create_state(init_fn, tx, key=jax.random.key(0)))
    step = strategy.compile_step(partial(train.make_train_step, loss_fn, tx))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "label": rng.integers(0, 10, options.batch_size, dtype=np.int32),
        "mask": np.ones(options.batch_size, bool),
    }

    def steps(state: Any, count: int) -> tuple[Any, float]:
        start = time.perf_counter()
        for _ in range(count):
            state, values = step(state, batch)
            values["loss"].block_until_ready()
        return state, time.perf_counter() - start

    keep_freed_memory()  # as the commands do
    state, _ = steps(state, 2)  # compiles
    with tempfile.TemporaryDirectory() as own:
        folder = Path(hosts.broadcast("benchmark/folder", own), "c")
        found = _time(options, state, steps, train.Checkpoints(folder))
        hosts.barrier("benchmark/end")  # before the folder goes
    return found


def _time(options: Options, state: Any, steps: Callable[..., Any], checkpoints: Any) -> dict[str, Any]:
    """Save, and take steps, by turns; medians in seconds."""
    from jaxnets.train import files

    blocked, total, kinds, digest = [], ([], []), {"with": [], "without": []}, files.digest
    with checkpoints:
        checkpoints.save(state)  # imports Orbax
        checkpoints.wait()
        for i in range(2 * options.saves):
            state, _ = steps(state, 1)
            files.digest = digest if i % 2 else lambda path, **_: "0" * 64
            start = time.perf_counter()
            checkpoints.save(state)
            blocked.append(time.perf_counter() - start)
            checkpoints.wait()
            total[i % 2].append(time.perf_counter() - start)
        files.digest = digest
        newest = checkpoints.folder / f"{checkpoints.latest():08d}"
        size = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
        for i in range(2 * options.rounds):
            kind = "with" if i % 2 else "without"
            start = time.perf_counter()
            if kind == "with":
                checkpoints.save(state)
            state, _ = steps(state, options.group)
            kinds[kind].append(time.perf_counter() - start)
            checkpoints.wait()
    without, with_save = (statistics.median(kinds[kind]) for kind in ("without", "with"))
    step_s = without / options.group
    found = {
        "size_bytes": size,
        "blocked_s": statistics.median(blocked),
        "save_s": statistics.median(total[1]),
        "digest_s": statistics.median(total[1]) - statistics.median(total[0]),
        "step_s": step_s,
        "cost_s": with_save - without,
        "groups": kinds,
    }
    return found | {
        "digest_share": found["digest_s"] / found["save_s"],
        "cost_share": found["cost_s"] / (EVERY * step_s),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a goal is missed."""
    try:
        options = read_words(
            Options, sys.argv[1:] if argv is None else argv, prog="python -m benchmarks.checkpoint_cost"
        )
        for name in ("batch_size", "rounds", "group", "saves", "num_processes"):
            if getattr(options, name) < 1:
                raise errors.ConfigError(f"{name} is {getattr(options, name)}; it must be at least 1")
        if options.batch_size % options.num_processes:
            raise errors.ConfigError(
                f"{options.num_processes} processes can't share a batch of {options.batch_size} evenly"
            )
        if options.num_processes > 1 and options.coordinator is None:
            return launch(_command(options), options.num_processes, devices_per_process=1)
        if options.num_processes > 1:
            from jaxnets.train import hosts

            hosts.join(options.coordinator, options.num_processes, options.process_id)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = measure(options)
    return report(options, found) if not options.process_id else 0


def _command(options: Options) -> list[str]:
    names = ("batch_size", "rounds", "group", "saves", "out")
    words = [(f"--{name.replace('_', '-')}", str(getattr(options, name))) for name in names]
    return [
        sys.executable,
        "-m",
        "benchmarks.checkpoint_cost",
        *(word for pair in words for word in pair),
    ]


def report(options: Options, found: dict[str, Any]) -> int:
    """Print and write what was found; 1 if a goal is missed."""
    goals = [
        ("the loop is blocked for", f"{1000 * found['blocked_s']:.0f} ms", f"{BLOCKED_MS:.0f} ms",
         1000 * found["blocked_s"] < BLOCKED_MS),
        ("digests add, of a save", f"{found['digest_share']:.1%}", f"{DIGEST_SHARE:.0%}",
         found["digest_share"] < DIGEST_SHARE),
        (f"a save every {EVERY} steps costs", f"{found['cost_share']:.2%}", f"{COST_SHARE:.0%}",
         found["cost_share"] < COST_SHARE),
    ]  # fmt: skip
    print(
        f"ResNet-18, batch {options.batch_size}, processes: {options.num_processes}; "
        f"a step takes {found['step_s']:.2f} s, a save of "
        f"{found['size_bytes'] / 1e6:.0f} MB {found['save_s']:.2f} s"
    )
    for what, value, goal, is_reached in goals:
        print(f"{what} {value} (goal: under {goal}, {'reached' if is_reached else 'missed'})")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "jaxnets": __version__,
        "machine": platform.processor() or platform.machine(),
        "num_processes": options.num_processes,
        **found,
    }
    name = "checkpoint_cost" + (f"_{options.num_processes}" if options.num_processes > 1 else "")
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(is_reached for *_, is_reached in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
