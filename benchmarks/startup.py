"""Seconds from the command to its first step, without compiled programs and with those of before.

    python -m benchmarks.startup [--only lenet] [--out runs/startup]

Every start is a fresh process, `python -m experiments.cifar10 train`, whose own record is what counts:
from the start of the process to the end of the first step, imports included. Each round begins with an
empty cache folder. The first start fills it, the others find it full. The goal is a third. One start is
without a cache, since filling it takes time too. What a step itself takes is shown beside the rest: no
cache can spare that.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxnets import errors
from jaxnets.config import read_words

# On digits, which need no download and are small enough to be evaluated at once.
RUNS = {
    "lenet": ("--model", "lenet"),
    "speednet": ("--model", "speednet"),
    "two-epochs": ("--preset", "two-epochs", "--train-sizes", "20"),
    "resnet18": ("--model", "resnet18"),
}
COMMON = ("--dataset", "digits", "--steps", "2", "--no-pictures")
TITLES = ("no cache", "first", "again", "a step", "ratio", "hits", "misses")
GOAL = 1 / 3


@dataclasses.dataclass(frozen=True)
class Options:
    """Seconds from the command to its first step, without and with compiled programs."""

    only: str | None = None
    """One of lenet, speednet, two-epochs and resnet18; all by default."""
    out: Path = Path("runs/startup")
    """Folder for startup.json."""
    rounds: int = 3
    """How often the cache begins empty."""
    again: int = 2
    """Starts with the full cache, in each round."""


def start(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the command in a process of its own; its record.

    Args:
        words: of the command, after `train`.
        folder: with the run, which is made anew, and the compiled programs.
    """
    command = [sys.executable, "-m", "experiments.cifar10", "train", *words, *COMMON, "--no-resume"]
    command += [f"--run-dir={folder / 'run'}", f"--program-cache={folder / 'programs'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise errors.ConfigError(f"{' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((folder / "run" / "result.json").read_text())


def measure(words: Sequence[str], rounds: int, again: int) -> dict[str, Any]:
    """The times of one run's starts, in seconds."""
    off, cold, warm = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="jaxnets-startup-") as name:
            off.append(start([*words, "--no-cache-programs"], Path(name)))
            cold.append(start(words, Path(name)))
            warm += [start(words, Path(name)) for _ in range(again)]
    without, first, second = (
        [r["seconds_to_first_step"] for r in results] for results in (off, cold, warm)
    )
    return {
        "words": [*words, *COMMON],
        "without": without,
        "first": first,
        "again": second,
        "ratio": statistics.median(second) / statistics.median(first),
        "misses_first": [r["compile_cache"]["misses"] for r in cold],
        "hits_again": [r["compile_cache"]["hits"] for r in warm],
        "misses_again": [r["compile_cache"]["misses"] for r in warm],
        "step": [r["train_seconds"] for r in warm],  # the second one, which only computes
        # Tracing, and what compiles or finds the program, until the first step is done.
        "program_first": [r["compile_seconds"] for r in cold],
        "program_again": [r["compile_seconds"] for r in warm],
        "device": cold[0]["device"],
        "versions": cold[0]["versions"],
    }


def main(argv: list[str]) -> int:
    """Measure, print the table, and write startup.json."""
    options = read_words(Options, argv, prog="python -m benchmarks.startup")
    if options.only is not None and options.only not in RUNS:
        raise errors.unknown("run", options.only, RUNS)
    if min(options.rounds, options.again) < 1:
        raise errors.ConfigError("rounds and again are at least 1")
    # Nobody's first start of the day: what is on the disk is in memory for all starts alike.
    subprocess.run([sys.executable, "-m", "experiments.cifar10", "train", "--help"], capture_output=True)
    report: dict[str, Any] = {"cores": os.cpu_count(), "processor": platform.processor(), "runs": {}}
    print(f"{'run':<12}" + "".join(f"{title:>10}" for title in TITLES))
    for name, words in RUNS.items():
        if options.only in (None, name):
            found = report["runs"][name] = measure(words, options.rounds, options.again)
            times = [statistics.median(found[key]) for key in ("without", "first", "again", "step")]
            hits, misses = min(found["hits_again"]), max(found["misses_again"])
            print(
                f"{name:<12}{''.join(f'{t:>8.2f} s' for t in times)}{found['ratio']:>10.2f}"
                f"{hits:>10}{misses:>10}"
                f"{'' if found['ratio'] <= GOAL else '  above a third'}",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "startup.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except errors.UserError as error:
        sys.exit(f"error: {error}")
