"""A whole training run in the library's fast forms, and in the plain ones: its time and its accuracy.

    python -m benchmarks.plain_form [--out runs/plain_form] [-- --preset two-epochs --seed 1]

What follows the two dashes are flags of `python -m experiments.cifar10 train`. Both runs train on the
same draws of the same data, one after the other, each in a process of its own. Plain is what `jax.lax`
offers, with XLA's default options (`jaxnets.ops.plain`).
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxnets import errors
from jaxnets.config import read_words
from jaxnets.interop.duel_report import processor
from jaxnets.train.files import write_atomically

_CODE = """
import contextlib, sys
from experiments.cifar10 import EXPERIMENT
from jaxnets import cli, ops
with ops.plain() if sys.argv[1] == "plain" else contextlib.nullcontext():
    sys.exit(cli.main(EXPERIMENT, sys.argv[2:]))
"""
_KEPT = ("eval", "steps", "train_seconds", "compile_seconds", "examples_per_second", "versions")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the fast and the plain forms over a whole run."""

    out: Path = Path("runs/plain_form")
    """The folder of both runs and of plain_form.json."""


def run(form: str, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train; what the run's own record says.

    Args:
        form: "fast" or "plain".
        words: flags of the training command.
        folder: of the run, which begins anew.

    Raises:
        ConfigError: if the command fails.
    """
    command = [sys.executable, "-c", _CODE, form, "train", *words, "--no-resume"]
    command += ["--no-pictures", f"--run-dir={folder}"]
    print(f"== {form}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise errors.ConfigError(f"the {form} run ended with exit status {done.returncode}")
    result = json.loads((folder / "result.json").read_text())
    return {name: result[name] for name in _KEPT}


def main(argv: Sequence[str]) -> int:
    """Train twice and compare; the exit status."""
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    words = argv[split + 1 :] or ["--preset", "two-epochs"]
    try:
        options = read_words(Options, argv[:split], prog="python -m benchmarks.plain_form")
        options.out.mkdir(parents=True, exist_ok=True)
        runs = {form: run(form, words, options.out / form) for form in ("fast", "plain")}
        seconds = {form: made["train_seconds"] for form, made in runs.items()}
        ratio = seconds["plain"] / seconds["fast"]
        record = {"flags": words, "ratio": round(ratio, 4), "processor": processor(), **runs}
        text = json.dumps(record, indent=1)
        write_atomically(options.out / "plain_form.json", text + "\n")
    except (errors.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for form, made in runs.items():
        print(
            f"{form:5}  {made['train_seconds']:8.1f} s of training, "
            f"{made['examples_per_second']:,.0f} images/s, accuracy {made['eval']['accuracy']:.2%}"
        )
    print(f"the fast forms take 1/{ratio:.2f} of the time; everything is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
