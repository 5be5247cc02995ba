"""The curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_curves(rows: Sequence[Mapping[str, float | None]], path: Path, *, title: str = "") -> None:
    """Draw every metric over the steps, training and evaluation of one metric in one panel.

    Args:
        rows: of metrics.jsonl.
        path: the PNG to write.
        title: above the panels.
    """
    from matplotlib.figure import Figure  # here, since it takes half a second of a program's start

    names = list(dict.fromkeys(name.removeprefix("eval/") for row in rows for name in row))
    names = [name for name in names if name not in ("step", "epoch", "count")]
    last = ("grad_norm", "learning_rate")
    names.sort(key=lambda name: (name in last, name not in ("loss", "accuracy")))
    columns = min(max(len(names), 1), 4)
    lines = max(-(-len(names) // columns), 1)
    # A figure without pyplot has no global state and opens no window.
    figure = Figure(figsize=(4.5 * columns, 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, names, strict=False):
        steps, values = _series(rows, name)
        if steps and name == "learning_rate":  # it is no measurement, and has corners
            panel.plot(steps, values, color="tab:blue", label="training")
        elif steps:
            panel.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
            panel.plot(steps, _smooth(values), color="tab:blue", label="training")
        tested, scores = _series(rows, f"eval/{name}")
        if tested:
            panel.plot(tested, scores, "o-", color="tab:orange", markersize=4, label="test")
        if name == "grad_norm" and values and 0 < 10 * min(values) < max(values):
            panel.set_yscale("log")
        panel.set(xlabel="step", title=name)
        panel.grid(alpha=0.3)
        if panel.lines:  # a metric may be None throughout
            panel.legend()
    figure.suptitle(title)
    with path.open("wb") as file:
        figure.savefig(file, dpi=120)


def _series(rows: Sequence[Mapping[str, float | None]], name: str) -> tuple[list, list]:
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential average over about a twentieth of the curve, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed
