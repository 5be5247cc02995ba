"""Perplexity of a language model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.metrics.mean import Mean
from jaxnets.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean loss of a token; adding two of them, leaf by leaf, merges them.

    Attributes:
        loss: the sums of the losses and of their count.
    """

    loss: Mean

    @classmethod
    def of(cls, losses: Array, mask: Array | None = None) -> "Perplexity":
        """Sum up losses.

        Args:
            losses: `[B, ...]`, negative log-likelihoods to base e.
            mask: as of `Mean.of`.

        Example:
            >>> round(float(Perplexity.of(jnp.log(jnp.array([2.0, 8.0]))).compute()), 4)
            4.0
        """
        return cls(Mean.of(losses, mask))

    def compute(self) -> Array:
        """The perplexity; 1 where nothing counted."""
        mean = self.loss.compute()
        # On the host in float64, as the sums are.
        return jnp.exp(mean) if isinstance(mean, jax.Array) else np.exp(mean)
