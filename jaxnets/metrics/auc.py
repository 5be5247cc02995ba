"""The area under the ROC curve: exact, so on the host, from all scores together.

It depends on how every score compares with every other, which no sums of fixed size hold. So the parts
are kept whole: adding two of them concatenates.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class AUC:
    """Scores and labels on the host.

    Attributes:
        scores: `[N]`.
        labels: boolean `[N]`.
    """

    scores: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, scores: Any, labels: Any, mask: Any = None) -> "AUC":
        """Take the scores of a batch from the device.

        Args:
            scores: `[...]`, greater for more likely.
            labels: `[...]`, 0 or 1.
            mask: boolean `[...]`; false for what doesn't count.

        Raises:
            ValueError: if the shapes differ, or a label is neither 0 nor 1.

        Example:
            >>> AUC.of([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]).compute()
            0.75
        """
        scores, labels = np.asarray(scores), np.asarray(labels)
        keep = np.ones(labels.shape, bool) if mask is None else np.asarray(mask, bool)
        if not scores.shape == labels.shape == keep.shape:
            raise ValueError(
                f"scores {scores.shape}, labels {labels.shape} and mask {keep.shape} differ"
            )
        scores, labels = scores[keep], labels[keep]
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("labels are 0 or 1")
        return cls(scores, labels.astype(bool))

    def __add__(self, other: "AUC") -> "AUC":
        pairs = (self.scores, other.scores), (self.labels, other.labels)
        return AUC(*(np.concatenate(pair) for pair in pairs))

    def compute(self) -> float:
        """The share of pairs of a positive and a negative that are in order, a tie being half a pair.

        By the sum of ranks (Hanley & McNeil 1982). NaN if there are no positives or no negatives, or a
        score is NaN.
        """
        num_positive = int(self.labels.sum())
        num_pairs = num_positive * (len(self.labels) - num_positive)
        if not num_pairs or np.isnan(self.scores).any():
            return float("nan")
        _, place, counts = np.unique(self.scores, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        rank = (last - (counts - 1) / 2)[place]  # from 1, the mean of those with equal scores
        above = rank[self.labels].sum() - num_positive * (num_positive + 1) / 2
        return float(above / num_pairs)
