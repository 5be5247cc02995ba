"""Known defects of recent jaxlib releases: which versions have them, and whether this one does.

A defect of values has a check: a small program whose result is compared with NumPy's. Those that crash
the process or only cost time aren't run; they go by version. JAX is imported when a check runs, not
before.
"""

import dataclasses
import math
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

YNN_OPTION = "xla_cpu_experimental_ynn_fusion_type"
"""The compiler option that names what XLA hands to the library YNNPACK on a CPU."""

TRIED = ("0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1")
"""The jaxlib releases on which all of this was tried, crashes and speed included, on x86-64."""

Run = Callable[..., Any]
"""`run(fn, *arrays)` compiles a function, calls it and returns its array."""


@dataclasses.dataclass(frozen=True)
class Defect:
    """A defect of jaxlib.

    Attributes:
        name: as it is called here.
        kind: "values" (wrong numbers), "crash" or "speed".
        effect: what goes wrong, in one line.
        versions: the jaxlib releases known to have it.
        platforms: of JAX, such as "cpu".
        avoid: what a program of one's own can do.
        source: where it was reported.
        machines: the processors known to have it; empty for all.
        is_reduction: whether it lies in YNNPACK's reductions, which XLA_FLAGS can switch off.
        num_devices: how many it takes to see it.
        check: `check(run) -> (result, expected)`, two arrays that are equal where all is well.
        meets: whether a YNNPACK fusion, in the text of a compiled program, is one that has it.
    """

    name: str
    kind: str
    effect: str
    versions: tuple[str, ...]
    platforms: tuple[str, ...]
    avoid: str
    source: str
    machines: tuple[str, ...] = ()
    is_reduction: bool = False
    num_devices: int = 1
    check: Callable[[Run], tuple[Any, np.ndarray]] | None = None
    meets: Callable[[str], bool] | None = None

    def is_known(self, version: str, backend: str, machine: str | None = None) -> bool:
        """Whether a jaxlib version is listed with it, on a platform of JAX and a processor."""
        is_here = not self.machines or (machine or platform.machine()) in self.machines
        return version in self.versions and backend in self.platforms and is_here

    def is_avoided(self, *, is_guarded: bool = False) -> bool:
        """Whether it is kept out: by the guard on compiled programs, or else by the user's XLA_FLAGS."""
        if is_guarded:
            return self.meets is not None
        found = re.search(rf"--{YNN_OPTION}=(\S*)", os.environ.get("XLA_FLAGS", ""))
        is_off = found is not None and (not found[1] or "-reduce" in found[1].split(","))
        return self.is_reduction and is_off


def find(defect: Defect, run: Run) -> bool:
    """Run a defect's check; whether the result is wrong."""
    assert defect.check is not None, defect.name
    result, expected = defect.check(run)
    return not np.array_equal(np.asarray(result), expected)


def has_faulty_fusions(version: str) -> bool:
    """Whether programs compiled by a jaxlib version are worth a look by `faulty_fusions`."""
    return any(defect.meets and version in defect.versions for defect in DEFECTS)


def faulty_fusions(program: str, version: str) -> list[str]:
    """The defects that a compiled program meets.

    Args:
        program: its text, as `jax.jit(fn).lower(*arrays).compile().as_text()`.
        version: of jaxlib.

    Returns:
        their names.
    """
    # Computations begin at the margin, their instructions don't; a fusion names its computation.
    computations = {text.split(" ", 1)[0]: text for text in re.split(r"\n(?=[%E])", program)}
    lines = [line for line in program.splitlines() if '"__ynn_fusion"' in line]
    fusions = [computations.get(name, "") for name in re.findall(r"calls=(%[^\s,]+)", "\n".join(lines))]
    return [
        defect.name
        for defect in DEFECTS
        if defect.meets and version in defect.versions and any(map(defect.meets, fusions))
    ]


def warning(version: str, backend: str, *, is_guarded: bool, machine: str | None = None) -> str | None:
    """The line for a user whose jaxlib gives wrong numbers or crashes; None if it isn't known to.

    Args:
        version: of jaxlib.
        backend: the platform of JAX that the run uses, such as "cpu".
        is_guarded: whether the run looks at its programs, as those on a CPU do but for `--no-jit`.
        machine: the processor; this one by default.

    Example:
        >>> warning("0.9.0", "cpu", is_guarded=False) is None
        True
    """
    known = [d for d in DEFECTS if d.kind != "speed" and d.is_known(version, backend, machine)]
    if not known:
        return None
    avoided = [d.name for d in known if d.is_avoided(is_guarded=is_guarded)]
    others = [d.name for d in known if d.name not in avoided]
    parts = [f"jaxlib {version} has known defects on this platform"]
    if avoided:
        parts.append(f"training avoids {', '.join(avoided)}")
    if others:
        parts.append(f"the models here don't meet {', '.join(others)}, code of yours may")
    return "; ".join(parts) + ": python -m jaxnets doctor says what each is and what avoids it"


def is_news(line: str, folder: Path | None = None) -> bool:
    """Whether a line was never said on this machine; from now on it was.

    Args:
        line: of text.
        folder: where to remember it; $JAXNETS_CACHE or `~/.cache/jaxnets` by default. If that can't be
            read or written, the line is news.
    """
    try:
        folder = folder or Path(os.environ.get("JAXNETS_CACHE") or "~/.cache/jaxnets").expanduser()
        file = folder / "said.txt"
        if file.exists() and line in file.read_text().splitlines():
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(line + "\n")
    except (OSError, RuntimeError, UnicodeError):  # RuntimeError: there is no home
        pass
    return True


@dataclasses.dataclass(frozen=True)
class Finding:
    """What there is to say of one defect on this machine.

    Attributes:
        defect: which.
        is_here: whether programs that JAX compiles by default have it.
        in_training: whether those of training have it.
        how: "checked", "by version", or "by version: " and why it wasn't checked.
    """

    defect: Defect
    is_here: bool
    in_training: bool
    how: str


def examine(version: str, backend: str, run: Run, *, is_guarded: bool) -> list[Finding]:
    """Run every check, as JAX compiles by default and as training does.

    Args:
        version: of jaxlib, for what goes by version.
        backend: the platform of JAX.
        run: compiles and calls a function as training does.
        is_guarded: whether training looks at its programs.
    """
    import jax

    def by_default(fn: Callable, *arrays: Any) -> Any:
        return jax.jit(fn)(*arrays)

    findings = []
    for defect in DEFECTS:
        if defect.check and len(jax.devices()) >= defect.num_devices:
            found = find(defect, by_default), find(defect, run)
            findings.append(Finding(defect, *found, "checked"))
            continue
        is_known = defect.is_known(version, backend)
        is_here = is_known and not defect.is_avoided()
        in_training = is_known and not defect.is_avoided(is_guarded=is_guarded)
        how = f"by version: takes {defect.num_devices} devices" if defect.check else "by version"
        findings.append(Finding(defect, is_here, in_training, how))
    return findings


def format_findings(findings: Sequence[Finding]) -> str:
    """A table of all, then a paragraph for each that is here."""
    rows = [("defect", "kind", "here", "in training", "how", "reported in")]
    for finding in findings:
        defect = finding.defect
        here, training = ("AFFECTED" if x else "no" for x in (finding.is_here, finding.in_training))
        rows.append((defect.name, defect.kind, here, training, finding.how, defect.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for finding in findings:
        if finding.is_here or finding.in_training:
            defect = finding.defect
            lines += ["", f"{defect.name}: {defect.effect}", f"  instead: {defect.avoid}"]
    return "\n".join(lines)


def _integers(*shape: int) -> np.ndarray:
    """Small whole numbers, with which sums of products are exact."""
    return np.random.default_rng(0).integers(-3, 4, shape).astype(np.float32)


def _three_vectors(run: Run) -> tuple[Any, np.ndarray]:
    import jax
    import jax.numpy as jnp

    x_B3, matrix_33 = _integers(40_000, 3), _integers(3, 3)

    def squares(x_B3: Any, matrix_33: Any) -> Any:
        return jax.vmap(lambda x_3: jnp.sum((matrix_33 @ x_3) ** 2))(x_B3)

    return run(squares, x_B3, matrix_33), np.square(x_B3 @ matrix_33.T).sum(axis=1)


def _shifted_update(run: Run) -> tuple[Any, np.ndarray]:
    x = np.arange(128, dtype=np.int32).reshape(8, 16)

    def shift(x: Any) -> Any:
        y = x + np.int32(1)
        return y.at[1:].set(y[:-1]).reshape(1, 8, 16)

    return run(shift, x), np.concatenate([x[:1], x[:-1]])[None] + 1


def _slice_of_roll(run: Run) -> tuple[Any, np.ndarray]:
    import jax.numpy as jnp
    from jax import lax

    def cut(x: Any, shift: Any, start: Any) -> Any:
        return lax.dynamic_slice(jnp.roll(x, shift), [start], [4])

    x = np.arange(9, dtype=np.int32)
    # A slice that would reach past the end is moved back: 12 becomes 5.
    return run(cut, x, np.int32(4), np.int32(12)), np.roll(x, 4)[5:9]


def _sharded_update(run: Run) -> tuple[Any, np.ndarray]:
    import jax
    from jax import lax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    columns = NamedSharding(mesh, P(None, "x"))

    def update(x: Any, start: Any) -> Any:
        x = lax.with_sharding_constraint(x, columns)
        x = lax.dynamic_update_slice(x, np.full((2, 1), 9, np.int32), [np.int32(0), start])
        return lax.with_sharding_constraint(x, columns)

    x = jax.device_put(np.zeros((2, 2), np.int32), columns)
    start = jax.device_put(np.int32(2), NamedSharding(mesh, P()))
    return run(update, x, start), np.array([[0, 9], [0, 9]], np.int32)


# Of 2,600 sizes tried, in float32 and float64, those were wrong whose products sum over 3, 5, 6 or 7.
_NARROW = 8


def _sums_products(fusion: str) -> bool:
    """Whether it sums a product of matrices whose own sums are short."""
    shapes = dict(re.findall(r"(%[^\s,()]+) = \w+\[([\d,]*)\]", fusion))
    products = re.findall(r" dot\((%[^\s,()]+).*?lhs_contracting_dims=\{([\d,]*)\}", fusion)

    def size(operand: str, axes: str) -> int:
        lengths = [int(n) for n in shapes[operand].split(",") if n]
        return math.prod(lengths[int(axis)] for axis in axes.split(",") if axis)

    if " reduce(" not in fusion or " dot(" not in fusion:
        return False
    known = [operand in shapes for operand, _ in products]
    if len(products) != fusion.count(" dot(") or not all(known):
        return True  # not understood
    return any(size(*product) < _NARROW for product in products)


def _sums_rank_7(fusion: str) -> bool:
    return " reduce(" in fusion and re.search(r"\[\d+(,\d+){6,}\]", fusion) is not None


DEFECTS = (
    Defect(
        "three-vectors",
        "values",
        "a product of a matrix with many vectors of 3 (from 32,769 on), or in float64 of 3, 5, 6 or 7 "
        "(from 16,385 on), then a sum",
        versions=("0.10.2",),
        platforms=("cpu",),
        avoid=f"x @ matrix.T in place of vmap, or XLA_FLAGS=--{YNN_OPTION}=-reduce",
        source="jax#39103",
        is_reduction=True,
        check=_three_vectors,
        meets=_sums_products,
    ),
    Defect(
        "rank-7-sum",
        "crash",
        "a product of arrays of rank 7 or more, then a sum over one axis, ends or hangs the process",
        versions=("0.10.2", "0.11.0"),
        platforms=("cpu",),
        avoid=f"XLA_FLAGS=--{YNN_OPTION}=-reduce, or merge axes first",
        source="jax#39257, jax#40412",
        machines=("x86_64", "AMD64"),
        is_reduction=True,
        meets=_sums_rank_7,
    ),
    Defect(
        "shifted-update",
        "values",
        "x.at[1:].set(x[:-1]) and then a reshape that adds an axis in front",
        versions=TRIED,
        platforms=("cpu",),
        avoid="jnp.concatenate([x[:1], x[:-1]])",
        source="xla#49176",
        check=_shifted_update,
    ),
    Defect(
        "slice-of-roll",
        "values",
        "a dynamic slice, starting too far right, of a jnp.roll by a shift that isn't constant",
        versions=TRIED[:4],
        platforms=("cpu", "gpu"),
        avoid="jnp.clip the start to the length less the size of the slice",
        source="xla#49121",
        check=_slice_of_roll,
    ),
    Defect(
        "sharded-update",
        "values",
        "a dynamic update along a sharded axis that starts too far right is dropped",
        versions=TRIED,
        platforms=("cpu", "gpu"),
        avoid="jnp.clip the start to the length less the size of the update",
        source="xla#49118",
        num_devices=2,
        check=_sharded_update,
    ),
    Defect(
        "update-in-loop",
        "speed",
        "an update of under 256 bytes in a loop copies the whole array: lax.scan that stacks numbers",
        versions=("0.11.1",),
        platforms=("cpu",),
        avoid="keep sums in the carry, or stack rows of 256 bytes",
        source="jax#40101",
    ),
    Defect(
        "slice-then-sum",
        "speed",
        "sums over slices, such as differences of neighbours, take two to three times as long",
        versions=TRIED,
        platforms=("cpu",),
        avoid=f"XLA_FLAGS=--{YNN_OPTION}=-reduce",
        source="jax#37465",
        is_reduction=True,
    ),
)
"""Every known defect, the worst first."""
