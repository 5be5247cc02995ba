"""Where the first non-finite value of a step came from.

The step is replayed on one device, one operation at a time: which module, forward or backward, which
operation on which line, from which tensor, and the examples concerned. What is replayed is the loss and
its gradients from the state before the step; nothing is changed.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets import errors
from jaxnets.errors import first_line
from jaxnets.train.files import write_atomically
from jaxnets.train.mesh import gather_to_first, path_of
from jaxnets.train.provenance import Counts, Node, Tag, Walk, count, on_one_device
from jaxnets.train.replay import Replay, is_bad
from jaxnets.train.state import TrainState
from jaxnets.train.verdict import by_first
from jaxnets.typing import Array, Batch, Indexed, LossFn, PyTree, WeightsFn

if TYPE_CHECKING:
    from jaxnets.recipe import Recipe

FILE = "nonfinite.json"
_LONG_S = 3600.0  # for what one process does while the others wait
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a replay of a step has found.

    Attributes:
        step: the number of the step, from 1 as in the metrics.
        last_good: the number of the last step that was applied; 0 if none was.
        phase: "forward"; "backward", where the loss is finite; "sum" or "norm", where each micro-batch's
            gradients are too, and only their sum or norm isn't; "" if all was finite in the replay.
        module: path of the module in which the first non-finite value came up, "" for the model itself;
            None outside of modules.
        kind: the module's class.
        tensor: that value's name if it was there before the step, as "params/head/kernel" or
            "batch/image"; otherwise of the first named value that it went into, as "output of head",
            "gradient of the input of head", "gradient of params/head/kernel" or "loss term loss".
        counts: how much of that isn't finite.
        operation: the primitive that made the first non-finite value, or first used it.
        source: the line of code of the operation.
        made: how much of what the operation made isn't finite; None if it only used such a value.
        operands: what the operation was given, if all of that was finite.
        examples: `batch["index"]` of the rows concerned, or the rows themselves if there is no index;
            empty if the value has no rows or all of them are concerned.
        batch: `batch["index"]` of all rows of the step; empty if there is no index.
        terms: the terms of the loss that aren't finite, or whose gradients aren't.
        micro_batch: which one, from 0; None without accumulation.
        layers: the non-finite inputs, outputs and gradients of modules, in order, from the first on.
        state: of the leaves of the state that weren't finite before the step.
        gradients: of those of the gradient, by parameter.
        notes: what else there is to know.
    """

    step: int
    last_good: int
    phase: str = ""
    module: str | None = None
    kind: str | None = None
    tensor: str = ""
    counts: Counts | None = None
    operation: str | None = None
    source: str | None = None
    made: Counts | None = None
    operands: tuple[str, ...] = ()
    examples: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    terms: tuple[str, ...] = ()
    micro_batch: int | None = None
    layers: tuple[tuple[str, Counts], ...] = ()
    state: tuple[tuple[str, Counts], ...] = ()
    gradients: tuple[tuple[str, Counts], ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, without the rows of every tensor."""

        def fields(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in items if name != "rows"}

        return json.loads(json.dumps(dataclasses.asdict(self, dict_factory=fields)))

    def __str__(self) -> str:
        lines = [f"step {self.step} was not applied; the last good step is {self.last_good}"]
        if self.phase:
            where = f", in {self.module or 'the model itself'} ({self.kind})"
            if self.module is None:
                where = ", outside of the model's modules" if self.operation else ""
            counts = "" if self.counts is None else f", {self.counts}"
            lines.append(f"first non-finite value: {self.phase}{where}: {self.tensor}{counts}")
        if self.operation:
            made = f"first used by {self.operation}"
            if self.made is not None:
                made = f"{self.made}, made by {self.operation}"
            lines.append(f"  {made} at {self.source}")
        lines += [f"  from {operand}" for operand in self.operands]
        if self.examples:
            lines.append(f"examples: {_list(self.examples)}")
        elif self.batch:
            held = f"the batch held examples {_list(self.batch)}"
            lines.append(f"{held}; none of them can be singled out")
        if self.terms:
            lines.append(f"loss terms concerned: {_list(self.terms)}")
        if self.micro_batch is not None:
            lines.append(f"micro-batch: {self.micro_batch}")
        for title, found in (
            ("not finite before the step already", self.state),
            ("modules, in order", self.layers),
            ("gradients", self.gradients),
        ):
            shown = [f"  {name}: {counts}" for name, counts in found[:_SHOWN]]
            more = [f"  ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            lines += [f"{title}:", *shown, *more] if found else []
        return "\n".join([*lines, *self.notes])


def diagnose(
    loss_fn: LossFn,
    state: TrainState,
    batch: Batch,
    *,
    weights_fn: WeightsFn | None = None,
    coefficients: Mapping[str, float] | None = None,
    accumulate: int = 1,
    step: int | None = None,
) -> Diagnosis:
    """Replay a step and find where its first non-finite value came from.

    Args:
        loss_fn: as the step was made with, as are weights_fn, coefficients and accumulate.
        state: from before the step, wherever it lies. What a guard has stopped, or a skipped step has
            left behind, is that but for the counters.
        batch: `{name: [B, ...]}`, the step's.
        weights_fn: of the loss.
        coefficients: of its terms.
        accumulate: the number of micro-batches.
        step: the number of the step, from 0 as `state.step`; by default that of the guard, or
            `state.step` if it isn't set. After a skipped step it is `state.step - 1`.

    Raises:
        UserError: if the state or the batch is spread over several processes.
    """
    with on_one_device() as device:
        state, batch = jax.tree.map(partial(_here, device=device), (state, dict(batch)))
        guard, at = int(state.guard), int(state.step)
        number = step if step is not None else guard if guard >= 0 else at
        skipped = 0 if state.health is None else int(state.health.in_a_row)
        # Of the skipped ones this may be the last.
        last_good = number - max(skipped - max(at - number, 0), 0)
        replay = Replay(loss_fn, state, batch, weights_fn, dict(coefficients or {}), accumulate, number)
        index = np.ravel(np.asarray(batch.get("index", ()), np.int64))
        return dataclasses.replace(_diagnose(replay, last_good), batch=tuple(index.tolist()))


def report_nonfinite(
    folder: Path,
    error: errors.NonFiniteError,
    recipe: "Recipe",
    draws: Indexed,
    *,
    beat: Callable[[str], None] = lambda section: None,
) -> str:
    """Diagnose the step that stopped a run, and write `nonfinite.json` in its folder.

    It raises no error of its own: what stopped the run must be told in any case. Of several processes
    all call it, at the same step: the first one gets the state, replays and writes, the others wait.

    Args:
        folder: of the run.
        error: as `fit` raises it.
        recipe: of the run.
        draws: `draws[i]` names the examples of step i.
        beat: told what begins: "step" with each array that is gathered, and "save" for the rest, as
            nobody knows how long a replay takes.

    Returns:
        the report as text.
    """

    def report() -> str:
        if state is None or error.step is None:
            raise errors.UserError(why)
        begin = max(begin for begin in recipe.loss_fns if begin <= error.step)
        diagnosis = diagnose(
            recipe.loss_fns[begin],
            state,
            batch_of(recipe.train, draws[error.step]),
            weights_fn=recipe.weights_fn,
            coefficients=recipe.coefficients,
            accumulate=recipe.accumulate,
            step=error.step,
        )
        write_atomically(folder / FILE, json.dumps(diagnosis.to_json(), indent=1) + "\n")
        return f"{diagnosis}\nthe report is in {folder / FILE}"

    why = "its state is not at hand"
    try:
        state = gather_to_first(error.state, beat=partial(beat, "step"))
    except Exception as failure:
        state, why = None, first_line(failure)
    beat("save")
    try:
        return by_first("run/nonfinite", report, timeout_s=_LONG_S)
    except Exception as failure:
        return f"the step could not be replayed: {first_line(failure)}"


def batch_of(data: Any, draw: Mapping[str, Any]) -> dict[str, Any]:
    """The batch that a draw names, on the host.

    Args:
        data: arrays `{name: [N, ...]}`, or a source with `data[i] -> {name: [...]}`.
        draw: `{"index": [B], ...}`.
    """

    def rows(index: Any) -> dict[str, Any]:
        if isinstance(data, Mapping):
            return {name: np.take(np.asarray(x), index, axis=0) for name, x in data.items()}
        found = [data[int(i)] for i in np.ravel(index)]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}

    batch = {**rows(draw["index"]), **draw}
    if "partner" in draw:
        batch["partner"] = {**rows(draw["partner"]), "index": draw["partner"]}
    return batch


def _diagnose(replay: Replay, last_good: int) -> Diagnosis:
    state = {field.name: getattr(replay.state, field.name) for field in dataclasses.fields(TrainState)}
    found = Diagnosis(replay.number + 1, last_good, state=_counted(state))
    params, model_state, added = replay.state.params, replay.state.model_state, None
    for m in range(replay.accumulate):
        micro, before = replay.rows(m), model_state
        grads, (model_state, parts) = replay.compiled(params, before, micro, m)
        if is_bad((grads, parts)):
            if replay.accumulate > 1:
                found = dataclasses.replace(found, micro_batch=m)
            return _search(found, replay, grads, parts, (params, before, micro), m)
        added = (parts, grads) if added is None else jax.tree.map(jnp.add, added, (parts, grads))
    assert added is not None
    return _look_at_sums(found, *added)


def _search(
    found: Diagnosis, replay: Replay, grads: PyTree, parts: PyTree, args: tuple[Any, ...], m: int
) -> Diagnosis:
    """Where what isn't finite of a micro-batch comes from."""

    def forward(params: PyTree, model_state: PyTree, micro: Batch) -> PyTree:
        return replay.forward(params, model_state, micro, m)[0]

    def backward(params: PyTree, model_state: PyTree, micro: Batch) -> PyTree:
        return replay.gradients(params, model_state, micro, m)[0]

    is_forward = is_bad(parts)
    try:
        walk, results = replay.walk(forward, *args)
        # What is compiled may lose a NaN on the way, as the greater of two numbers.
        is_forward = is_forward or bool(results)
        if not is_forward:
            walk, results = replay.walk(backward, *args)
        note = (
            "one operation at a time everything is finite: the compiled program rounds or orders "
            "otherwise, so a value lies at the edge of what its type can hold"
        )
    except Exception as error:  # whatever an operation that can't be replayed alone says
        walk, results = None, []
        note = f"the operations could not be replayed one by one: {first_line(error)}"
    if is_forward:
        terms = tuple(name for name, _ in results) or _names(parts)
        first = f"loss term {terms[0]}"
        found = dataclasses.replace(found, phase="forward", terms=terms)
    else:
        of_terms = (
            replay.gradients_of_terms(args[0], args[1], args[2], m)
            if len(parts) > 1
            else dict.fromkeys(parts, grads)
        )
        gradients = _counted(grads)
        first = f"gradient of params/{gradients[0][0]}"
        found = dataclasses.replace(found, phase="backward", terms=_names(of_terms), gradients=gradients)
    if walk is None or not results:
        return dataclasses.replace(found, tensor=first, notes=(note,))
    return _explain(found, replay, walk, results[0], args[2])


def _explain(
    found: Diagnosis, replay: Replay, walk: Walk, result: tuple[str, Node], micro: Batch
) -> Diagnosis:
    """What led to a result."""
    chain = result[1].chain()
    origin = chain[0]
    place = {id(node): i for i, node in enumerate(chain)}
    named = sorted(
        (tag for tag in walk.tags if id(tag.node) in place), key=lambda tag: place[id(tag.node)]
    )
    what = "loss term " if found.phase == "forward" else "gradient of params/"
    tensor, counts = what + result[0], chain[-1].counts
    if origin.label:
        tensor, counts = origin.label, origin.counts
    elif named:
        tensor, counts = named[0].name, named[0].node.counts
    user = next((node for node in chain if node.source), origin)
    scopes = re.findall(r"module<([^>]*)>", user.scope)
    module = scopes[-1] if scopes else None
    return dataclasses.replace(
        found,
        module=module,
        kind=None if module is None else replay.kinds.get(module),
        tensor=tensor,
        counts=counts,
        operation=user.primitive or None,
        source=user.source or None,
        made=None if origin.label else origin.counts,
        operands=origin.operands,
        examples=_examples(found, replay, chain, named, micro),
        layers=tuple({tag.name: tag.node.counts for tag in reversed(walk.tags)}.items())[::-1],
    )


def _examples(
    found: Diagnosis, replay: Replay, chain: list[Node], named: list[Tag], micro: Batch
) -> tuple[int, ...]:
    """The examples in the first value that has rows, unless that is all of them."""
    is_of_batch = chain[0].label.startswith("batch/")
    if chain[0].label and not is_of_batch:
        return ()
    nodes = chain
    if not is_of_batch and (replay.num_rows,) in {
        x.shape[:1] for x in jax.tree.leaves(replay.state.params)
    }:
        nodes = [tag.node for tag in named]  # others as long as the batch may be parameters' gradients
    rows = next((node.counts.rows for node in nodes if node.counts.rows), ())
    if len(rows) == replay.num_rows > 1:
        return ()
    if "index" not in micro:
        return tuple(row * replay.accumulate + (found.micro_batch or 0) for row in rows)
    index = np.ravel(np.asarray(micro["index"]))
    return tuple(int(index[row]) for row in rows)


def _look_at_sums(found: Diagnosis, parts: Mapping[str, Array], grads: PyTree) -> Diagnosis:
    """Every micro-batch is finite in itself; what is made of them all may not be."""
    norm = optax.tree.norm(grads)
    if not is_bad((parts, grads, norm)):
        note = (
            "everything was finite in the replay, compiled for one device: what training computed "
            "depends on its devices; look for a faulty one, or for data that has changed since"
        )
        return dataclasses.replace(found, notes=(note,))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    largest, name = max((float(jnp.max(jnp.abs(x))), path_of(path)) for path, x in leaves)
    is_sum = is_bad((parts, grads))
    return dataclasses.replace(
        found,
        phase="sum" if is_sum else "norm",
        tensor="sum over the micro-batches" if is_sum else "norm of the gradients",
        counts=count(norm),
        operands=(f"gradient of params/{name} up to {largest:.3g}",),
        gradients=_counted(grads),
        notes=("each part of it is finite, and together they are more than the type can hold",),
    )


def _names(trees: Mapping[str, PyTree]) -> tuple[str, ...]:
    return tuple(name for name, tree in trees.items() if is_bad(tree))


def _counted(tree: PyTree) -> tuple[tuple[str, Counts], ...]:
    counted = ((path_of(path), count(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree))
    return tuple((name, counts) for name, counts in counted if counts is not None)


def _here(x: Any, *, device: Any) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if not x.is_fully_replicated:
            raise errors.UserError(
                "the state is spread over several processes: one can't replay the step"
            )
        x = x.addressable_data(0)
    return jax.device_put(x, device)


def _list(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:_SHOWN])) + (", ..." if len(items) > _SHOWN else "")
