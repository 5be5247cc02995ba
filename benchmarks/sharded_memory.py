"""What a transformer of 100 million parameters takes of each device, and that its loss stays the same.

    python -m benchmarks.sharded_memory [--num-devices 8] [--out runs/sharded-memory]

On a CPU devices are forced, which says nothing about speed; what lies on each and what is computed is as
on real ones. Each strategy runs in a process of its own, with the same weights, tokens and optimizer.
The goal: parameters and moments of a device at 1/N of the whole within 5 %, the loss as on one device.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxnets import errors
from jaxnets.config import read_words
from jaxnets.version import __version__

WITHIN = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
    """Memory of each device and the loss under fsdp and tensor, beside one device."""

    num_devices: int = 8
    """Devices that the model is cut over."""
    strategies: tuple[str, ...] = ("jit", "fsdp", "tensor")
    """Which to run; jit is one device with all of it, that the others are compared with."""
    batch_size: int = 8
    """Sequences in a batch; the devices divide it."""
    length: int = 64
    """Tokens in a sequence."""
    steps: int = 3
    """Training steps."""
    out: Path = Path("runs/sharded-memory")
    """Folder for sharded_memory.json."""


def measure(strategy_name: str, options: Options) -> dict[str, Any]:
    """Train for a few steps; losses, and bytes on each device."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxnets import losses, models, train
    from jaxnets.models import gpt

    model = models.gpt_100m(max_length=options.length)
    tokens = jax.ShapeDtypeStruct((1, options.length), jnp.int32)
    init_fn, apply_fn = models.functional(model, tokens)

    def loss_fn(params, model_state, batch, *, key):
        rows = batch["index"]
        logits_BTV, model_state = apply_fn(
            params, model_state, batch["token"], train=True, key=key, rows=rows
        )
        loss_BT = losses.softmax_cross_entropy(logits_BTV[:, :-1], batch["token"][:, 1:])
        return {"loss": loss_BT}, model_state, {}

    is_one = strategy_name == "jit"
    strategy = train.make_strategy(
        strategy_name,
        num_devices=1 if is_one else options.num_devices,
        rules=None if is_one else gpt.sharding_rules(),
    )
    tx = optax.adam(3e-4)
    state = strategy.init(lambda: train.create_state(init_fn, tx, key=jax.random.key(0)))
    bytes_on = {
        name: [
            sum(
                shard.data.nbytes
                for x in jax.tree.leaves(tree)
                for shard in x.addressable_shards
                if shard.device == device
            )
            for device in strategy.mesh.devices.flat
        ]
        for name, tree in (("params", state.params), ("opt_state", state.opt_state))
    }
    step = strategy.compile_step(partial(train.make_train_step, loss_fn, tx))
    rng = np.random.default_rng(0)
    seen = []
    for i in range(options.steps):
        shape = options.batch_size, options.length
        batch = {
            "token": rng.integers(0, model.vocabulary_size, shape, dtype=np.int32),
            "index": np.arange(options.batch_size, dtype=np.int32) + i * options.batch_size,
            "mask": np.ones(options.batch_size, bool),
        }
        state, values = step(state, batch)
        seen.append([float(values["loss"]), float(values["grad_norm"])])
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    return {"num_params": num_params, "bytes": bytes_on, "loss_and_norm": seen}


def run(options: Options) -> dict[str, Any]:
    """All strategies, each in a process of its own."""
    found = {}
    for name in options.strategies:
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={options.num_devices} "
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        }
        words = [sys.executable, "-m", "benchmarks.sharded_memory", "--out", os.devnull, "--num-devices",
                 str(options.num_devices), "--batch-size", str(options.batch_size), "--length",
                 str(options.length), "--steps", str(options.steps), "--strategies", name]  # fmt: skip
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise errors.ConfigError(f"the strategy {name} ended with {done.returncode}; see above")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(found: dict[str, Any], num_devices: int) -> tuple[list[str], bool]:
    """A table, and whether the goal is reached."""
    one = found["jit"]
    whole = {name: each[0] for name, each in one["bytes"].items()}
    lines, is_good = [f"{one['num_params']:,} parameters, {num_devices} devices"], True
    for name, each in found.items():
        shares = {part: max(each["bytes"][part]) / whole[part] for part in whole}
        losses = [f"{loss:.6f}" for loss, _ in each["loss_and_norm"]]
        differences = [
            abs(a - b) / abs(b)
            for pair, of_one in zip(each["loss_and_norm"], one["loss_and_norm"], strict=True)
            for a, b in zip(pair, of_one, strict=True)
        ]
        text = ", ".join(
            f"{part} {share * num_devices:.4f}/{num_devices}" for part, share in shares.items()
        )
        lines.append(f"{name:7}{text}; losses {' '.join(losses)}; at most {max(differences):.1e} off")
        if name != "jit":
            is_good &= all(abs(share * num_devices - 1) <= WITHIN for share in shares.values())
            is_good &= max(differences) < 1e-4
    return lines, is_good


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 if the goal is missed."""
    try:
        options = read_words(Options, sys.argv[1:] if argv is None else argv, prog="sharded_memory")
        if str(options.out) == os.devnull:  # a process of its own, for one strategy
            print(json.dumps(measure(options.strategies[0], options)))
            return 0
        if "jit" not in options.strategies:
            raise errors.ConfigError("jit is what the others are compared with: name it too")
        found = run(options)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines, is_good = judge(found, options.num_devices)
    print("\n".join([*lines, "reached" if is_good else "missed"]))
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"jaxnets": __version__, "num_devices": options.num_devices, "found": found}
    (options.out / "sharded_memory.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
