"""The pictures are taken apart again: what counts is what was drawn, not that a file is there."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from jaxnets.report import draw_predictions, predictions

LABEL = np.array([0, 0, 0, 0, 1, 1, 2, 2], np.int32)
PREDICTION = np.array([0, 0, 0, 1, 1, 2, 2, 2], np.int32)
COUNTS = np.array([[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]])  # of class 3 there is none
NAMES = ("cat", "dog", "ship", "frog")


@pytest.fixture
def figures(monkeypatch):
    kept, savefig = [], Figure.savefig

    def keep(self, *args, **kwargs):
        kept.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_confusion_matrix(tmp_path, figures):
    path = tmp_path / "confusion.png"
    predictions.draw_confusion(LABEL, PREDICTION, path, class_names=NAMES)
    panel = figures[0].axes[0]
    shares = COUNTS / np.array([4, 2, 2, 1])[:, None]
    np.testing.assert_array_equal(panel.images[0].get_array(), shares)
    written = {text.get_position(): int(text.get_text()) for text in panel.texts}
    assert written == {(j, i): n for (i, j), n in np.ndenumerate(COUNTS) if n}  # x is the prediction
    assert [text.get_text() for text in panel.get_yticklabels()] == list(NAMES)
    assert [text.get_text() for text in panel.get_xticklabels()] == list(NAMES)
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("prediction", "true class")
    assert panel.get_title() == "6 of 8 right (75.0%)"
    assert is_png(path)


def test_without_names_classes_are_numbers(tmp_path, figures):
    predictions.draw_confusion(LABEL, PREDICTION, tmp_path / "c.png")
    labels = [text.get_text() for text in figures[0].axes[0].get_yticklabels()]
    assert labels == ["0", "1", "2"]


def test_many_classes_are_colours_alone(tmp_path, figures):
    label = np.arange(100)
    predictions.draw_confusion(label, label[::-1], tmp_path / "c.png")
    panel = figures[0].axes[0]
    np.testing.assert_array_equal(panel.images[0].get_array(), np.eye(100)[::-1])
    assert not panel.texts


@pytest.mark.parametrize("channels", [1, 3])
def test_the_samples(tmp_path, figures, channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 5, 6, channels), dtype=np.uint8)
    sure = np.linspace(0.3, 1, 8)
    path = tmp_path / "samples.png"
    predictions.draw_samples(images, LABEL, PREDICTION, sure, path, class_names=NAMES)
    (panel,) = figures[0].axes
    for drawn, image in zip(panel.images, images, strict=True):
        np.testing.assert_array_equal(drawn.get_array(), image[..., 0] if channels == 1 else image)
        assert drawn.get_clim() == (0, 255)  # a dark image stays dark
    texts = [text.get_text() for text in panel.texts]
    assert texts[0] == "cat 30%"
    assert texts[3] == "dog 60%\nis cat"
    is_wrong = PREDICTION != LABEL
    for text, frame, wrong in zip(panel.texts, panel.patches, is_wrong, strict=True):
        colour = to_rgba("tab:red" if wrong else "black")
        assert to_rgba(text.get_color()) == colour
        assert frame.get_edgecolor() == colour
    assert is_png(path)


def test_samples_fill_rows_from_the_top(tmp_path, figures):
    images = np.zeros((10, 4, 4, 1))
    zeros = np.zeros(10, int)
    predictions.draw_samples(images, zeros, zeros, np.ones(10), tmp_path / "s.png")
    boxes = [drawn.get_extent() for drawn in figures[0].axes[0].images]
    assert len({tuple(box) for box in boxes}) == 10
    assert boxes[0][2] == boxes[7][2] > boxes[8][2]  # the ninth begins the second row
    assert boxes[0][0] == boxes[8][0] < boxes[9][0]


def test_both_are_drawn_from_what_the_run_folder_holds(tmp_path, figures):
    rows = np.array([3, 7])
    np.savez(
        tmp_path / "predictions.npz",
        label=LABEL,
        prediction=PREDICTION,
        probability=np.full(8, 0.5, np.float32),
        class_names=np.array(NAMES),
        sample_index=rows,
        sample_image=np.zeros((2, 4, 4, 3), np.uint8),
    )
    draw_predictions(tmp_path)
    assert is_png(tmp_path / "confusion.png")
    assert is_png(tmp_path / "samples.png")
    texts = [text.get_text() for text in figures[1].axes[0].texts]
    assert texts == ["dog 50%\nis cat", "ship 50%"]  # the third and the seventh example
