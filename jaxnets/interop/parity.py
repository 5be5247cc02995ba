"""Proof that two implementations of an experiment compute the same thing.

An error is the largest difference within a tensor, over the largest magnitude in the reference's
tensor. In float64 all of it, over all steps, is held to 1e-9, where only a mistake is larger. In
float32, with matmuls at the highest precision, outputs, loss, gradients and one step are held to
1e-5, or to a small multiple of what float32 costs the reference itself where that is more: the
distance of its float32 from its own float64 result, or of that from float64 with weights that differ
by as much as rounding makes of them. (Adam divides a gradient by its magnitude, so where gradients are
nearly zero a step is mostly rounding, in PyTorch as in JAX: elements whose gradient is so small count in
the gradients and not in the step. And a unit that is all but zero, or two that
are all but the largest of a window, may switch on one side alone and change a gradient at once: among
the many of a deep network one does now and then.) It is never more than 0.3: a gradient that is missing
is off by 1. Over many steps
float32 drifts apart by itself: the losses are bounded, the rest is measured and reported.

A tensor that is zero, or nothing but rounding (smaller than 16 units in the last place of the
largest tensor of its stage: the gradient of a bias before a normalisation is such a one), has no
magnitude of its own. It is held to that rounding; if all tensors of a stage are zero, to zero.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxnets import errors
from jaxnets.data import Batches
from jaxnets.interop.distance import ROUNDING_FACTOR, allowed, distances, only_rounding
from jaxnets.interop.reference import Reference
from jaxnets.interop.sides import Arrays, Record, initial_variables, output_bytes, run_jax, run_torch
from jaxnets.interop.weights import Table, flatten, to_linen, to_torch
from jaxnets.recipe import Recipe

NUM_STEPS = 20
MAX_BATCH_SIZE = 128  # float64 is slow, and a step of 128 rows shows what one of 1024 does
MAX_OUTPUT_BYTES = 2**30  # of all layers in one batch, in float64; a dozen of them are held
BOUNDS = {"float64": 1e-9, "float32": 1e-5}
_SWITCHING = ("gradients", "parameters after 1 step")  # where a unit that switches shows at once
NUM_NUDGES = 3  # runs with other weights, which show what rounding may do
# After 20 steps in float32. Batch statistics and Adam amplify rounding (Optax computes Adam's bias
# correction in float32, off by 7e-6; PyTorch in float64), and a unit that switches on one side
# alone makes it visible: 3e-3 of the losses and 0.14 of a bias were seen with both.
LOSS_DRIFT_BOUND = 0.05


def check_parity(
    recipe: Recipe,
    reference: Reference,
    *,
    num_steps: int = NUM_STEPS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare outputs, losses, gradients, running statistics and steps of both sides.

    Args:
        recipe: of the experiment; its own data, order, loss and optimizer are used.
        reference: the same in PyTorch.
        num_steps: how many steps to compare, each on another batch.
        say: called with a line about each dtype.

    Returns:
        the settings, for each dtype and stage the worst tensor, its error and the bound, and as
        "loss_rounding" how far each step's loss is from its value in float64, in the reference.

    Raises:
        ParityError: at the first tensor whose error is above its bound.
    """
    variables = initial_variables(recipe)
    check_round_trip(reference.weights, variables)
    batch_size = _batch_size(recipe, variables)
    draws = list(Batches(recipe.num_examples, batch_size, num_steps * batch_size, seed=recipe.seed))
    report: dict[str, Any] = {"num_steps": num_steps, "batch_size": batch_size, "dropout": "off"}
    exact, nudged = None, []
    for dtype, bound in BOUNDS.items():
        ours = run_jax(recipe, variables, draws, dtype)
        theirs = run_torch(reference, recipe.train_arrays, variables, draws, dtype)
        if exact is not None:
            nudged = _nudged(reference, recipe, variables, draws[:1], rough=theirs, exact=exact)
        report[dtype] = stages = compare_records(ours, theirs, dtype, bound, exact=exact, nudged=nudged)
        report["dropout_rates"] = ours.dropout_rates
        if exact is not None:
            report["loss_rounding"] = [
                abs(rough - fine) / (abs(fine) or 1.0)
                for rough, fine in zip(theirs.losses, exact.losses, strict=True)
            ]
        exact = theirs
        say(_summary(dtype, stages, num_steps))
    return report


def _batch_size(recipe: Recipe, variables: Mapping[str, Any]) -> int:
    """Rows of the batches: as many as are trained on, as far as time and memory allow."""
    batch_size = min(recipe.batch_size, MAX_BATCH_SIZE)
    (draw,) = Batches(recipe.num_examples, batch_size, batch_size, seed=recipe.seed)
    needed = output_bytes(recipe, variables, draw)
    return batch_size if needed <= MAX_OUTPUT_BYTES else max(1, batch_size * MAX_OUTPUT_BYTES // needed)


def _nudged(
    reference: Reference,
    recipe: Recipe,
    variables: Mapping[str, Any],
    draws: Sequence[Mapping[str, Any]],
    *,
    rough: Record,
    exact: Record,
) -> list[Record]:
    """The reference in float64 with weights that are off by what float32 does to its outputs."""
    size = max(distances(rough.outputs, exact.outputs).values(), default=0.0)
    rng = np.random.default_rng(0)

    def nudge(x: Any) -> np.ndarray:
        return np.asarray(x, np.float64) * (1 + size * rng.choice([-1.0, 1.0], np.shape(x)))

    records = []
    for _ in range(NUM_NUDGES):
        params = jax.tree.map(nudge, variables["params"])
        others = {**variables, "params": params}
        records.append(run_torch(reference, recipe.train_arrays, others, draws, "float64"))
    return records


def check_round_trip(table: Table, variables: Mapping[str, Any]) -> None:
    """Make sure that weights come back from PyTorch's layout bit for bit.

    Raises:
        ParityError: if one doesn't, or the table doesn't name each exactly once.
    """
    back = flatten(to_linen(table, to_torch(table, variables)))
    for name, array in flatten(variables).items():
        array = np.asarray(array)
        if array.shape != back[name].shape or array.tobytes() != back[name].tobytes():
            raise errors.ParityError(f"weights: {name} does not come back from PyTorch's layout")


def compare_records(
    ours: Record,
    theirs: Record,
    dtype: str,
    bound: float,
    *,
    exact: Record | None = None,
    nudged: Sequence[Record] = (),
) -> dict[str, Any]:
    """Compare two runs stage by stage.

    Args:
        ours: JAX's.
        theirs: PyTorch's.
        dtype: of both.
        bound: on every error.
        exact: PyTorch's run in float64, which tells how much `theirs` has lost to rounding.
        nudged: more of them, of the first step, from other weights.

    Returns:
        for each stage the worst tensor, its error and the bound.

    Raises:
        ParityError: at the first tensor whose error is above its bound.
    """
    if ours.dropout_rates != theirs.dropout_rates:
        raise errors.ParityError(
            f"parity: dropout rates are {ours.dropout_rates} in JAX and {theirs.dropout_rates} in "
            "PyTorch"
        )
    # Where the gradient is zero but for rounding, such as of the bias of attention's keys, an optimizer
    # like Adam makes whole steps of the rounding; no output depends on them.
    noise = only_rounding((exact or theirs).grads)
    left, right = _stages(ours, noise), _stages(theirs, noise)
    truth = {} if exact is None else _stages(exact, noise)
    others = [_stages(record, noise) for record in nudged]
    unsteady = {} if exact is None else _unsteady([ours.grads, theirs.grads], exact.grads)
    report = {}
    for stage, expected in right.items():
        found = left[stage]
        if stage.startswith("outputs"):  # layers without weights have none in the table
            found = {name: array for name, array in found.items() if name in expected}
        if stage == "parameters after 1 step":
            found = _steady(found, expected, unsteady)
        limit: float | None = bound
        own = None
        if stage in truth:
            rounded = [expected]
            if stage in _SWITCHING:
                rounded += [other[stage] for other in others]
            if stage == "parameters after 1 step":
                rounded = [_steady(x, truth[stage], unsteady) for x in rounded]
            own = max(max(distances(x, truth[stage]).values(), default=0.0) for x in rounded)
            limit = allowed(bound, [own])
            if "all steps" in stage:
                limit = LOSS_DRIFT_BOUND if stage.startswith("losses") else None
        if found or expected:
            report[stage] = compare(f"{dtype}, {stage}", found, expected, limit)
            if own is not None:
                report[stage]["reference_rounding"] = own
            if noise and stage.startswith("parameters"):
                report[stage]["left_out"] = sorted(noise)
            if unsteady and stage == "parameters after 1 step":
                count = sum(int(unsteady[name].sum()) for name in expected if name in unsteady)
                report[stage]["unsteady_elements"] = count
    return report


def _unsteady(rough: Sequence[Arrays], exact: Arrays) -> Arrays:
    """Which elements' gradients are mostly rounding, by name, as then a step of Adam is.

    They are less than ten times what rounding has changed in them on either side. The gradients
    themselves are compared in all elements, and in float64 so is the step.
    """
    return {
        name: np.any([np.abs(x) < ROUNDING_FACTOR * np.abs(side[name] - x) for side in rough], axis=0)
        for name, x in exact.items()
        if all(name in side and side[name].shape == x.shape for side in rough)
    }


def _steady(found: Arrays, expected: Arrays, unsteady: Arrays) -> Arrays:
    """`found` with the elements of `expected` where those are unsteady and finite."""
    return {
        name: np.where(unsteady[name] & np.isfinite(x), expected[name].astype(x.dtype), x)
        if name in unsteady and name in expected and x.shape == expected[name].shape
        else x
        for name, x in found.items()
    }


def compare(stage: str, ours: Arrays, theirs: Arrays, bound: float | None) -> dict[str, Any]:
    """Compare the tensors of one stage, in the order of `theirs`, the reference.

    Args:
        stage: its name, for the message.
        ours: names to arrays.
        theirs: the same names.
        bound: on the largest difference over the largest magnitude; None if only a value that isn't
            finite is refused.

    Returns:
        "tensor" (the worst), its "error", the "bound" and "num_tensors".

    Raises:
        ParityError: at the first tensor above the bound, or of another shape, or missing.
    """
    if set(ours) != set(theirs):
        lonely = sorted(set(ours) ^ set(theirs))
        raise errors.ParityError(f"parity in {stage}: {', '.join(lonely)} is on one side only")
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            raise errors.ParityError(
                f"parity in {stage}: {name} has the shape {ours[name].shape} in JAX and "
                f"{expected.shape} in PyTorch"
            )
    found = distances(ours, theirs)
    for name, error in found.items():
        if not (math.isfinite(error) if bound is None else error <= bound):  # a NaN isn't
            allowed = "it must be finite" if bound is None else f"the bound is {bound:.0e}"
            raise errors.ParityError(
                f"parity in {stage}: {name} differs by {error:.2e} of the largest magnitude; {allowed}"
            )
    worst = max(found, key=lambda name: found[name])
    return {"tensor": worst, "error": found[worst], "bound": bound, "num_tensors": len(found)}


def _stages(record: Record, noise: set[str]) -> dict[str, Arrays]:
    """What is compared, in the order in which a mistake shows first; of the parameters not the noise."""

    def part(arrays: Arrays, is_params: bool) -> Arrays:
        return {
            name: x
            for name, x in arrays.items()
            if name.startswith("params/") == is_params and name not in noise
        }

    def named(outputs: Arrays) -> Arrays:
        return {f"output of {name or 'the model'}": array for name, array in outputs.items()}

    losses = {f"loss of step {i}": np.array(x) for i, x in enumerate(record.losses, start=1)}
    return {
        "outputs": named(record.outputs),
        "loss": {"loss of step 1": losses["loss of step 1"]},
        "gradients": record.grads,
        "running statistics after 1 step": part(record.after_one, False),
        "parameters after 1 step": part(record.after_one, True),
        "losses of all steps": losses,
        "running statistics after all steps": part(record.after_all, False),
        "parameters after all steps": part(record.after_all, True),
        "outputs in evaluation after all steps": named(record.eval_outputs),
    }


def _summary(dtype: str, stages: Mapping[str, Mapping[str, Any]], num_steps: int) -> str:
    early = {name: stage for name, stage in stages.items() if "all steps" not in name}
    late = {name: stage for name, stage in stages.items() if "all steps" in name}

    def worst(part: Mapping[str, Mapping[str, Any]]) -> str:
        name = max(part, key=lambda name: part[name]["error"])
        bound = part[name]["bound"]
        allowed = "no bound" if bound is None else f"bound {bound:.0e}"
        return f"{part[name]['error']:.1e} ({part[name]['tensor']}; {allowed})"

    count = sum(stage["num_tensors"] for stage in stages.values())
    return (
        f"parity in {dtype}: {count} tensors agree; largest error in one step {worst(early)}, "
        f"in {num_steps} steps {worst(late)}"
    )
