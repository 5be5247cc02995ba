"""What is counted in classification, one truth value for each example."""

import chex
import jax.numpy as jnp

from jaxnets.typing import Array


def is_correct(logits: Array, labels: Array) -> Array:
    """Whether the largest logit is the label's; the first one wins a tie.

    Args:
        logits: `[..., V]`.
        labels: integers `[...]`.

    Returns:
        boolean `[...]`; its mean is the accuracy.
    """
    chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
    chex.assert_rank(logits, labels.ndim + 1)
    return jnp.argmax(logits, axis=-1) == labels
