"""Precision, recall and F1 from counts that merge exactly."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.typing import Array

SCORES = ("precision", "recall", "f1")
AVERAGES = ("binary", "micro", "macro", "weighted")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassCounts:
    """How often each class was predicted, was there, and both; adding two of them merges them.

    Attributes:
        both: int32 `[V]`, predicted and there: the true positives.
        predicted: int32 `[V]`.
        actual: int32 `[V]`.
        outside: int32, how many predictions and labels were none of the classes.
        score: what `compute` gives: "precision", both / predicted; "recall", both / actual; or "f1",
            2 both / (predicted + actual), their harmonic mean (van Rijsbergen 1979).
        average: "binary", of class 1; "micro", of all counts together; "macro", the mean over classes;
            "weighted", the mean by how often each is there.
    """

    both: Array
    predicted: Array
    actual: Array
    outside: Array
    score: str = dataclasses.field(default="f1", metadata={"static": True})
    average: str = dataclasses.field(default="binary", metadata={"static": True})

    @classmethod
    def of(
        cls,
        predictions: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        num_classes: int = 2,
        score: str = "f1",
        average: str = "binary",
    ) -> "ClassCounts":
        """Count.

        Args:
            predictions: integers or booleans `[...]` in [0, V). Of others, where they count, the score
                is NaN.
            labels: the same.
            mask: boolean `[...]`; false for what doesn't count.
            num_classes: V.
            score: see the class.
            average: see the class.

        Raises:
            ValueError: if a score or an average is unknown, "binary" isn't of two classes, or
                predictions or labels are neither integers nor booleans, such as probabilities.

        Example:
            >>> counts = ClassCounts.of(jnp.array([1, 1, 0, 1]), jnp.array([1, 0, 1, 1]), score="recall")
            >>> round(float(counts.compute()), 4)
            0.6667
        """
        for name, value, known in (("score", score, SCORES), ("average", average, AVERAGES)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        if average == "binary" and num_classes != 2:
            raise ValueError(f"the average 'binary' is of 2 classes, not of {num_classes}")
        for what, values in (("predictions", predictions), ("labels", labels)):
            if not (jnp.issubdtype(values.dtype, jnp.integer) or values.dtype == jnp.bool_):
                raise ValueError(f"{what} are classes, as integers or booleans, not {values.dtype}")
        chex.assert_equal_shape([predictions, labels])
        keep = jnp.ones(labels.shape, bool) if mask is None else mask.astype(bool)
        chex.assert_equal_shape([labels, keep])

        def count(classes: Array, keep: Array) -> tuple[Array, Array]:
            is_class = classes.reshape(-1, 1) == jnp.arange(num_classes)[None]
            counts = jnp.sum(is_class & keep.reshape(-1, 1), axis=0, dtype=jnp.int32)
            return counts, jnp.sum(keep, dtype=jnp.int32) - jnp.sum(counts, dtype=jnp.int32)

        both, _ = count(labels, keep & (predictions == labels))
        (predicted, others), (actual, more) = count(predictions, keep), count(labels, keep)
        return cls(both, predicted, actual, others + more, score, average)

    def compute(self) -> Array:
        """The score; 0 for a class that it isn't defined of, NaN if a class was none."""
        score, is_wrong = self._score(), self.outside > 0
        if isinstance(score, jax.Array):
            return jnp.where(is_wrong, jnp.nan, score)
        return score * np.nan if is_wrong else score  # on the host in float64, as the sums are

    def _score(self) -> Array:
        both, predicted, actual = self.both, self.predicted, self.actual
        if self.average == "binary":
            both, predicted, actual = both[1], predicted[1], actual[1]
        elif self.average == "micro":
            both, predicted, actual = both.sum(), predicted.sum(), actual.sum()
        below = {"precision": predicted, "recall": actual, "f1": predicted + actual}[self.score]
        above = 2 * both if self.score == "f1" else both
        scores = above / (below + (below == 0))
        if self.average == "macro":  # over the classes that occur at all, as scikit-learn takes them
            return jnp.sum(scores) / jnp.maximum(jnp.sum(predicted + actual > 0), 1)
        if self.average == "weighted":
            return jnp.sum(scores * actual) / jnp.maximum(jnp.sum(actual), 1)
        return scores
