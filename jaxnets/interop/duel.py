"""The duel: the same experiment in JAX and in PyTorch, proved equal and then timed side by side.

Parity comes first; without it nothing is timed. Then every contender (JAX as `train` runs it, JAX in
its plain form, and PyTorch in all its variants, both sides with one thread and with all) trains, or
predicts, in a process of its own, from the same weights, on the same draws of the same uint8 data in
memory. Rounds are interleaved in rotating order and only one process computes at a time, so what the
machine does besides falls on all of them. Each side is represented by its best variant, chosen
afterwards by the median.
"""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxnets import errors, registry
from jaxnets.allocator import release_freed_memory
from jaxnets.config import RunOptions, to_json
from jaxnets.data import Batches, take
from jaxnets.interop import duel_report
from jaxnets.interop.contender import Contender, Starters, WorkerError, make_starters
from jaxnets.interop.distance import ROUNDING_FACTOR
from jaxnets.interop.measure import NUM_VALUES
from jaxnets.interop.parity import LOSS_DRIFT_BOUND, check_parity
from jaxnets.interop.reference import load_reference, require_cuda
from jaxnets.interop.torch_side import CHECK_BOUND
from jaxnets.recipe import Recipe
from jaxnets.remote import is_remote
from jaxnets.train import create_state
from jaxnets.train.files import write_atomically
from jaxnets.train.peak import usage_of

MIN_ROUNDS = 7
ROUND_SECONDS = 0.75  # of one contender, if the time allows
SCREEN_SECONDS = 0.3
KEEP_SHARE = 0.5  # variants slower than this share of the best are timed no further
# Of the first few values, or a multiple of what rounding does to the reference's. LeNet with no gradient
# in its convolutions is off by 3e-4 in float32; where rounding does more than that only whole logits
# and large mistakes are told apart.
VALUE_BOUND = 1e-4
_ROUGH_BOUND = {"high": 1e-2, "medium": 5e-2, "bfloat16": 5e-2}  # by matmul precision, and by dtype
MODES = ("train", "inference")
_SAME = ("mode", "device", "dtype", "compute_dtype", "batch_size", "matmul_precision")


def run_duel(module: str, recipe: Recipe, config: Any, options: RunOptions) -> int:
    """Compare an experiment with its PyTorch reference; writes duel.json and prints a table.

    Args:
        module: of the experiment, such as "experiments.digits".
        recipe: of the experiment.
        config: what the recipe was made from.
        options: as `compare` takes them; `run_dir` is the folder of duel.json.

    Returns:
        the exit status, 0.

    Raises:
        ParityError: if the two don't compute the same; nothing is timed then.
        ConfigError: if they can't be compared.
    """
    check(recipe, options)
    load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)  # before a file is made
    path = _prepare_file(options)
    report: dict[str, Any] = {}
    try:
        compare(module, recipe, config, options, report)
    finally:
        _write(path, report)
    duel_report.print_table(report)
    print(f"everything is in {path}")
    return 0


def compare(
    module: str, recipe: Recipe, config: Any, options: RunOptions, report: dict[str, Any]
) -> None:
    """Prove parity, then time both sides.

    Args:
        module: of the experiment, such as "experiments.digits".
        recipe: of the experiment.
        config: what the recipe was made from.
        options: `duel_mode` is what is timed, `duel_seconds` about the time of measuring,
            `parity_steps` how many training steps are compared.
        report: filled as far as it goes, with the "failure" where there is one.

    Raises:
        ParityError: if the two don't compute the same; nothing is timed then.
        ConfigError: if they can't be compared.
    """
    check(recipe, options)
    dtype = recipe.torch_arguments.get("dtype", "float32")
    if dtype != getattr(config, "dtype", "float32"):
        raise errors.ConfigError(f"no comparison: the PyTorch reference would compute in {dtype}")
    if jax.default_backend() == "gpu":
        require_cuda()
    report |= {
        "experiment": recipe.name,
        "mode": options.duel_mode,
        "model": recipe.torch_arguments.get("model"),
        "config": to_json(config),
    }
    _say(f"parity of {recipe.name} with {recipe.torch_reference}")
    try:
        exact = _in_float32(module, recipe, config, options)
        reference = load_reference(exact.name, exact.torch_reference, exact.torch_arguments)
        parity = check_parity(exact, reference, num_steps=options.parity_steps, say=_say)
    except errors.ParityError as error:
        report["parity"] = {"passed": False, "failure": str(error)}
        raise
    report["parity"] = {"passed": True} | parity
    release_freed_memory()  # the workers need it
    with (
        _exit_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="duel-") as folder,
        contextlib.ExitStack() as stack,
    ):
        reference = load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)
        starters = make_starters(module, recipe, reference, config, options, Path(folder), stack)
        are_comparable = options.duel_mode == "inference" or not any(parity["dropout_rates"])
        try:
            report |= _measure(starters, options.duel_seconds, parity if are_comparable else None)
        except errors.UserError as error:
            report["failure"] = str(error)
            raise
    duel_report.add_shares(report, flops_per_example(recipe, options.duel_mode))


def _in_float32(module: str, recipe: Recipe, config: Any, options: RunOptions) -> Recipe:
    """The recipe that computes in float32, if this one doesn't: parity is proved of that."""
    if getattr(config, "dtype", "float32") == "float32":
        return recipe
    experiment = registry.resolve(f"{module}:EXPERIMENT")
    return experiment.make_recipe(dataclasses.replace(config, dtype="float32"), options)


def value_bounds(settings: Mapping[str, Any], parity: Mapping[str, Any]) -> list[float]:
    """How far the first values of two sides may be apart.

    Args:
        settings: of a contender.
        parity: as `check_parity` gives it, of a batch, maybe smaller, that stands for the timed one.

    Returns:
        a bound for each value; in training for as many steps as parity was proved of, at most.
    """
    rough = (_ROUGH_BOUND.get(settings[name], 0.0) for name in ("matmul_precision", "compute_dtype"))
    bound = max(VALUE_BOUND, *rough)
    if settings["mode"] == "inference":
        return [bound] * NUM_VALUES
    rounding = parity["loss_rounding"][:NUM_VALUES]
    return [max(bound, min(ROUNDING_FACTOR * x, LOSS_DRIFT_BOUND)) for x in rounding]


def flops_per_example(recipe: Recipe, mode: str) -> float:
    """The model's operations for one example, of its plain form: a step, or a prediction."""
    batch = jax.eval_shape(lambda: take(recipe.train_arrays, Batches(1, 1, 1)[0]))
    key = jax.random.key(recipe.seed)
    state = jax.eval_shape(lambda: create_state(recipe.init_fn, recipe.tx, key=key))
    # A training step is taken for three forward passes: one forward, two for the gradients.
    flops = usage_of(recipe.loss_fn, state, batch, None).flops_per_example
    return flops if mode == "train" else flops / 3


def check_same(jax_settings: Mapping[str, Any], torch_settings: Mapping[str, Any]) -> None:
    """Make sure that both sides do the same work.

    Raises:
        ConfigError: if mode, device, a dtype, batch size or matmul precision differ.
    """
    for setting in _SAME:
        left, right = jax_settings.get(setting), torch_settings.get(setting)
        if left != right:
            raise errors.ConfigError(f"no comparison: {setting} is {left} in JAX and {right} in PyTorch")


def check_values(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    name: str,
    bounds: Sequence[float],
) -> float:
    """Make sure that a contender runs the same model as JAX's first: their first values agree.

    Args:
        ours: of each of the first steps its loss, or its logits one after another.
        theirs: the same.
        name: of the contender.
        bounds: of the difference, for each value; what has none isn't compared.

    Returns:
        the largest difference within a step, over the step's largest magnitude.

    Raises:
        ParityError: if it is above the bound, or something isn't finite.
    """
    worst = 0.0
    pairs = zip(ours, theirs, strict=True)
    for i, ((left, right), bound) in enumerate(zip(pairs, bounds, strict=False), start=1):
        difference = np.max(np.abs(np.subtract(left, right)))
        error = float(difference / (np.max(np.abs(right)) or 1.0))
        worst = max(worst, error)
        if not error <= bound:  # a NaN isn't
            raise errors.ParityError(
                f"parity in the timed run: {name} is off by {error:.1e} of the largest magnitude in "
                f"step {i}; the bound is {bound:.0e}"
            )
    return worst


def check(recipe: Recipe, options: RunOptions) -> None:
    """Refuse what can't be compared.

    Raises:
        ConfigError: if so.
    """
    if options.duel_mode not in MODES:
        raise errors.unknown("duel mode", options.duel_mode, MODES)
    if options.duel_mode == "inference" and recipe.predict_fn is None:
        raise errors.ConfigError(f"{recipe.name} has no predict_fn, so no inference to compare")
    if recipe.torch_reference is None:
        raise errors.ConfigError(f"the experiment {recipe.name} has no PyTorch reference to duel with")
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
    for name in ("parity_steps", "steps_per_call"):
        if getattr(options, name) < 1:
            raise errors.ConfigError(f"{name} is {getattr(options, name)}; it must be at least 1")
    if jax.default_backend() not in ("cpu", "gpu"):
        raise errors.ConfigError(
            f"the duel compares on a CPU or a GPU, and JAX is on {jax.default_backend()}: set "
            "JAX_PLATFORMS=cpu"
        )


def _prepare_file(options: RunOptions) -> Path:
    """The path of duel.json, in a folder that can be written."""
    assert options.run_dir is not None
    folder = options.run_dir
    if is_remote(folder):
        raise errors.ConfigError(f"duel writes to a disk; choose another --run-dir than {folder}")
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


def _measure(starters: Starters, seconds: float, parity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Screen all contenders, time the good ones in rounds, and put the figures together.

    The first values are compared within what `parity` allows, unless it is None.
    """
    groups: dict[str, list[Contender]] = {"ours": [], "plain": [], "torch": []}
    failed: dict[str, str] = {}
    agreement = 0.0
    exact, check_bound = starters.exact(), CHECK_BOUND
    try:
        check_bound = exact.check_bound()
    except errors.UserError as error:
        _say(f"not in float64, so no allowance for rounding: {error}")
    exact.close()  # with the memory of float64
    for group, starter in [
        *(("ours", starter) for starter in starters.ours),
        ("plain", starters.plain),
        *(("torch", starter) for starter in starters.torch),
    ]:
        contender = starter()
        try:
            contender.start(check_bound)
        except WorkerError as error:
            if contender.side == "jax":
                raise
            failed[contender.name] = str(error)
            _say(f"failed: {error}")
            contender.close()
            continue
        first = next(iter(groups["ours"]), contender).facts
        check_same(first["settings"], contender.facts["settings"])
        if parity is not None:
            values, bounds = contender.facts["first_values"], value_bounds(first["settings"], parity)
            agreement = max(
                agreement, check_values(first["first_values"], values, contender.name, bounds)
            )
        groups[group].append(contender)
        _screen(contender)
        _say(
            f"{contender.name}: first step {contender.facts['first_step_seconds']:.1f} s, "
            f"about {contender.rate:,.0f} examples/s"
        )
        best = max(member.rate for member in groups[group])
        for member in groups[group]:
            if member.is_open and member.rate < KEEP_SHARE * best:
                member.close()
    if not groups["torch"]:
        raise errors.ConfigError(f"PyTorch failed in every variant: {next(iter(failed.values()))}")
    kept = [member for group in groups.values() for member in group if member.is_open]
    _rounds(kept, seconds)
    ours = duel_report.best_of(groups["ours"])
    ceiling = {
        "jax": duel_report.most_threads(groups["ours"]).ask("ceiling"),
        "torch": duel_report.best_of(groups["torch"]).ask("ceiling"),
    }
    again = starters.again(ours)
    again.start()
    again.close()
    report = duel_report.assemble(groups, again, failed, ceiling)
    report["check_bound"] = check_bound
    report["first_values"] = (
        {
            "largest_error": agreement,
            "bounds": value_bounds(groups["ours"][0].facts["settings"], parity),
        }
        if parity is not None
        else {"skipped": "dropout draws differ"}
    )
    return report


def _screen(contender: Contender) -> None:
    """Warm up and estimate the rate, in steps doubled until they can be timed."""
    settings = contender.facts["settings"]
    steps, batch_size = settings.get("steps_per_call", 1), settings["batch_size"]
    while contender.run(steps) < SCREEN_SECONDS / 2:
        steps *= 2
    # The best of three: a moment when the machine was busy must not cost a variant its place.
    contender.rounds = [steps * batch_size / contender.run(steps) for _ in range(3)]
    contender.rate = max(contender.rounds)


def _rounds(contenders: Sequence[Contender], seconds: float) -> None:
    """Time all contenders in turn; who begins moves on from round to round."""
    count = max(MIN_ROUNDS, round(seconds / (len(contenders) * ROUND_SECONDS)))
    each = seconds / (count * len(contenders))
    _say(f"{count} rounds of {len(contenders)} contenders, {each:.2f} s each")
    for contender in contenders:
        settings = contender.facts["settings"]
        num_calls = contender.rate * each / settings["batch_size"] / settings.get("steps_per_call", 1)
        contender.steps = max(1, round(num_calls)) * settings.get("steps_per_call", 1)
        contender.rounds.clear()
    start = time.monotonic()
    for i in range(count):
        if i >= MIN_ROUNDS and time.monotonic() - start > 2 * seconds:
            _say(f"stopped after {i} rounds: the machine is busy with other work")
            break
        first = i % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            batch_size = contender.facts["settings"]["batch_size"]
            took = contender.run(contender.steps)
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
