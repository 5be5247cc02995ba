"""Classifiers of texts: an LSTM over its words, and naive Bayes with learnt weights on its n-grams."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxnets import errors
from jaxnets.layers import LSTM, Dropout, Embedding, Linear
from jaxnets.layers.embedding import embed
from jaxnets.typing import Array, Params, PyTree

POOLINGS = ("last", "max")


class LSTMClassifier(nn.Module):
    """Word vectors, an LSTM, and a linear layer on what it says after the last word.

    With one layer of one direction it is the network of Keras's tutorial on the reviews of IMDB,
    https://github.com/keras-team/keras/blob/2.15/examples (imdb_lstm.py).

    Attributes:
        vocabulary_size: V.
        num_classes: C.
        width: D, of a word's vector.
        hidden: H.
        num_layers: of the LSTM.
        is_bidirectional: whether it goes both ways.
        pooling: "last" takes the state after the last word, "max" the greatest output of any word.
        dropout_rate: of the LSTM's input and, with `pooling` "max", of what is pooled.
        recurrent_dropout_rate: of its output on the way back to the gates.
        dtype: of the computation.
    """

    vocabulary_size: int
    num_classes: int = 2
    width: int = 128
    hidden: int = 128
    num_layers: int = 1
    is_bidirectional: bool = False
    pooling: str = "last"
    dropout_rate: float = 0.2
    recurrent_dropout_rate: float = 0.2
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Classify texts.

        Args:
            tokens: integers `[B, T]` in [0, V).
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout masks belong.
            mask: boolean `[B, T]`, false for padding, which changes no number; a mask `[B]` is without
                effect.

        Returns:
            logits `[B, C]`.
        """
        if self.pooling not in POOLINGS:
            raise errors.unknown("pooling", self.pooling, POOLINGS)
        if mask is not None and mask.ndim == 1:
            mask = None
        table = Embedding(self.vocabulary_size, self.width, self.dtype, _uniform(0.05), name="embedding")
        y_BTD, (h_LBH, _) = LSTM(
            self.hidden,
            self.num_layers,
            self.is_bidirectional,
            self.dropout_rate,
            self.recurrent_dropout_rate,
            self.dtype,
            name="lstm",
        )(table(tokens), train=train, rows=rows, mask=mask)
        if self.pooling == "max":
            if mask is not None:
                y_BTD = jnp.where(mask[:, :, None], y_BTD, jnp.finfo(y_BTD.dtype).min)
            x_BD = jnp.max(y_BTD, axis=1)
            if mask is not None:  # of a text without words there is no greatest
                x_BD = jnp.where(jnp.any(mask, axis=1)[:, None], x_BD, 0)
            x_BD = Dropout(self.dropout_rate, name="dropout")(x_BD, train=train, rows=rows)
        else:
            num_last = 2 if self.is_bidirectional else 1
            x_BD = jnp.concatenate(list(h_LBH[-num_last:]), axis=1)
        return Linear(
            (self.num_classes,),
            dtype=self.dtype,
            kernel_init=nn.initializers.glorot_uniform(),
            name="head",
        )(x_BD)


class WeightedNaiveBayes(nn.Module):
    """Naive Bayes over the n-grams of a text, each one's say scaled by a learnt weight.

    `logits_c = bias_c + sum over the text's features f of weight_f * ratio_fc`, after Wang & Manning
    2012, "Baselines and Bigrams", with gradient descent for their support vector machine. ratio is the
    logarithm of a feature's frequency in the texts of class c over that in the others, and stays as it
    is: `model_state["statistics"]["ratio"]`, which `with_ratios` counts.

    Attributes:
        vocabulary_size: V.
        num_classes: C.
        scale: of the logits at first, when all weights are 1.
    """

    vocabulary_size: int
    num_classes: int = 2
    scale: float = 0.02

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Classify texts; as `LSTMClassifier` does, but for tokens that are a text's n-grams."""
        del train, rows
        shape = (self.vocabulary_size, self.num_classes)
        ratio = self.variable("statistics", "ratio", jnp.zeros, shape, jnp.float32)
        weight = self.param("weight", nn.initializers.constant(self.scale), shape[:1], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        there = mask if mask is not None and mask.ndim == 2 else jnp.ones(tokens.shape, bool)
        tokens = jnp.where(there, tokens, 0)
        weight_BT = jnp.where(there, embed(weight[:, None], tokens)[..., 0], 0)
        return jnp.einsum("BT,BTC->BC", weight_BT, embed(ratio.value, tokens)) + bias[None]


def with_ratios(
    init_fn: Callable[[Array], tuple[Params, PyTree]],
    texts: np.ndarray,
    mask: np.ndarray,
    label: np.ndarray,
    *,
    vocabulary_size: int,
    num_classes: int,
) -> Callable[[Array], tuple[Params, PyTree]]:
    """A start of `WeightedNaiveBayes` that knows how often each feature is in texts of each class.

    Args:
        init_fn: as of `models.functional`.
        texts: features `[N, T]`.
        mask: boolean `[N, T]`, false for padding.
        label: `[N]` in [0, C).
        vocabulary_size: V.
        num_classes: C.
    """
    counts_CV = np.ones((num_classes, vocabulary_size))  # each feature once more than it was seen
    for c in range(num_classes):
        of_class = label == c
        counts_CV[c] += np.bincount(texts[of_class][mask[of_class]], minlength=vocabulary_size)
    others_CV = counts_CV.sum(0)[None] - counts_CV
    logs_CV = np.log(counts_CV / counts_CV.sum(1)[:, None])
    ratio_CV = logs_CV - np.log(others_CV / others_CV.sum(1)[:, None])
    ratio = ratio_CV.T.astype(np.float32)

    def init(key: Array) -> tuple[Params, PyTree]:
        params, _ = init_fn(key)
        return params, {"statistics": {"ratio": jnp.asarray(ratio)}}

    return init


def sharding_rules(vocabulary_size: int | None = None) -> tuple[tuple[str, P], ...]:
    """Where the leaves of a training state lie, on a mesh with the axes "fsdp" and "tensor".

    Words, or features, and the outputs of the LSTM's kernels are cut over "tensor", inputs and a word's
    numbers over "fsdp"; each has to divide evenly. Classes stay together.

    Args:
        vocabulary_size: V; one that doesn't split over eight devices stays whole.

    Returns:
        ordered (pattern, spec) for the paths of `LSTMClassifier` and `WeightedNaiveBayes`.
    """
    vocabulary = None if (vocabulary_size or 0) % 8 else "tensor"
    return (
        (r"(^|/)embedding/embedding$", P(vocabulary, "fsdp")),
        (r"(^|/)lstm/(.+/)?\w*kernel$", P("fsdp", "tensor")),
        (r"(^|/)lstm/(.+/)?\w*bias$", P("tensor")),
        (r"(^|/)head/kernel$", P("fsdp")),
        (r"(^|/)(weight|ratio)$", P(vocabulary)),
        (r"(^|/)bias$", P()),
        (r"^(step|key|guard|health/\w+)$|^opt_state/(.+/)?(count|ns_coeffs)$", P()),
    )


def _uniform(limit: float) -> jax.nn.initializers.Initializer:
    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def lstm_classifier(vocabulary_size: int, num_classes: int = 2, **fields) -> LSTMClassifier:
    """One layer of 128 units: 2,691,842 parameters with 20,000 words."""
    return LSTMClassifier(vocabulary_size, num_classes, **fields)


def weighted_naive_bayes(vocabulary_size: int, num_classes: int = 2, **fields) -> WeightedNaiveBayes:
    """A weight for each feature."""
    return WeightedNaiveBayes(vocabulary_size, num_classes, **fields)
