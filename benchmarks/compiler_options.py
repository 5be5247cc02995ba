"""A whole training step under XLA's compiler options for a CPU, one beside the other.

    python -m benchmarks.compiler_options --out runs/options

Generated images of CIFAR-10's shape, models and steps of the library, one device. Every option is
compiled from the same program, all start from the same state, their turns are interleaved in rotating
order, and freed memory is kept, as in the duel. After each workload `options.json` and `options.md` are
written: median and quartiles of a step, the ratio to what training uses now (of the same rounds; above 1
is faster), the time of compilation, and by how much the first update differs from that under XLA's
defaults, as a share. An option that this jaxlib doesn't know is listed as refused. A set that is the
same as training's shares its program, so its ratio shows the noise. Run it on an idle machine; two cores
take about 25 minutes.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import optax
import tyro

from jaxnets import errors, losses, models, ops, registry, train
from jaxnets.allocator import keep_freed_memory
from jaxnets.config import read_words
from jaxnets.data import Batches
from jaxnets.defects import YNN_OPTION
from jaxnets.interop.duel_report import processor
from jaxnets.train import mesh, programs
from jaxnets.version import __version__

WORKLOADS = {
    "lenet-4": ("lenet", 4),
    "lenet-128": ("lenet", 128),
    "mlp-128": ("mlp", 128),
    "speednet-64": ("speednet", 64),
    "resnet18-32": ("resnet18", 32),
}
NOW = "training"
_NUM_EXAMPLES = 10_000


def _ynn(*kinds: str) -> dict[str, Any]:
    return {YNN_OPTION: ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)}


_TRAINING = programs.CPU_OPTIONS
_FAST = {"xla_cpu_enable_fast_math": True}
_HONOR = ("nans", "infs", "division", "functions")

# What isn't about YNNPACK comes on top of what training uses. Fast math changes numbers by design.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    NOW: _TRAINING,
    "ynn none": _ynn(),
    "ynn dot": _ynn("INDIVIDUAL_DOT"),
    "ynn dot, reduce": _ynn("INDIVIDUAL_DOT", "REDUCE"),
    "ynn reduce": _ynn("REDUCE"),
    "ynn dot, reduce, convolution": _ynn("INDIVIDUAL_DOT", "REDUCE", "INDIVIDUAL_CONVOLUTION"),
    "ynn fused dot, elementwise, reduce": _ynn("DOT", "ELTWISE", "REDUCE"),
    "vectors of 256": _TRAINING | {"xla_cpu_prefer_vector_width": 256},
    "vectors of 512": _TRAINING | {"xla_cpu_prefer_vector_width": 512},
    "exact min and max": _TRAINING | {"xla_cpu_enable_fast_min_max": False},
    "fast math, all honored": _TRAINING | _FAST | {f"xla_cpu_fast_math_honor_{x}": True for x in _HONOR},
    "fast math": _TRAINING | _FAST | {f"xla_cpu_fast_math_honor_{x}": False for x in _HONOR},
    "schedule for memory": _TRAINING | {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "schedule for concurrency": (
        _TRAINING | {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"}
    ),
    "copies by region": _TRAINING | {"xla_cpu_copy_insertion_use_region_analysis": True},
    "one thread for Eigen": _TRAINING | {"xla_cpu_multi_thread_eigen": False},
    "old fusion emitters": _TRAINING | {"xla_cpu_use_fusion_emitters": False},
    "platform's own math off": _TRAINING | {"xla_cpu_enable_platform_dependent_math": False},
}
CHANGES_NUMBERS = ("fast math, all honored", "fast math")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time a training step under XLA's compiler options."""

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A workload, such as lenet-4; may be repeated. All by default."""
    options: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A set of options, such as "ynn dot"; may be repeated. The defaults and what training uses are
    always there; all by default."""
    rounds: int = 11
    """Turns of every set of options."""
    seconds: float = 1.0
    """How long a turn takes, at least one step."""
    out: Path | None = None
    """Folder for options.json and options.md."""


@dataclasses.dataclass
class Contender:
    """One set of options, compiled, with a state of its own."""

    name: str
    step_fn: Callable[[Any, Mapping[str, Any]], tuple[Any, Any]]
    state: Any
    compile_seconds: float
    num_done: int = 1
    times: list[float] = dataclasses.field(default_factory=list)

    def take(self, num_steps: int, batches: Batches) -> float:
        """Seconds for some steps, the last one's end included."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.state, values = self.step_fn(self.state, batches[self.num_done])
            self.num_done += 1
        jax.block_until_ready((self.state, values))
        return time.perf_counter() - start


def make_program(model: str) -> tuple[Callable, Callable, dict[str, np.ndarray]]:
    """The step `(state, arrays, draw) -> (state, values)`, what makes its state, and the data."""
    build = registry.get("model", model)
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init_fn, apply_fn = models.functional(build(num_classes=10), example)

    def loss_fn(params: Any, model_state: Any, batch: Any, *, key: Any):
        x_BHWC, rows, mask = ops.normalize_images(batch["image"]), batch["index"], batch["mask"]
        logits_BV, model_state = apply_fn(
            params, model_state, x_BHWC, train=True, key=key, rows=rows, mask=mask
        )
        return {"loss": losses.softmax_cross_entropy(logits_BV, batch["label"])}, model_state, {}

    tx = optax.sgd(0.001, momentum=0.9)
    step = train.make_train_step(loss_fn, tx)

    def gathered(state: Any, arrays: Any, draw: Any):
        return step(state, mesh.gather_rows(arrays, draw))

    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (_NUM_EXAMPLES, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, _NUM_EXAMPLES, np.int32),
    }
    return gathered, partial(train.create_state, init_fn, tx, key=jax.random.key(0)), arrays


def measure(workload: str, names: Sequence[str], arguments: Arguments) -> dict[str, Any]:
    """The figures of every set of options on one workload."""
    model, batch_size = WORKLOADS[workload]
    step, make_state, arrays = make_program(model)
    resident = jax.device_put(arrays)
    batches = Batches(_NUM_EXAMPLES, batch_size, num_positions=2**40)
    initial = jax.jit(make_state)()
    before = jax.tree.map(np.asarray, initial.params)
    contenders: list[Contender] = []
    figures: dict[str, Any] = {}
    expected = None
    for name in names:
        state = jax.tree.map(jnp.copy, initial)
        jitted = jax.jit(step, donate_argnums=0, compiler_options=OPTIONS[name] or None)
        start = time.perf_counter()
        try:
            state, values = jax.block_until_ready(jitted(state, resident, batches[0]))
        except jax.errors.JaxRuntimeError as error:
            figures[name] = {"refused": str(error).splitlines()[0]}
            print(f"{workload}: {name}: {figures[name]['refused']}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - start
        params = jax.tree.map(np.asarray, state.params)
        expected = params if expected is None else expected
        figures[name] = {
            "loss": float(values["loss"]),
            "difference": difference(params, expected, before),
            "compile_seconds": round(seconds, 2),
        }
        run = lambda state, draw, jitted=jitted: jitted(state, resident, draw)  # noqa: E731
        contenders.append(Contender(name, run, state, seconds))
        print(f"{workload}: {name}: compiled in {seconds:.1f} s", file=sys.stderr)
    counts = {}
    for contender in contenders:  # a first turn that doesn't count says how many steps a turn has
        contender.take(1, batches)
        counts[contender.name] = max(1, round(arguments.seconds / contender.take(2, batches) * 2))
    for i in range(arguments.rounds):
        for k in range(len(contenders)):
            contender = contenders[(i + k) % len(contenders)]
            num_steps = counts[contender.name]
            contender.times.append(contender.take(num_steps, batches) / num_steps)
    now = next((np.array(c.times) for c in contenders if c.name == NOW), None)
    for contender in contenders:
        times = np.array(contender.times)
        figures[contender.name] |= {
            "milliseconds": _quartiles(times * 1e3),
            "ratio": _quartiles(now / times) if now is not None else None,
            "times": [round(x, 7) for x in contender.times],
        }
    return {"model": model, "batch_size": batch_size, "options": figures}


def difference(params: Any, expected: Any, initial: Any) -> float:
    """How far an update is from the expected one: the norm of their difference, over the latter's."""

    def norm(trees: tuple[Any, Any]) -> float:
        pairs = zip(*map(jax.tree.leaves, trees), strict=True)
        return float(np.sqrt(sum(np.square(a.astype(np.float64) - b).sum() for a, b in pairs)))

    return float(f"{norm((params, expected)) / norm((expected, initial)):.2g}")


def _quartiles(values: Any) -> list[float]:
    """The median, and the quartiles."""
    return [round(float(x), 4) for x in np.percentile(values, [50, 25, 75])]


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a page of tables."""
    versions = report["versions"]
    lines = [
        "# A training step under XLA's compiler options",
        "",
        f"jaxlib {versions['jaxlib']}, Python {versions['python']}, jaxnets {versions['jaxnets']}; "
        f"{report['processor']}; {report['rounds']} interleaved rounds of {report['seconds']:g} s. "
        f'Ratios are to "{NOW}" ({_words(_TRAINING)}), round by round; above 1 is faster.',
    ]
    for name, workload in report["workloads"].items():
        lines += [
            "",
            f"## {name}",
            "",
            "| options | ms a step (quartiles) | ratio (quartiles) | compiled in | update off by |",
            "| --- | --- | --- | --- | --- |",
        ]
        for option, row in workload["options"].items():
            if "refused" in row:
                lines.append(f"| {option} | refused: {row['refused']} | | | |")
                continue
            label = f"{option} (changes numbers)" if option in CHANGES_NUMBERS else option
            median, low, high = row["milliseconds"]
            ratio, ratio_low, ratio_high = row["ratio"]
            lines.append(
                f"| {label} | {median:.3f} ({low:.3f} to {high:.3f}) "
                f"| {ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f}) "
                f"| {row['compile_seconds']:.1f} s | {row['difference']:.1g} |"
            )
    lines += ["", "## What the names stand for", ""]
    lines += [f"- {name}: {_words(OPTIONS[name])}" for name in OPTIONS]
    return "\n".join(lines) + "\n"


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in options.items()) or "nothing given"


def main(argv: list[str]) -> int:
    """Measure, print and write; the exit status."""
    try:
        arguments = read_words(Arguments, argv, prog="python -m benchmarks.compiler_options")
        for name in arguments.only:
            if name not in WORKLOADS:
                raise errors.unknown("workload", name, WORKLOADS)
        for name in arguments.options:
            if name not in OPTIONS:
                raise errors.unknown("set of options", name, OPTIONS)
        if arguments.rounds < 1 or arguments.seconds <= 0:
            raise errors.ConfigError("rounds and seconds must be more than 0")
        keep_freed_memory()  # before JAX starts threads
        if jax.default_backend() != "cpu":
            raise errors.ConfigError("these options are for a CPU: set JAX_PLATFORMS=cpu")
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Compilation is part of the report, so it isn't taken from a cache.
    jax.config.update("jax_enable_compilation_cache", False)
    chosen = ("default", NOW, *arguments.options) if arguments.options else tuple(OPTIONS)
    report: dict[str, Any] = {
        "versions": {
            "jaxnets": __version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "python": platform.python_version(),
        },
        "processor": processor(),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "compiler_options": OPTIONS,
        "workloads": {},
    }
    for workload in arguments.only or WORKLOADS:
        names = [name for name in OPTIONS if name in chosen]
        report["workloads"][workload] = measure(workload, names, arguments)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "options.json").write_text(json.dumps(report, indent=1) + "\n")
            (arguments.out / "options.md").write_text(format_report(report))
    print(format_report(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
