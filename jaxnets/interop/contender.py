"""The parent's end of a duel's worker processes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnets import errors
from jaxnets.config import RunOptions, to_json
from jaxnets.interop.jax_side import matmul_precision
from jaxnets.interop.measure import num_cores
from jaxnets.interop.reference import Reference
from jaxnets.interop.sides import initial_variables
from jaxnets.interop.weights import flatten, to_torch
from jaxnets.recipe import Recipe


class WorkerError(errors.UserError):
    """A worker answered that it could not do what it was told."""


class Contender:
    """A worker process, and what is known about it.

    Attributes:
        name: for reports, such as "torch.compile, 2 threads".
        side: "jax" or "torch".
        rounds: examples a second, of each timed round.
    """

    def __init__(self, name: str, side: str, spec: Mapping[str, Any], env: Mapping[str, str], log: Path):
        self.name = name
        self.side = side
        self.rounds: list[float] = []
        self.steps = 1
        self.rate = 0.0
        self.facts: dict[str, Any] = {}
        self._log = log
        self._spec = spec
        self._born = time.perf_counter()
        # The same paths as here, so that the same experiment and library are found.
        code = f"import sys; sys.path[:] = {sys.path!r}; from jaxnets.interop import duel_worker; "
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code + "duel_worker.main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=dict(env),
                start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_open(self) -> bool:
        """Whether the process is still wanted."""
        return self._process.poll() is None

    def check_bound(self) -> float:
        """How far PyTorch's variants may be off from its plain one; instead of `start`."""
        self.ask("start", side=self.side, spec=dict(self._spec))
        return self.ask("check_bound")["bound"]

    def start(self, check_bound: float = 0.0) -> None:
        """Import, load data and weights, take the first steps, check gradients; fills `facts`.

        Args:
            check_bound: how far gradients, or logits, may be off from the plain variant's.

        Raises:
            WorkerError: if something fails, or the gradients are wrong.
        """
        self.facts |= self.ask("start", side=self.side, spec=dict(self._spec))
        first = self.ask("first")
        self.facts |= {
            "first_step_seconds": first["seconds"],
            "seconds_to_first_steps": time.perf_counter() - self._born,
            "first_values": first["values"],
            "cache_hits": first["cache_hits"],
            **self.ask("memory"),  # before the check, which takes memory of its own
        }
        self.facts["gradients"] = check = self.ask("check")
        if check["off_by"] > check_bound:
            raise WorkerError(
                f"{self.name}: {check['parameter']} (or its gradient) is off by {check['off_by']:.1e} "
                f"of its largest magnitude; the bound is {check_bound:.0e}; not timed"
            )

    def run(self, steps: int) -> float:
        """Train or predict; the seconds that it took.

        Raises:
            NonFiniteError: if the loss, or a logit, is no longer a number.
        """
        reply = self.ask("run", steps=steps)
        if not reply["is_finite"]:
            raise errors.NonFiniteError(
                f"the numbers of {self.name} are no longer finite; try a smaller --learning-rate"
            )
        return reply["seconds"]

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer.

        Raises:
            WorkerError: if the worker reports an error.
            UserError: if it has died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            code = self._process.wait()
            said = [line for line in self._log.read_text().splitlines() if line.strip()]
            raise errors.UserError(
                f"the worker of {self.name} died with exit status {code}"
                + (f": {said[-1].strip()}" if said else "")
            )
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process."""
        if self.is_open:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Starters(NamedTuple):
    """Functions that start a contender each.

    Attributes:
        ours: JAX's, with one thread and with all.
        plain: JAX's in the plain form, with all threads.
        torch: PyTorch's variants.
        exact: starts PyTorch's plain one, to say how far the others may be off.
        again: starts one of ours once more, to find its programs in the cache.
    """

    ours: list[Callable[[], Contender]]
    plain: Callable[[], Contender]
    torch: list[Callable[[], Contender]]
    exact: Callable[[], Contender]
    again: Callable[[Contender], Contender]


def make_starters(
    module: str,
    recipe: Recipe,
    reference: Reference,
    config: Any,
    options: RunOptions,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Starters:
    """Prepare the contenders' files, and functions that start them.

    Args:
        module: of the experiment, such as "experiments.digits".
        recipe: of the experiment.
        reference: the same in PyTorch.
        config: what the recipe was made from.
        options: where the data is, and whether to train or to predict.
        folder: for weights, data and logs.
        stack: ends the processes.
    """
    compute_dtype, is_cpu = getattr(config, "dtype", "float32"), jax.default_backend() == "cpu"
    variables = initial_variables(recipe)
    _save(folder / "linen.npz", flatten(variables))
    _save(folder / "torch.npz", to_torch(reference.weights, variables))
    _save(folder / "train.npz", recipe.train_arrays)
    jax_spec = {
        "module": module,
        "config": to_json(config),
        "data_dir": to_json(options)["data_dir"],
        "verify": options.verify,
        "plugins": [str(file.expanduser().resolve()) for file in options.plugin],
        "weights": str(folder / "linen.npz"),
        "mode": options.duel_mode,
        "compute_dtype": compute_dtype,
    }
    torch_spec = {
        "name": recipe.name,
        "target": recipe.torch_reference,
        "arguments": dict(recipe.torch_arguments),
        "weights": str(folder / "torch.npz"),
        "arrays": str(folder / "train.npz"),
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "mode": options.duel_mode,
        "compute_dtype": compute_dtype,
        "device": jax.default_backend(),
        # On a CPU XLA computes in float32 whatever is set, and so must PyTorch.
        "matmul_precision": "highest"
        if is_cpu
        else matmul_precision(
            jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
            jax.default_backend(),
        ),
    }
    env = dict(os.environ)
    if options.duel_mode == "inference":  # torch.compile then folds normalisations and packs weights
        env |= {"TORCHINDUCTOR_FREEZING": "1"}

    def starter(label: str, side: str, spec: Mapping[str, Any]) -> Callable[[], Contender]:
        def start() -> Contender:
            log = folder / f"{label.replace(' ', '-').replace(',', '')}.log"
            # A cache from an earlier duel, or variant, would make the first step look quick.
            own = {"TORCHINDUCTOR_CACHE_DIR": str(log.with_suffix(".inductor"))}
            contender = Contender(label, side, spec, env | own, log)
            stack.callback(contender.close)
            return contender

        return start

    num_steps = options.steps_per_call if options.duel_mode == "train" else 1

    def ours(threads: int, suffix: str = "") -> Callable[[], Contender]:
        # Each has a cache of its own, or the second would find what the first has compiled.
        spec = jax_spec | {
            "is_plain": False,
            "steps_per_call": num_steps,
            "cache": str(folder / f"xla-{threads}"),
            "threads": threads,
        }
        calls = f", {num_steps} steps a call" if num_steps > 1 else ""
        return starter(f"jaxnets, {_plural(threads)}{calls}{suffix}", "jax", spec)

    # Elsewhere the threads only hand work to the device.
    counts = sorted({1, num_cores()}) if is_cpu else [num_cores()]
    ways: dict[str, tuple[bool, str | None]] = {"eager": (False, None), "compile": (True, None)}
    if not is_cpu:
        ways["compile, CUDA graphs"] = True, "reduce-overhead"
    plain = {
        "is_compiled": False,
        "compile_mode": None,
        "channels_last": False,
        "threads": num_cores(),
    }
    variants = []
    for way, (is_compiled, compile_mode) in ways.items():
        for channels_last in (False, True):
            for threads in counts:
                label = f"{way}{', channels_last' if channels_last else ''}, {_plural(threads)}"
                variant = {
                    "is_compiled": is_compiled,
                    "compile_mode": compile_mode,
                    "channels_last": channels_last,
                    "threads": threads,
                }
                variants.append(starter(label, "torch", torch_spec | variant))
    return Starters(
        [ours(threads) for threads in counts],
        starter(
            "plain JAX",
            "jax",
            jax_spec | {"is_plain": True, "cache": None, "threads": num_cores(), "steps_per_call": 1},
        ),
        variants,
        starter("eager, in float64 as well", "torch", torch_spec | plain),
        lambda contender: ours(contender.facts["settings"]["threads"], ", warm cache")(),
    )


def _plural(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    try:
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise errors.ConfigError(
            f"the temporary folder {path.parent} can't be written: {error.strerror}; set TMPDIR to "
            "another"
        ) from None
