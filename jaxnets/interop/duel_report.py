"""The figures of a duel: as JSON holds them, and as a table."""

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxnets.interop.contender import Contender
from jaxnets.version import __version__


def best_of(contenders: Sequence[Contender]) -> Contender:
    """The fastest of those that were timed in rounds, by the median."""
    timed = [contender for contender in contenders if contender.is_open]
    return max(timed, key=lambda contender: float(np.median(contender.rounds)))


def most_threads(contenders: Sequence[Contender]) -> Contender:
    """Of those that were timed in rounds, the one with the most threads."""
    timed = [contender for contender in contenders if contender.is_open]
    return max(timed, key=lambda contender: contender.facts["settings"]["threads"])


def assemble(
    groups: Mapping[str, Sequence[Contender]],
    again: Contender,
    failed: Mapping[str, str],
    ceiling: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Put the figures together.

    Args:
        groups: "ours", JAX's; "plain", JAX's in the plain form; "torch", PyTorch's variants. At least
            one of each, of which some may have been screened only.
        again: JAX's best once more, which should have found its programs in a cache.
        failed: PyTorch's variants that could not run, with the reason.
        ceiling: what each side's product and copy reached.

    Returns:
        "jaxnets", "plain_jax", "torch", "ratio" (JAX's median over that of PyTorch's best variant,
        above 1 if JAX is faster), "ratio_spread" (of the rounds, each of which timed both),
        "ratio_to_plain" (over the plain form's median), "warm" (None if the cache gave nothing),
        "ceiling", "device", "processor", "versions".
    """
    ours, best, plain = best_of(groups["ours"]), best_of(groups["torch"]), groups["plain"][0]
    pairs = np.divide(ours.rounds, best.rounds)
    table = {name: {one.name: figures(one) for one in groups[name]} for name in ("ours", "torch")}
    for name, rows in table.items():
        for one in groups[name]:
            rows[one.name]["dropped_after_screening"] = not one.is_open
    table["torch"] |= {name: {"failed": reason} for name, reason in failed.items()}
    settings = dict(best.facts["settings"])

    def figures_of(group: str, one: Contender) -> dict[str, Any]:
        rows = table[group]
        return {"best": one.name, **rows[one.name], "variants": rows, "settings": one.facts["settings"]}

    return {
        "jaxnets": figures_of("ours", ours),
        "plain_jax": figures(plain) | {"settings": plain.facts["settings"]},
        "torch": figures_of("torch", best),
        "ratio": _quotient(ours, best),
        "ratio_spread": _spread(pairs, digits=4),
        "ratio_to_plain": _quotient(ours, plain),
        "warm": {
            name: round(again.facts[name], 3)
            for name in ("first_step_seconds", "seconds_to_first_steps", "cache_hits")
        }
        if again.facts["cache_hits"]
        else None,
        "ceiling": {
            "flops": round(max(side["flops"] for side in ceiling.values())),
            "bytes_per_second": round(max(side["bytes"] for side in ceiling.values())),
            # Near the number of cores; near 1 where they are two threads of one.
            "speedup_by_threads": round(
                ceiling["torch"]["flops"] / ceiling["torch"]["one_thread_flops"], 3
            ),
            "sides": ceiling,
        },
        "device": ours.facts["settings"]["device_kind"],
        "processor": processor(),
        "versions": {
            "jaxnets": __version__,
            **ours.facts["settings"]["versions"],
            **settings["versions"],
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def add_shares(report: dict[str, Any], flops_per_example: float) -> None:
    """Add what each side's model FLOPs are of the faster side's matrix product, in [0, 1] or about."""
    report["flops_per_example"] = round(flops_per_example)
    for side in ("jaxnets", "plain_jax", "torch"):
        rate = report[side]["examples_per_second"] * flops_per_example
        report[side]["share_of_ceiling"] = round(rate / report["ceiling"]["flops"], 4)


def _quotient(left: Contender, right: Contender) -> float:
    return round(float(np.median(left.rounds) / np.median(right.rounds)), 4)


def figures(contender: Contender) -> dict[str, Any]:
    """What was measured of one contender."""
    memory = contender.facts["memory"]
    return {
        "examples_per_second": round(float(np.median(contender.rounds)), 1),
        "spread": _spread(np.asarray(contender.rounds), digits=1),
        "rounds": len(contender.rounds),
        "steps_per_round": contender.steps,
        "first_step_seconds": round(contender.facts["first_step_seconds"], 3),
        "seconds_to_first_steps": round(contender.facts["seconds_to_first_steps"], 3),
        "peak_memory_bytes": contender.facts["device_peak_bytes"] or contender.facts["peak_bytes"],
        "peak_memory_of": "device" if contender.facts["device_peak_bytes"] else "process",
        "memory_after_imports_bytes": memory["after_imports_bytes"],
        "memory_loaded_bytes": memory["loaded_bytes"],
        "first_values": [values[:10] for values in contender.facts["first_values"]],
        "rounds_examples_per_second": [round(rate, 1) for rate in contender.rounds],
        "off_by": contender.facts["gradients"]["off_by"],
        "threads": contender.facts["settings"]["threads"],
        "optimizer": contender.facts["settings"].get("optimizer", "Optax"),
    }


def print_table(report: Mapping[str, Any]) -> None:
    """Print the figures for people, on standard output."""
    settings = report["jaxnets"]["settings"]
    title = (
        f"{report['experiment']}, {report['mode']}, {report.get('model') or ''} "
        f"at batch {settings['batch_size']}, "
        f"{settings['compute_dtype']}, matmul precision {settings['matmul_precision']}, "
        f"{where(report)}"
    )
    table = Table(title=title, caption_justify="left", title_justify="left")
    table.add_column("contender")
    for name in ("examples/s", "quartiles", "first step s", "peak MiB", "imports MiB"):
        table.add_column(name, justify="right")
    ours, best = report["jaxnets"]["best"], report["torch"]["best"]
    rows = {**report["jaxnets"]["variants"], "plain JAX": report["plain_jax"]}
    rows |= {f"PyTorch {name}": row for name, row in report["torch"]["variants"].items()}
    for name, row in rows.items():
        if "failed" in row:
            table.add_row(name, "failed", "see duel.json", "", "", "")
            continue
        low, high = row["spread"]["quartiles"]
        is_dropped = row.get("dropped_after_screening")
        table.add_row(
            name,
            f"{row['examples_per_second']:,.0f}",
            "screened only" if is_dropped else f"{low:,.0f} - {high:,.0f}",
            f"{row['first_step_seconds']:.2f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            f"{row['memory_after_imports_bytes'] / 2**20:,.0f}",
            style="bold" if name in (ours, f"PyTorch {best}") else "",
        )
    # Redirected output has no width of its own; a table that is cut can't be read.
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    low, high = report["ratio_spread"]["quartiles"]
    print(
        f"{ours} / best PyTorch ({best}): {report['ratio']:.3f} (quartiles of the rounds {low:.3f} - "
        f"{high:.3f}); / plain JAX: {report['ratio_to_plain']:.3f}"
    )
    ceiling, warm = report["ceiling"], report["warm"]
    print(
        f"of the machine's {ceiling['flops'] / 1e9:,.0f} GFLOP/s (a product; one thread "
        f"{1 / ceiling['speedup_by_threads']:.2f} of it) jaxnets uses "
        f"{report['jaxnets']['share_of_ceiling']:.0%}, PyTorch "
        f"{report['torch']['share_of_ceiling']:.0%}; first step with programs from the cache: "
        + (f"{warm['first_step_seconds']:.2f} s" if warm else "it gave none")
    )


def processor() -> str:
    """The processor's name, family and cores, as the system tells."""
    info = Path("/proc/cpuinfo")
    found: dict[str, list[str]] = {}
    for line in info.read_text().splitlines() if info.exists() else []:
        field, _, value = line.partition(":")
        found.setdefault(field.strip(), []).append(value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    # Virtual machines call the processors of several generations by one name.
    family = f" (family {found['cpu family'][0]})" if "cpu family" in found else ""
    return f"{found['model name'][0]}{family}, {len(found['model name'])} cores"


def where(report: Mapping[str, Any]) -> str:
    """What it was measured on: the processor, or the accelerator."""
    return report["processor"] if report["device"] == "cpu" else report["device"]


def _spread(values: np.ndarray, *, digits: int) -> dict[str, Any]:
    low, high = np.percentile(values, [25, 75])
    return {
        "quartiles": [round(float(low), digits), round(float(high), digits)],
        "min": round(float(np.min(values)), digits),
        "max": round(float(np.max(values)), digits),
    }
