"""The duel: the same experiment in JAX and in PyTorch, proved equal and then timed side by side.

Parity comes first; without it nothing is timed. Then every contender (JAX as `train` runs it, and
PyTorch in all its variants) trains in a process of its own, from the same weights, on the same
draws of the same uint8 data in memory. Rounds are interleaved in rotating order and only one
process computes at a time, so what the machine does besides falls on all of them. PyTorch is
represented by its best variant, chosen afterwards by the median.
"""

import contextlib
import json
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxnets import errors
from jaxnets.config import RunOptions, to_json
from jaxnets.interop import duel_report
from jaxnets.interop.contender import Contender, WorkerError, make_starters
from jaxnets.interop.parity import check_parity
from jaxnets.interop.reference import load_reference
from jaxnets.recipe import Recipe
from jaxnets.train.checkpoint import write_atomically

MIN_ROUNDS = 7
ROUND_SECONDS = 0.75  # of one contender, if the time allows
SCREEN_SECONDS = 0.3
KEEP_SHARE = 0.5  # variants slower than this share of the best are timed no further
LOSS_BOUND = 1e-3  # of the first few losses in float32, where parity has been shown before
_SAME = ("device", "dtype", "batch_size", "matmul_precision")


def run_duel(module: str, recipe: Recipe, config: Any, options: RunOptions) -> int:
    """Compare an experiment with its PyTorch reference; writes duel.json and prints a table.

    Args:
        module: of the experiment, such as "experiments.digits".
        recipe: of the experiment.
        config: what the recipe was made from.
        options: `run_dir` is the folder of duel.json, `duel_seconds` about the time of measuring.

    Returns:
        the exit status, 0.

    Raises:
        ParityError: if the two don't compute the same; nothing is timed then.
        ConfigError: if they can't be compared.
    """
    _check(recipe, options)
    reference = load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)
    path = _prepare_file(options)
    report: dict[str, Any] = {
        "experiment": recipe.name,
        "model": recipe.torch_arguments.get("model"),
        "config": to_json(config),
    }
    _say(f"parity of {recipe.name} with {recipe.torch_reference}")
    try:
        report["parity"] = {"passed": True} | check_parity(recipe, reference, say=_say)
    except errors.ParityError as error:
        report["parity"] = {"passed": False, "failure": str(error)}
        _write(path, report)
        raise
    with (
        _exit_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="duel-") as folder,
        contextlib.ExitStack() as stack,
    ):
        contenders = make_starters(module, recipe, reference, config, options, Path(folder), stack)
        try:
            report |= _measure(contenders, options.duel_seconds, has_dropout=_has_dropout(report))
        except errors.UserError as error:
            _write(path, report | {"failure": str(error)})
            raise
    _write(path, report)
    duel_report.print_table(report)
    print(f"everything is in {path}")
    return 0


def check_same(jax_settings: Mapping[str, Any], torch_settings: Mapping[str, Any]) -> None:
    """Make sure that both sides do the same work.

    Raises:
        ConfigError: if device, dtype, batch size or matmul precision differ.
    """
    for setting in _SAME:
        left, right = jax_settings.get(setting), torch_settings.get(setting)
        if left != right:
            raise errors.ConfigError(f"no comparison: {setting} is {left} in JAX and {right} in PyTorch")


def check_losses(ours: Sequence[float | None], theirs: Sequence[float | None], name: str) -> float:
    """Make sure that both sides train the same model: their first losses agree.

    Returns:
        the largest relative difference.

    Raises:
        ParityError: if it is above the bound, or a loss isn't finite.
    """
    worst = 0.0
    for i, (left, right) in enumerate(zip(ours, theirs, strict=True), start=1):
        error = math.inf if left is None or right is None else abs(left - right) / abs(right or 1.0)
        worst = max(worst, error)
        if not error <= LOSS_BOUND:
            raise errors.ParityError(
                f"parity in the timed run: the loss of step {i} is {left} in JAX and {right} in "
                f"{name}; the bound is {LOSS_BOUND:.0e} of it"
            )
    return worst


def _check(recipe: Recipe, options: RunOptions) -> None:
    if recipe.stages or recipe.partners:
        raise errors.ConfigError("the duel compares one loss on single examples: no stages, no partners")
    _ = recipe.train_arrays  # refuses what isn't in memory
    if options.strategy != "jit" or options.num_devices not in (None, 1) or not options.jit:
        raise errors.ConfigError("the duel runs on one device with --strategy jit, compiled")
    if recipe.accumulate != 1:
        raise errors.ConfigError(
            f"the duel compares whole batches; accumulate is {recipe.accumulate}, not 1"
        )
    if not (math.isfinite(options.duel_seconds) and options.duel_seconds > 0):
        raise errors.ConfigError(f"duel_seconds is {options.duel_seconds}; it must be above 0")
    if jax.default_backend() != "cpu":
        raise errors.ConfigError(
            f"the duel compares on the CPU, and JAX is on {jax.default_backend()}: set JAX_PLATFORMS=cpu"
        )


def _prepare_file(options: RunOptions) -> Path:
    """The path of duel.json, in a folder that can be written."""
    assert options.run_dir is not None
    folder = options.run_dir
    if folder.exists() and not folder.is_dir():
        raise errors.ConfigError(f"the run folder {folder} is a file; choose another --run-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        (folder / "duel.json").unlink(missing_ok=True)  # an old ratio must not outlive a failure
    except OSError as error:
        raise errors.ConfigError(
            f"the run folder {folder} can't be written: {error.strerror}; choose another --run-dir"
        ) from None
    return folder / "duel.json"


def _write(path: Path, report: Mapping[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise errors.ConfigError(f"{path} can't be written: {error.strerror}") from None


def _has_dropout(report: Mapping[str, Any]) -> bool:
    return any(report["parity"]["dropout_rates"])


def _measure(
    starters: Sequence[Callable[[], Contender]], seconds: float, *, has_dropout: bool
) -> dict[str, Any]:
    """Screen all contenders, time the good ones in rounds, and put the figures together."""
    ours: Contender | None = None
    variants: list[Contender] = []
    failed: dict[str, str] = {}
    agreement = 0.0
    for start in starters:
        contender = start()
        try:
            contender.start()
        except WorkerError as error:
            if contender.side == "jax":
                raise
            failed[contender.name] = str(error)
            _say(f"failed: {error}")
            contender.close()
            continue
        if ours is None:
            ours = contender
        else:
            check_same(ours.facts["settings"], contender.facts["settings"])
            if not has_dropout:
                losses = contender.facts["first_losses"]
                error = check_losses(ours.facts["first_losses"], losses, contender.name)
                agreement = max(agreement, error)
            variants.append(contender)
        _screen(contender)
        _say(
            f"{contender.name}: first step {contender.facts['first_step_seconds']:.1f} s, "
            f"about {contender.rate:,.0f} examples/s"
        )
        best = max((variant.rate for variant in variants), default=0.0)
        for variant in variants:
            if variant.is_open and variant.rate < KEEP_SHARE * best:
                variant.facts |= variant.ask("memory")
                variant.close()
    assert ours is not None
    if not variants:
        raise errors.ConfigError(f"PyTorch failed in every variant: {next(iter(failed.values()))}")
    kept = [ours] + [variant for variant in variants if variant.is_open]
    _rounds(kept, seconds)
    for contender in kept:
        contender.facts |= contender.ask("memory")
    report = duel_report.assemble(ours, variants, failed)
    report["first_losses"] = (
        {"skipped": "dropout draws differ"}
        if has_dropout
        else {"largest_error": agreement, "bound": LOSS_BOUND}
    )
    return report


def _screen(contender: Contender) -> None:
    """Warm up and estimate the rate, in steps doubled until they can be timed."""
    steps, batch_size = 1, contender.facts["settings"]["batch_size"]
    while contender.train(steps) < SCREEN_SECONDS / 2:
        steps *= 2
    # The best of three: a moment when the machine was busy must not cost a variant its place.
    contender.rounds = [steps * batch_size / contender.train(steps) for _ in range(3)]
    contender.rate = max(contender.rounds)


def _rounds(contenders: Sequence[Contender], seconds: float) -> None:
    """Time all contenders in turn; who begins moves on from round to round."""
    count = max(MIN_ROUNDS, round(seconds / (len(contenders) * ROUND_SECONDS)))
    each = seconds / (count * len(contenders))
    _say(f"{count} rounds of {len(contenders)} contenders, {each:.2f} s each")
    for contender in contenders:
        batch_size = contender.facts["settings"]["batch_size"]
        contender.steps = max(1, round(contender.rate * each / batch_size))
        contender.rounds.clear()
    start = time.monotonic()
    for i in range(count):
        if i >= MIN_ROUNDS and time.monotonic() - start > 2 * seconds:
            _say(f"stopped after {i} rounds: the machine is busy with other work")
            break
        first = i % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            batch_size = contender.facts["settings"]["batch_size"]
            took = contender.train(contender.steps)
            contender.rounds.append(contender.steps * batch_size / took)
        if (i + 1) % 5 == 0 or i + 1 == count:
            _say(f"round {i + 1} of {count}")


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that workers and temporary files go."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where signals can't be handled
        return

    def leave(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
