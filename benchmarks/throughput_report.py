"""The suite's records as a Markdown table and as a picture."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxnets.interop.duel_report import where

_COLUMNS = (
    "workload",
    "parity",
    "ratio (quartiles)",
    "jaxnets, examples/s (quartiles)",
    "PyTorch's best, examples/s (quartiles)",
    "plain JAX, examples/s",
    "of the ceiling, both",
    "first step: cold, warm, PyTorch",
    "peak MiB, both",
)

Records = Mapping[str, Mapping[str, Any]]


def table(records: Records) -> str:
    """The records as Markdown.

    Args:
        records: by the name of the workload, as `benchmarks.throughput` writes them.
    """
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    for name, record in records.items():
        cells = [f"failed: {record['failure']}"] if "failure" in record else _cells(record)
        cells += [""] * (len(_COLUMNS) - 1 - len(cells))
        lines.append("| " + " | ".join([name, *(cell.replace("|", "/") for cell in cells)]) + " |")
    done = [record for record in records.values() if "failure" not in record]
    for modes in (("train",), ("inference",), ("train", "inference")):
        ratios = [record["ratio"] for record in done if record["mode"] in modes]
        if ratios and {record["mode"] for record in done} >= set(modes):
            mean, named = geometric_mean(ratios), " and ".join(modes)
            least = min(ratios)
            lines += ["", f"Geometric mean of {len(ratios)} in {named}: {mean:.2f}, least {least:.2f}"]
    if done:
        lines += ["", *_conditions(done)]
    return "\n".join(lines) + "\n"


def _cells(record: Mapping[str, Any]) -> list[str]:
    ours, theirs, plain = record["jaxnets"], record["torch"], record["plain_jax"]
    low, high = record["ratio_spread"]["quartiles"]
    steps = record["parity"]["num_steps"]
    return [
        f"{steps} steps",
        f"**{record['ratio']:.2f}** ({low:.2f} to {high:.2f})",
        f"{_speed(ours)}, {_threads(ours)}",
        f"{_speed(theirs)}, {theirs['best']}",
        f"{plain['examples_per_second']:,.0f}",
        f"{ours['share_of_ceiling']:.0%}, {theirs['share_of_ceiling']:.0%}",
        f"{ours['first_step_seconds']:.2f}, {_warm(record)}, {theirs['first_step_seconds']:.2f} s",
        f"{ours['peak_memory_bytes'] / 2**20:,.0f}, {theirs['peak_memory_bytes'] / 2**20:,.0f}",
    ]


def _warm(record: Mapping[str, Any]) -> str:
    return f"{record['warm']['first_step_seconds']:.2f}" if record["warm"] else "not warm"


def _threads(side: Mapping[str, Any]) -> str:
    return side["best"].partition(", ")[2]


def _speed(side: Mapping[str, Any]) -> str:
    low, high = side["spread"]["quartiles"]
    return f"{side['examples_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def _conditions(done: list[Mapping[str, Any]]) -> list[str]:
    first = done[0]
    settings = first["jaxnets"]["settings"]
    peaks = sorted(record["ceiling"]["flops"] / 1e9 for record in done)
    copies = sorted(record["ceiling"]["bytes_per_second"] / 1e9 for record in done)
    threads = sorted(record["ceiling"]["speedup_by_threads"] for record in done)
    by_threads = ""
    if first["device"] == "cpu":
        by_threads = f" (with all threads {threads[0]:.2f} to {threads[-1]:.2f} times one's)"
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return [
        f"{where(first)}; {versions}; {settings['compute_dtype']}, matmul precision "
        f"{settings['matmul_precision']} on both sides, generated data. Ceiling: a product at "
        f"{peaks[0]:,.0f} to {peaks[-1]:,.0f} GFLOP/s{by_threads}, a copy at {copies[0]:.0f} to "
        f"{copies[-1]:.0f} GB/s."
    ]


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios.

    Example:
        >>> round(geometric_mean([1.0, 4.0]), 6)
        2.0
    """
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def draw(records: Records, path: Path) -> None:
    """Draw the ratios, and beside them the speeds of all three, each against PyTorch's.

    Args:
        records: by the name of the workload; those that failed are left out.
        path: of the PNG; nothing is written if all of them failed.
    """
    done = {name: record for name, record in records.items() if "failure" not in record}
    if not done:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.6 * len(done)), layout="constrained")
    axes = figure.subplots()
    for row, record in enumerate(done.values()):
        best = record["torch"]["examples_per_second"]
        low, high = record["ratio_spread"]["quartiles"]
        ratio = record["ratio"]
        plain = record["plain_jax"]["examples_per_second"] / best
        error = [[max(0.0, ratio - low)], [max(0.0, high - ratio)]]
        color = "tab:green" if ratio >= 1 else "tab:red"
        axes.barh(row, ratio, 0.4, xerr=error, color=color, capsize=3)
        axes.barh(row + 0.35, plain, 0.2, color="tab:gray")
        axes.annotate(
            f"{ratio:.2f}  ({record['jaxnets']['examples_per_second']:,.0f} against {best:,.0f}/s)",
            (max(ratio, high), row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(done)), list(done))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * axes.dataLim.xmax)  # room for the labels
    axes.set_xlabel("speed, PyTorch's best variant = 1 (thin and grey: plain JAX)")
    figure.savefig(path, dpi=120)
