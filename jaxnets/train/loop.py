"""The training loop: one function, in the order in which things happen."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxnets import errors
from jaxnets.train.shapes import shapes_of
from jaxnets.train.state import TrainState
from jaxnets.typing import Hook, Indexed


class StepMetrics:
    """The metrics of one step, read from the device when somebody asks.

    Args:
        step: the number of the step, from 1.
        values: scalars on the device; `[K]` if the program takes K steps in a call.
        index: `[B]`, or `[K, B]`, the examples of the batch, where that is known.
        clock: where waiting for the step is added up.
        place: of this step among the K; None where there is one.
        is_last: whether it is the last step of its call, so that the state given beside is its own.
    """

    def __init__(
        self,
        step: int,
        values: Mapping[str, Any],
        index: Any = None,
        clock: "Clock | None" = None,
        place: int | None = None,
        is_last: bool = True,
    ):
        self.step = step
        self.is_last = is_last
        self._clock = clock
        self._values = values
        self._index = index
        self._place = place
        self._read: dict[str, float] | None = None

    def read(self) -> dict[str, float]:
        """Wait for the step and return its metrics as numbers.

        Raises:
            NonFiniteError: if this step or an earlier one was not applied.
        """
        if self._read is None:
            self.check()
            self._read = self._at(self._place)
            self._read.pop("guard", None)
        return self._read

    def check(self) -> None:
        """Wait for the step and raise NonFiniteError if it was not applied."""
        start = time.perf_counter()
        guard = np.ravel(self._values.get("guard", -1))
        guard = int(guard[self._place if self._place is not None and guard.size > 1 else 0])
        if self._clock:
            self._clock.wait += time.perf_counter() - start
        if guard < 0:
            return
        # The step that was not applied may be an earlier one of the same call.
        behind, place = self.step - 1 - guard, self._place
        if place is not None and behind <= place:
            place, behind = place - behind, 0
        found = self._at(place)
        loss, norm = found["loss"], found["grad_norm"]
        which, index = "", None
        if self._index is not None and not behind:
            index = self._index if place is None else self._index[place]
            index = np.ravel(index)  # in the devices' parts, where pmap has cut it
            shown = ", ".join(str(i) for i in index[:8])
            which = f"; its batch has the examples {shown}{', ...' if len(index) > 8 else ''}"
        raise errors.NonFiniteError(
            f"step {guard + 1} was not applied: its loss is {loss:.6g} and the norm of its gradients "
            f"{norm:.6g}{which}; try a lower learning rate",
            step=guard,
            index=index,
        )

    def _at(self, place: int | None) -> dict[str, float]:
        values = jax.device_get(dict(self._values))
        return {name: (x if place is None else x[place]).item() for name, x in values.items()}


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]]


@dataclasses.dataclass
class Clock:
    """Where the time of a loop went, in seconds.

    Attributes:
        compile: the first call of each program, nearly all of which is tracing and compilation.
        data: waiting for batches.
        dispatch: handing steps to the device.
        wait: waiting for steps, in the loop or in a hook that reads their metrics.
        hooks: everything else that hooks did.
        steps: how many steps `data`, `dispatch` and `wait` are about; those first ones aren't.
        first_step: when the first call was done, in seconds of `time.perf_counter`; None before.
    """

    compile: float = 0.0
    data: float = 0.0
    dispatch: float = 0.0
    wait: float = 0.0
    hooks: float = 0.0
    steps: int = 0
    first_step: float | None = None

    @property
    def train(self) -> float:
        """Time spent on training itself."""
        return self.data + self.dispatch + self.wait

    @property
    def data_wait_share(self) -> float:
        """The part of the training time that was spent waiting for data."""
        return self.data / self.train if self.train else 0.0


@dataclasses.dataclass(frozen=True)
class Several:
    """Programs that take several steps in one call, for steps that take little longer than the call.

    They take the steps from m K to (m + 1) K - 1, for whole m: which program does a step doesn't depend
    on where the run was stopped before. It does depend on K, on which steps need the state, and on where
    the run ends; with other ones the numbers are the same to rounding.

    Attributes:
        num_steps: K, at least 2.
        programs: `program(state, batches) -> (state, metrics)` by the step from which on, as fit's own;
            batches and metrics have an axis of K in front.
        needs_state: `needs_state(step)`: whether a hook needs the state after so many steps. Those in
            between get the state after the K-th.
    """

    num_steps: int
    programs: Mapping[int, TrainStep]
    needs_state: Callable[[int], bool]

    def fits(self, i: int, end: int) -> bool:
        """Whether the steps from i on can be done in one call, in a run of so many steps."""
        between = range(i + 1, i + self.num_steps)
        return (
            i % self.num_steps == 0
            and between.stop <= end
            and not any(self.needs_state(step) or step in self.programs for step in between)
        )


def fit(
    train_step: TrainStep,
    state: TrainState,
    batches: Indexed,
    *,
    hooks: Sequence[Hook] = (),
    clock: Clock | None = None,
    later: Mapping[int, TrainStep] | None = None,
    several: Several | None = None,
    beat: Callable[[str], None] = lambda section: None,
) -> tuple[TrainState, str | None]:
    """Train from `state.step` to the end of `batches`.

    The position in the data follows from the state alone, so a restored state goes on exactly.

    Args:
        train_step: compiled, `train_step(state, batch) -> (state, metrics)`.
        state: used up.
        batches: `batches[i]` is the batch, or the draw, of step i.
        hooks: each is called after every step as `hook(step, state, metrics)`: the number of steps
            done, the state after them, and `StepMetrics`. It may read the state but not keep it. If it
            returns a string the run stops there.
        clock: where to add up the time.
        later: what to call instead of `train_step`, by the step, counted from 0, from which on.
        several: takes several steps in one call where nothing needs the state in between; the batches
            are arrays on the host then.
        beat: told what begins: "data", "compile", "step" with the hooks after it, and "end".

    Returns:
        the state, and the reason why a hook stopped the run, or None.

    Raises:
        NonFiniteError: if the loss or the gradients of a step weren't finite; it has the state from
            before that step.
    """
    clock = clock or Clock()
    programs = {0: train_step, **(later or {})}
    i, end = int(state.step), len(batches)
    previous, known, stop = None, set(), None
    try:
        while i < end:
            begin = max(begin for begin in programs if begin <= i)
            count = several.num_steps if several and several.fits(i, end) else 1
            program = several.programs[begin] if several and count > 1 else programs[begin]
            start = time.perf_counter()
            # 1. Draw the batch, or several.
            beat("data")
            batch = batches[i] if count == 1 else stack([batches[i + k] for k in range(count)])
            drawn = time.perf_counter()
            kind = id(program), shapes_of(batch)
            is_new = kind not in known
            known.add(kind)
            if is_new and previous is not None:
                previous.check()  # or its time would be taken for compilation
            handed = time.perf_counter()
            # 2. Dispatch; the device works while we go on.
            beat("compile" if is_new else "step")
            state, values = program(state, batch)
            index = batch.get("index") if isinstance(batch, Mapping) else None
            if isinstance(index, jax.Array) and not index.is_fully_addressable:
                index = None  # no process knows all of it
            if is_new:
                jax.block_until_ready(values)
                beat("step")
            dispatched = time.perf_counter()
            if is_new:
                clock.compile += drawn - start + dispatched - handed
                clock.first_step = clock.first_step or dispatched
            places = [None] if count == 1 else range(count)
            done = [
                StepMetrics(i + k + 1, values, index, clock, place, k + 1 == count)
                for k, place in enumerate(places)
            ]
            i += count
            if not is_new:
                clock.data += drawn - start
                clock.dispatch += dispatched - handed
                clock.steps += count
            # 3. Read the guard of the step before these: late, so that the device always has work.
            if previous is not None:
                previous.check()
            previous = done[-1]
            checked, waited = time.perf_counter(), clock.wait
            # 4. Call the hooks.
            reasons = [hook(metrics.step, state, metrics) for metrics in done for hook in hooks]
            stop = next((reason for reason in reasons if reason), None)
            clock.hooks += time.perf_counter() - checked - (clock.wait - waited)
            if stop:
                break
        if previous is not None:
            previous.check()
        beat("end")
        return state, stop
    except errors.NonFiniteError as error:
        # Steps after the faulty one, of which there may be some, have changed nothing.
        error.state = state
        raise


def stack(batches: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Batches, or draws, of equal shapes as one with an axis in front."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
