"""BERT's encoder (Devlin et al. 2019, arXiv 1810.04805): tokens to a vector for each.

Embeddings of token, place and type are added and normalised, then come the layers of
`models.transformer_stack.Encoder` with the normalisation after each part and exact GELU. What differs:
no pooling layer, and no heads of pre-training; hidden units are dropped, too, where dropout isn't 0.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets import ops
from jaxnets.layers import Dropout, Embedding, LayerNorm, constrain
from jaxnets.models.transformer_stack import Encoder, LayerFields
from jaxnets.typing import Array

_init = nn.initializers.normal(0.02)


class BERT(nn.Module):
    """A text encoder.

    Attributes:
        vocabulary_size: V.
        max_length: the longest S.
        num_types: kinds of segments that a text may consist of.
        num_layers: L.
        width: D.
        num_heads: N.
        hidden: F.
        dropout_rate: probability of dropping an element.
        epsilon: of the normalisations.
        dtype: of the computation; that of the parameters by default.

    Example:
        >>> import jax
        >>> model = BERT(vocabulary_size=20, num_layers=1, width=8, num_heads=2, hidden=16)
        >>> tokens = jnp.array([[5, 6, 7]])
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)[0].shape
        (1, 3, 8)
    """

    vocabulary_size: int = 30522
    max_length: int = 512
    num_types: int = 2
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    hidden: int = 3072
    dropout_rate: float = 0.0
    epsilon: float = 1e-12
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
        types: Array | None = None,
    ) -> Array:
        """Encode.

        Args:
            tokens: integers `[B, S]` in [0, V). Others make NaN.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout masks belong.
            mask: boolean `[B, S]`, false for padding, whose own output means nothing. A mask `[B]` of
                rows that only fill up a batch is without effect.
            types: integers `[B, S]`, of which segment each token is; 0 by default.

        Returns:
            `[B, S, D]`.

        Raises:
            ValueError: if the tokens are no integers `[B, S]`, or more than max_length.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are integers [B, S], not {tokens.dtype} {tokens.shape}")
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens in a row; this model takes at most {self.max_length}")

        def table(size: int, name: str, axis: str | None = None) -> Embedding:
            return Embedding(size, self.width, self.dtype, _init, axis=axis, name=f"{name}_embedding")

        x_BSD = table(self.vocabulary_size, "token", "vocabulary")(tokens)
        x_BSD = ops.add_bias(x_BSD, table(self.max_length, "position")(jnp.arange(length)))
        types = jnp.zeros_like(tokens) if types is None else types
        x_BSD = x_BSD + table(self.num_types, "type")(types)
        x_BSD = constrain(LayerNorm(self.epsilon, name="norm")(x_BSD), "batch", "time", None)
        x_BSD = Dropout(self.dropout_rate, name="dropout")(x_BSD, train=train, rows=rows)
        fields = LayerFields(
            self.width,
            self.num_heads,
            self.hidden,
            self.dropout_rate,
            norm_first=False,
            activation="gelu",
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        mask = None if mask is None or mask.ndim == 1 else mask
        encoder = Encoder(self.num_layers, fields, name="encoder")
        return encoder(x_BSD, train=train, rows=rows, mask=mask)


def bert_base(vocabulary_size: int = 30522, **fields) -> BERT:
    """BERT's smaller size: 108,891,648 parameters."""
    return BERT(vocabulary_size, **fields)
