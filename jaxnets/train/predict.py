"""What a classifier says of every example, kept in the run folder for those who draw or study it."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.train.evaluate import IN_FLIGHT
from jaxnets.train.files import write_atomically
from jaxnets.train.state import TrainState
from jaxnets.typing import Array, Batch, Indexed


def make_predict_step(
    predict_fn: Callable[..., Array], *, axis_name: str | None = None
) -> Callable[[TrainState, Batch], dict[str, Array]]:
    """Make `step(state, batch) -> rows`, for `jit` alone: its results are rows, not sums.

    Args:
        predict_fn: `predict_fn(params, model_state, batch) -> logits [B, V]`.
        axis_name: None.

    Returns:
        the step; of each row it gives "label" and "prediction", int32 `[B]`, "probability", float32
        `[B]`, which is the model's of its prediction, and the batch's "mask" and "index".
    """
    if axis_name is not None:
        raise ValueError("predictions are rows, which no mapped axis adds up: compile them with jit")

    def step(state: TrainState, batch: Batch) -> dict[str, Array]:
        params = state.params if state.ema is None else state.ema
        logits_BV = predict_fn(params, state.model_state, batch).astype(jnp.float32)
        return {
            "label": batch["label"].astype(jnp.int32),
            "prediction": jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
            "probability": jnp.max(jax.nn.softmax(logits_BV), axis=-1),
            "mask": batch["mask"],
            "index": batch["index"],
        }

    return step


def predict(step: Callable[..., Any], state: TrainState, batches: Indexed) -> dict[str, np.ndarray]:
    """The rows of all batches that their masks have, in the order of their examples.

    Args:
        step: compiled, `step(state, batch_or_draw) -> {name: [B]}`, "mask" and "index" among them.
        state: read only.
        batches: an indexable sequence of batches or draws, with masks.

    Returns:
        `{name: [M]}`.
    """
    parts = []
    for i in range(len(batches)):
        parts.append(step(state, batches[i]))
        if i >= IN_FLIGHT:  # or batches would pile up on the device
            parts[i - IN_FLIGHT] = jax.device_get(parts[i - IN_FLIGHT])
    rows = jax.device_get(parts)
    masks = np.concatenate([part.pop("mask") for part in rows])
    index = np.concatenate([part.pop("index") for part in rows])[masks]
    in_order = np.argsort(index, kind="stable")
    return {name: np.concatenate([part[name] for part in rows])[masks][in_order] for name in rows[0]}


def save_predictions(
    path: Path,
    predictions: Mapping[str, np.ndarray],
    *,
    class_names: Sequence[str],
    samples: Mapping[int, np.ndarray],
) -> None:
    """Write `predictions.npz`, all of it or nothing.

    Args:
        path: of the file.
        predictions: `{name: [M]}`, as `predict` gives them.
        class_names: one for each class, or none at all.
        samples: some of the images `[H, W, C]`, all of one shape, by the number of their row; none of
            other data.
    """
    arrays = {**predictions, "class_names": np.asarray(class_names, np.str_)}
    if samples:
        arrays["sample_index"] = np.asarray(list(samples), np.int64)
        arrays["sample_image"] = np.stack(list(samples.values()))
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())
