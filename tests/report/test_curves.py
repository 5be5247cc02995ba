import math

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from jaxnets.report import curves, draw_curves


def rows_of(num_steps=100, every=25):
    rows = []
    for step in range(1, num_steps + 1):
        rows.append({"step": step, "epoch": step / 50, "loss": 2 / step, "accuracy": 1 - 1 / step})
        if step % every == 0:
            rows.append({"step": step, "eval/loss": 3 / step, "eval/accuracy": 0.5, "eval/count": 9})
    return rows


def drawn(rows, path, monkeypatch, **options):
    """The panels of the picture, by title."""
    figures = []
    savefig = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_curves(rows, path, **options)
    (figure,) = figures
    return {panel.get_title(): panel for panel in figure.axes}


def size_of(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    height, width = image.imread(path).shape[:2]
    return width, height


def test_a_png_of_sensible_size_with_something_on_it(tmp_path):
    path = tmp_path / "curves.png"
    draw_curves(rows_of(), path, title="digits, 100 steps")
    width, height = size_of(path)
    assert 800 < width < 2000
    assert 300 < height < 900
    pixels = image.imread(path)[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_training_and_evaluation_of_a_metric_share_a_panel(tmp_path, monkeypatch):
    rows = rows_of()
    panels = drawn(rows, tmp_path / "curves.png", monkeypatch)
    assert list(panels) == ["loss", "accuracy"]  # no step, epoch or count
    raw, smooth, test = panels["loss"].get_lines()
    assert raw.get_xdata().tolist() == list(range(1, 101))
    assert raw.get_ydata().tolist() == [row["loss"] for row in rows if "loss" in row]
    assert len(smooth.get_ydata()) == 100
    assert test.get_xdata().tolist() == [25, 50, 75, 100]
    assert test.get_ydata().tolist() == [3 / 25, 3 / 50, 3 / 75, 3 / 100]
    labels = [text.get_text() for text in panels["loss"].get_legend().get_texts()]
    assert labels == ["training", "test"]


def test_loss_and_accuracy_come_first_and_the_gradient_last(tmp_path, monkeypatch):
    rows = [{"step": 1, "grad_norm": 1.0, "loss": 2.0, "eval/bleu": 3.0}]
    panels = drawn(rows, tmp_path / "curves.png", monkeypatch)
    assert list(panels) == ["loss", "bleu", "grad_norm"]


def test_no_rows(tmp_path):
    draw_curves([], tmp_path / "curves.png")
    assert min(size_of(tmp_path / "curves.png")) > 200


def test_evaluation_rows_alone(tmp_path, monkeypatch):
    rows = [row for row in rows_of() if "eval/loss" in row]
    panels = drawn(rows, tmp_path / "curves.png", monkeypatch)
    assert [len(panel.get_lines()) for panel in panels.values()] == [1, 1]


def test_a_single_row(tmp_path):
    draw_curves([{"step": 1, "loss": 0.5}], tmp_path / "curves.png")
    assert min(size_of(tmp_path / "curves.png")) > 200


@pytest.mark.parametrize("prefix", ["", "eval/"])
def test_values_that_were_not_finite_are_left_out(tmp_path, monkeypatch, prefix):
    """metrics.jsonl holds None for them; a metric may have no other values."""
    rows = [
        {"step": step, f"{prefix}loss": value, f"{prefix}norm": None}
        for step, value in enumerate([1.0, None, 0.0])
    ]
    panels = drawn(rows, tmp_path / "curves.png", monkeypatch)
    assert panels["loss"].get_lines()[0].get_xdata().tolist() == [0, 2]
    assert panels["loss"].get_lines()[0].get_ydata().tolist() == [1, 0]
    assert not panels["norm"].get_lines()


def test_smoothing_keeps_constants_and_starts_at_the_first_value():
    np.testing.assert_allclose(curves._smooth([2.5] * 300), 2.5)
    values = [math.sin(i / 40) for i in range(400)]
    smoothed = curves._smooth(values)
    assert smoothed[0] == pytest.approx(values[0])
    assert len(smoothed) == 400
    noisy = np.random.default_rng(0).normal(size=400)
    assert np.std(curves._smooth(noisy.tolist())[100:]) < 0.4
    assert curves._smooth([]) == []


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    draw_curves(rows_of(10), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_gradient_norm_and_learning_rate_come_last(tmp_path, monkeypatch):
    rates = [0.1] * 40 + [0.01] * 40
    rows = [
        {"step": i + 1, "grad_norm": 10 ** (-i / 20), "learning_rate": rate, "loss": 1.0, "bleu": 2.0}
        for i, rate in enumerate(rates)
    ]
    panels = drawn(rows, tmp_path / "curves.png", monkeypatch)
    assert [name for name in panels if name] == ["loss", "bleu", "grad_norm", "learning_rate"]
    (line,) = panels["learning_rate"].get_lines()  # as it is: a smoothed step would be a lie
    assert line.get_ydata().tolist() == rates
    assert panels["grad_norm"].get_yscale() == "log"  # over more than a factor of ten
    assert panels["loss"].get_yscale() == "linear"


def test_many_metrics_take_several_rows(tmp_path, monkeypatch):
    rows = [{"step": 1, **{f"metric{i}": float(i) for i in range(6)}}]
    panels = drawn(rows, tmp_path / "curves.png", monkeypatch)
    assert len([name for name in panels if name]) == 6
    width, height = size_of(tmp_path / "curves.png")
    assert width < 2500
    assert height > 700
