"""Where the non-finite values of a computation come from: a jaxpr evaluated one operation at a time.

Of every value that isn't finite it is remembered which operation made it, of which non-finite operands.
From a result that isn't finite that leads back to where the first such value came from; others, such as
the infinities of an attention mask that never reach the result, aren't followed.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util  # which line of whose code an operation is from has no public name
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

TAG = "jaxnets/"
"""What the names begin with that `jax.ad_checkpoint.checkpoint_name` gives and `Walk` records."""

# Operations that do nothing but evaluate another jaxpr.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call"}
_FOREIGN = (str(Path(flax.__file__).parent), str(Path(__file__).with_name("replay.py")))
_SHOWN = 4  # operands of an operation
_LARGE = 10**6  # elements that aren't copied to the host to be looked at


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much of an array isn't finite.

    Attributes:
        nan: elements that are NaN.
        inf: elements that are infinite.
        size: elements in all.
        array: "dtype[shape]".
        rows: where along the leading axis, if that is as long as the batch.
    """

    nan: int
    inf: int
    size: int
    array: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        found = [f"{n:,} {name}" for n, name in ((self.nan, "NaN"), (self.inf, "Inf")) if n]
        return f"{' and '.join(found) or 'nothing'} of {self.size:,} in {self.array}"


def count(x: Any, num_rows: int | None = None) -> Counts | None:
    """What of an array isn't finite; None if all of it is, or it holds no floating-point numbers."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return None
    if np.size(x) > _LARGE and bool(jnp.all(jnp.isfinite(x))):
        return None
    x = np.asarray(x)  # and not a program for every shape
    is_nan, is_inf = np.isnan(x), np.isinf(x)
    is_bad = is_nan | is_inf
    if not is_bad.any():
        return None
    rows: tuple[int, ...] = ()
    if num_rows is not None and x.shape[:1] == (num_rows,):
        rows = tuple(np.flatnonzero(is_bad.reshape(num_rows, -1).any(1)).tolist())
    return Counts(int(is_nan.sum()), int(is_inf.sum()), x.size, f"{dtype}{list(x.shape)}", rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value that isn't finite.

    Attributes:
        counts: how much of it.
        label: of an argument its name, otherwise "".
        primitive: the operation that made it, "" for arguments and constants.
        scope: the name scopes in which that was traced.
        source: the line of code.
        operands: what it was made of, in words, where all of that was finite.
        parents: those of its operands that weren't.
    """

    counts: Counts
    label: str = ""
    primitive: str = ""
    scope: str = ""
    source: str = ""
    operands: tuple[str, ...] = ()
    parents: tuple["Node", ...] = ()
    is_constant: bool = False

    def chain(self) -> list["Node"]:
        """From the first non-finite value to this one."""
        chain: list[Node] = [self]
        while parent := chain[-1]._cause():
            chain.append(parent)
        return chain[::-1]

    def _cause(self) -> "Node | None":
        """The operand to blame: one with NaN rather than infinities; constants are meant to be so."""
        able = [parent for parent in self.parents if self.is_constant or not parent.is_constant]
        with_nan = [parent for parent in able if parent.counts.nan]
        return next(iter(with_nan if self.counts.nan and with_nan else able), None)


class Value(NamedTuple):
    """A value, what is known of it if it isn't finite, and the name of an argument."""

    x: Any
    node: Node | None = None
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Tag:
    """A non-finite value that was given a name.

    Attributes:
        name: without `TAG`.
        node: the value.
    """

    name: str
    node: Node


class Walk:
    """Evaluate jaxprs and remember; one for each evaluation.

    Args:
        num_rows: of the batch, to say in which rows a value isn't finite.

    Attributes:
        tags: of named values that weren't finite, in the order of evaluation.
    """

    def __init__(self, num_rows: int | None = None):
        self._num_rows = num_rows
        self.tags: list[Tag] = []

    def argument(self, x: Any, label: str) -> Value:
        """An argument of `run`."""
        counts = count(x, self._num_rows)
        return Value(x, None if counts is None else Node(counts, label), label)

    def run(self, closed: Any, args: Sequence[Value], scope: str = "") -> list[Value]:
        """Evaluate what `jax.make_jaxpr` gave."""
        consts = [self._constant(x) for x in closed.consts]
        return self._run(closed.jaxpr, consts, args, scope)

    def _constant(self, x: Any) -> Value:
        counts = count(x)
        return Value(x, None if counts is None else Node(counts, "a constant", is_constant=True))

    def _run(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], scope: str):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
        kept = set(_variables(jaxpr.outvars))

        def read(atom: Any) -> Value:
            return self._constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            inner = f"{scope}/{eqn.source_info.name_stack}"
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars], inner, jaxpr)
            known.update(zip(eqn.outvars, outs, strict=True))
            for var in {*_variables(eqn.invars), *_variables(eqn.outvars)} - kept:
                if last.get(var, i) == i:
                    known.pop(var, None)  # or everything would be held to the end
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Value], scope: str, outer: Any) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(params, ins, scope)
        if name == "while":
            return self._while(params, ins, scope)
        if name == "cond":
            branches = params["branches"]
            chosen = min(max(int(ins[0].x), 0), len(branches) - 1)
            return self.run(branches[chosen], ins[1:], scope)
        if name in _CALLS:
            return self.run(_called(params), ins, scope)
        if name == "name" and params["name"].startswith(TAG):
            if ins[0].node is not None:
                self.tags.append(Tag(params["name"].removeprefix(TAG), ins[0].node))
            return ins
        # A jaxpr of this equation alone: how one is evaluated is JAX's own business.
        given = {
            atom: value.x
            for atom, value in zip(eqn.invars, ins, strict=True)
            if not isinstance(atom, Literal)
        }
        alone = outer.replace(constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn])
        outs = jaxpr_as_fun(ClosedJaxpr(alone, []))(*given.values())
        return [Value(x, self._node(x, eqn, ins, scope)) for x in outs]

    def _node(self, x: Any, eqn: Any, ins: list[Value], scope: str) -> Node | None:
        counts = count(x, self._num_rows)
        if counts is None:
            return None
        parents = tuple(value.node for value in ins if value.node is not None)
        is_of_constants = all(node.is_constant for node in parents)
        # Infinity less infinity is an origin, though; what only hands on a constant isn't.
        is_handed_on = not counts.nan or any(node.counts.nan for node in parents)
        is_constant = bool(parents) and is_of_constants and is_handed_on
        operands: tuple[str, ...] = ()
        if is_of_constants:
            operands = tuple(_describe(value) for value in ins[:_SHOWN])
        source = _line_of(eqn.source_info)
        return Node(counts, "", eqn.primitive.name, scope, source, operands, parents, is_constant)

    def _again(self, x: Any, value: Value) -> Value:
        """A part of a value: it may be finite where the whole isn't."""
        is_bad = value.node is not None and count(x) is not None
        return Value(x, value.node if is_bad else None, value.label)

    def _scan(self, params: dict[str, Any], ins: list[Value], scope: str) -> list[Value]:
        of_consts, of_carry = _split(params, len(ins))
        first = of_consts + of_carry
        consts, carry, xs = ins[:of_consts], ins[of_consts:first], ins[first:]
        rounds = range(params["length"])
        collected: list[list[Value]] = []
        for i in reversed(rounds) if params["reverse"] else rounds:
            slices = [self._again(value.x[i], value) for value in xs]
            outs = self.run(params["jaxpr"], [*consts, *carry, *slices], scope)
            carry = outs[:of_carry]
            collected.append(outs[of_carry:])
        if not collected:
            avals = params["jaxpr"].out_avals[of_carry:]
            return [*carry, *(Value(jnp.zeros((0, *aval.shape), aval.dtype)) for aval in avals)]
        if params["reverse"]:
            collected.reverse()
        stacked = []
        for values in zip(*collected, strict=True):
            node = next((value.node for value in values if value.node is not None), None)
            stacked.append(Value(jnp.stack([value.x for value in values]), node))
        return [*carry, *stacked]

    def _while(self, params: dict[str, Any], ins: list[Value], scope: str) -> list[Value]:
        of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
        test, body = ins[:of_test], ins[of_test : of_test + of_body]
        carry = ins[of_test + of_body :]
        while bool(self.run(params["cond_jaxpr"], [*test, *carry], scope)[0].x):
            carry = self.run(params["body_jaxpr"], [*body, *carry], scope)
        return carry


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, Literal))


class _Open(NamedTuple):
    """A jaxpr without constants, as a closed one."""

    jaxpr: Any
    consts: Sequence[Any] = ()


def _split(params: dict[str, Any], num_operands: int) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(range(num_operands)).unpack()  # JAX 0.12
    return len(list(consts)), len(list(carry))


def _called(params: dict[str, Any]) -> Any:
    inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    return inner if hasattr(inner, "consts") else _Open(inner)


def _line_of(source_info: Any) -> str:
    """The innermost line of code that is neither JAX's nor Flax's nor of the replay."""
    frames = list(source_info_util.user_frames(source_info.traceback))
    frames = [frame for frame in frames if not frame.file_name.startswith(_FOREIGN)] or frames
    if not frames:
        return ""
    return f"{frames[0].file_name}:{frames[0].start_line} ({frames[0].function_name})"


def _describe(value: Value) -> str:
    x = value.x
    what = f"{value.label} " if value.label else ""
    if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.number):
        return what + f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"
    finite = np.asarray(x)[np.isfinite(x)] if jnp.issubdtype(x.dtype, jnp.inexact) else np.asarray(x)
    text = f"{what}{x.dtype}{list(x.shape)}"
    if not finite.size or jnp.issubdtype(x.dtype, jnp.complexfloating):
        return text
    low, high = (float(bound) for bound in (finite.min(), finite.max()))
    return text + (f" = {low:.3g}" if low == high else f" from {low:.3g} to {high:.3g}")


@contextlib.contextmanager
def on_one_device() -> Iterator[Any]:
    """While this is open, what is computed lies on this process's first device, which it gives."""
    device = jax.local_devices()[0]
    with jax.default_device(device):
        yield device
