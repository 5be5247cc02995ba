"""The benchmark suite: every reference workload in JAX and in PyTorch, proved equal and then timed.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --only lenet-128 --seconds 20
    python -m benchmarks.throughput --device gpu --dtype bfloat16 --out runs/gpu

Each workload is a duel (`jaxnets.interop.duel`) on generated data. The folder gets a record of each as
JSON, `table.md` and `throughput.png`, anew after every workload; a workload that fails, by its parity or
otherwise, is a record too, with its reason, and the exit status is 1.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks import throughput_report
from benchmarks.workloads import WORKLOADS, Workload
from jaxnets import errors, registry
from jaxnets.config import RunOptions, read_words
from jaxnets.interop.reference import require_torch
from jaxnets.train.files import write_atomically
from jaxnets.train.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compare the throughput of jaxnets and PyTorch."""

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A workload; may be repeated. All of them by default."""
    out: Path = Path("runs/throughput")
    """The folder of the records."""
    seconds: float = 60.0
    """About how long each workload is measured, without compilation."""
    device: Literal["cpu", "gpu"] = "cpu"
    """What both sides compute on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32. PyTorch does the other by autocast."""


def main(argv: list[str]) -> int:
    """Run the suite; the exit status."""
    try:
        flags = read_words(Flags, argv, prog="python -m benchmarks.throughput")
        for name in flags.only:
            if name not in WORKLOADS:
                raise errors.unknown("workload", name, WORKLOADS)
        if not (math.isfinite(flags.seconds) and flags.seconds > 0):
            raise errors.ConfigError(f"seconds is {flags.seconds}; it must be above 0")
        require_torch()
        _choose_device(flags.device)
        chosen = [WORKLOADS[name] for name in flags.only] or list(WORKLOADS.values())
        return run_suite(chosen, flags.out, flags.seconds, flags.dtype)
    except (errors.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _choose_device(device: str) -> None:
    """Have JAX compute on it, here and in the processes of the duels.

    Raises:
        ConfigError: if there is none.
    """
    import jax

    platform = {"cpu": "cpu", "gpu": "cuda"}[device]
    os.environ["JAX_PLATFORMS"] = platform
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # contenders share a GPU
    jax.config.update("jax_platforms", platform)
    make_mesh(1)  # which refuses where there is none
    if (found := jax.default_backend()) != device:
        raise errors.ConfigError(f"JAX computes on the {found} already, not on the {device}")


def run_suite(workloads: list[Workload], out: Path, seconds: float, dtype: str = "float32") -> int:
    """Run workloads one after another and write their records; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}
    for workload in workloads:
        print(f"== {workload.name}", file=sys.stderr, flush=True)
        path = out / f"{workload.name}.json"
        path.unlink(missing_ok=True)  # an old ratio must not outlive a failure
        record = records[workload.name] = {"workload": dataclasses.asdict(workload)}
        try:
            run_workload(workload, seconds, record, dtype)
        except Exception as error:  # whatever it is, the other workloads go on
            lines = str(error).strip().splitlines() or [type(error).__name__]
            record["failure"] = lines[0] if isinstance(error, errors.UserError) else repr(error)
            print(f"failed: {record['failure']}", file=sys.stderr, flush=True)
        text = json.dumps(record, indent=1)
        write_atomically(path, text + "\n")
        write_atomically(out / "table.md", throughput_report.table(records))
        throughput_report.draw(records, out / "throughput.png")
    print(throughput_report.table(records))
    print(f"everything is in {out}")
    return int(any("failure" in record for record in records.values()))


def run_workload(
    workload: Workload, seconds: float, record: dict[str, Any], dtype: str = "float32"
) -> None:
    """Run one workload's duel.

    Args:
        workload: which.
        seconds: about how long to measure.
        record: filled as far as the duel goes.
        dtype: of the computation.

    Raises:
        UserError: if parity or something else fails.
    """
    from jaxnets.interop import duel

    experiment = registry.resolve(f"{workload.module}:EXPERIMENT")
    fields = {
        "dataset": workload.dataset,
        "model": workload.model,
        "batch_size": workload.batch_size,
        "dtype": dtype,
    }
    config = dataclasses.replace(experiment.config, **(fields | dict(workload.fields)))
    options = RunOptions(
        duel_mode=workload.mode,
        duel_seconds=seconds,
        parity_steps=workload.parity_steps,
        steps_per_call=workload.steps_per_call,
    )
    recipe = experiment.make_recipe(config, options)
    duel.compare(workload.module, recipe, config, options, record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
