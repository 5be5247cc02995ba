"""The picture of what a translation looked at."""

import io
from collections.abc import Sequence

import numpy as np


def draw_alignment(weights: np.ndarray, source: Sequence[str], target: Sequence[str]) -> bytes:
    """Draw attention's weights, a row for each token of the translation.

    Args:
        weights: `[T, S]`, from 0 to 1.
        source: the text of S tokens.
        target: the text of T tokens.

    Returns:
        the content of a PNG file.

    Raises:
        ValueError: if the numbers of tokens aren't those of the weights.
    """
    if weights.shape != (len(target), len(source)):
        raise ValueError(
            f"weights {weights.shape} for {len(target)} tokens that look at {len(source)} tokens"
        )
    from matplotlib.figure import Figure  # here, since it takes half a second of a program's start

    size = (1.6 + 0.42 * len(source), 1.4 + 0.32 * len(target))
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    panel.imshow(weights, cmap="Blues", vmin=0, vmax=max(float(weights.max()), 1e-9), aspect="auto")
    # As they are: a dollar sign begins no formula.
    plain = {"parse_math": False}
    panel.set_xticks(range(len(source)), list(source), rotation=60, ha="left", **plain)
    panel.set_yticks(range(len(target)), list(target), **plain)
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
