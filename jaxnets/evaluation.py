"""A recipe's test set: evaluated, and what the model says of each example kept and drawn."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.config import RunOptions
from jaxnets.data import Batches, ByLength
from jaxnets.data.sources import read_example
from jaxnets.feed import feed, resident, test_draws
from jaxnets.recipe import Recipe, count_examples
from jaxnets.report import draw_predictions
from jaxnets.train import hosts
from jaxnets.train.evaluate import evaluate, make_eval_step
from jaxnets.train.predict import make_predict_step, predict, save_predictions
from jaxnets.train.sharding import Strategy
from jaxnets.train.state import TrainState

_NUM_SAMPLES = 48  # test images that are drawn


def make_evaluator(
    recipe: Recipe,
    strategy: Strategy,
    options: RunOptions | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[str], None] = lambda section: None,
) -> Callable[[TrainState], dict[str, float | int]]:
    """Make `evaluate(state) -> {name: value}` on the recipe's test set.

    Args:
        recipe: whose test set and metrics.
        strategy: on which devices.
        options: whether data is streamed, and how.
        should_stop: asked before each batch; if it says so, `train.evaluate.Stopped` is raised.
        beat: told what begins.
    """
    options = options or RunOptions()
    batches = _test_batches(recipe, strategy)
    arrays = resident(recipe.test, options)
    step = strategy.compile_eval(partial(make_eval_step, recipe.eval_fn), arrays)

    known: set[tuple] = set()  # shapes for which an evaluation has compiled it

    def run(state: TrainState) -> dict[str, float | int]:
        with feed(recipe.test, batches, strategy, options) as fed:
            return evaluate(step, state, fed, should_stop=should_stop, beat=beat, known=known)

    return run


def keep_predictions(
    folder: Path,
    recipe: Recipe,
    strategy: Strategy,
    options: RunOptions,
    state: TrainState,
) -> None:
    """Write what a classifier says of the test set, and draw it."""
    if recipe.predict_fn is None or not (recipe.has_pictures or recipe.class_names):
        return
    where = dataclasses.replace(strategy, name="jit", virtual_shards=0)
    step = where.compile_eval(
        partial(make_predict_step, recipe.predict_fn), resident(recipe.test, options)
    )
    with feed(recipe.test, _test_batches(recipe, strategy), where, options) as batches:
        predictions = predict(step, state, batches)
    if not hosts.is_first():
        return
    size = len(predictions["label"])
    shown = sorted({round(i) for i in np.linspace(0, size - 1, min(size, _NUM_SAMPLES))})
    rows = {i: row_of(recipe.test, i) for i in shown}
    samples = {i: row["image"] for i, row in rows.items() if "image" in row}
    save_predictions(
        folder / "predictions.npz", predictions, class_names=recipe.class_names, samples=samples
    )
    draw_predictions(folder)


def row_of(data: Any, i: int, max_unreadable: int = 0) -> Mapping[str, Any]:
    """The i-th example of arrays or of a source, or the next that can be read, if so many may not."""
    if isinstance(data, Mapping):
        return {name: x[i] for name, x in data.items()}
    return read_example(data, i, max_unreadable)[0]


def _test_batches(recipe: Recipe, strategy: Strategy) -> Batches | ByLength:
    parts = strategy.num_parts
    batch_size = -(-min(recipe.eval_batch_size, count_examples(recipe.test)) // parts) * parts
    return test_draws(recipe, batch_size)
