"""The pictures of a classifier's predictions: who is taken for whom, and some images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MAX_NUMBERS = 30  # classes up to which each cell has its number


def draw_predictions(folder: Path) -> None:
    """Draw `confusion.png` and, of images, `samples.png` from the `predictions.npz` of a run folder.

    Args:
        folder: of the run.
    """
    saved = (folder / "predictions.npz").open("rb")
    with saved, np.load(saved, allow_pickle=False) as file:
        found = dict(file)
    names = [str(name) for name in found["class_names"]]
    draw_confusion(found["label"], found["prediction"], folder / "confusion.png", class_names=names)
    if "sample_index" not in found:
        return
    rows = found["sample_index"]
    draw_samples(
        found["sample_image"],
        found["label"][rows],
        found["prediction"][rows],
        found["probability"][rows],
        folder / "samples.png",
        class_names=names,
    )


def count_confusions(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """How many examples of each class are taken for which.

    Args:
        label: int `[M]`, the true classes.
        prediction: int `[M]`.
        num_classes: V.

    Returns:
        int64 `[V, V]`, the true class first.

    Example:
        >>> count_confusions(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    pairs = label.astype(np.int64) * num_classes + prediction
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def draw_confusion(
    label: np.ndarray, prediction: np.ndarray, path: Path, *, class_names: Sequence[str] = ()
) -> None:
    """Draw the confusion matrix: numbers are counts, colours shares of the row.

    Args:
        label: int `[M]`, the true classes.
        prediction: int `[M]`.
        path: the PNG to write.
        class_names: one for each class; numbers if there are none.
    """
    from matplotlib.figure import Figure  # here, since it takes half a second of a program's start

    names = list(class_names) or [str(i) for i in range(int(max(label.max(), prediction.max())) + 1)]
    size = len(names)
    counts_VV = count_confusions(label, prediction, size)
    shares_VV = counts_VV / np.maximum(counts_VV.sum(1, keepdims=True), 1)
    width = min(3.5 + 0.45 * size, 16)
    figure = Figure(figsize=(width, width - 0.8), layout="constrained")
    panel = figure.subplots()
    picture = panel.imshow(shares_VV, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=panel, label="share of the true class", shrink=0.8)
    right = int(np.trace(counts_VV))
    panel.set(
        xlabel="prediction",
        ylabel="true class",
        title=f"{right:,} of {len(label):,} right ({right / len(label):.1%})",
    )
    if size <= _MAX_NUMBERS:
        panel.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
        panel.set_yticks(range(size), names)
        for i, j in np.ndindex(size, size):
            colour = "white" if shares_VV[i, j] > 0.5 else "black"
            if counts_VV[i, j]:
                panel.text(j, i, str(counts_VV[i, j]), ha="center", va="center", color=colour, size=8)
    with path.open("wb") as file:
        figure.savefig(file, dpi=120)


def draw_samples(
    images: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    probability: np.ndarray,
    path: Path,
    *,
    class_names: Sequence[str] = (),
) -> None:
    """Draw images with the class that the model gives them; errors in red, with the true class.

    Args:
        images: uint8 or floating in [0, 1], `[N, H, W, C]` of 1 or 3 channels.
        label: int `[N]`, the true classes.
        prediction: int `[N]`.
        probability: `[N]`, the model's of its prediction.
        path: the PNG to write.
        class_names: one for each class; numbers if there are none.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def name(number: int) -> str:
        return class_names[number] if class_names else str(number)

    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    # One panel for all: many of them, each laid out by itself, take seconds.
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_axis_off()
    for i, image in enumerate(images):
        left, bottom = 1.5 * (i % columns) + 0.05, 1.8 * (rows - 1 - i // columns) + 0.05
        box = (left, left + 1.4, bottom, bottom + 1.4)
        is_grey = image.shape[-1] == 1
        shown = image[..., 0] if is_grey else image
        top = 255 if image.dtype == np.uint8 else 1
        panel.imshow(shown, cmap="gray" if is_grey else None, vmin=0, vmax=top, extent=box)
        is_right = label[i] == prediction[i]
        text = f"{name(prediction[i])} {probability[i]:.0%}"
        text = text if is_right else f"{text}\nis {name(label[i])}"
        colour, width = ("black", 0.8) if is_right else ("tab:red", 3)
        panel.text(left + 0.7, bottom + 1.45, text, ha="center", va="bottom", size=8, color=colour)
        panel.add_patch(
            Rectangle((left, bottom), 1.4, 1.4, fill=False, edgecolor=colour, linewidth=width)
        )
    panel.set(xlim=(0, 1.5 * columns), ylim=(0, 1.8 * rows))
    with path.open("wb") as file:
        figure.savefig(file, dpi=100)
