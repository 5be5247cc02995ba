"""The attention RNN with gated recurrent units.

Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate" (arXiv
1409.0473).

A GRU of both directions reads the source; a second GRU writes the target, and looks before each token at
the mean of the first one's outputs, weighted by `softmax(v^T tanh(W s + U h))`. What differs from
the paper: both sides share one table of embeddings, which also gives the logits, the reset gate
stands behind the product, as PyTorch has it, and logits come from a linear layer with tanh in place of a
maxout.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxnets import ops
from jaxnets.layers import GRU, Dropout, Embedding, Linear
from jaxnets.models.transformer import masks_of
from jaxnets.typing import Array

_glorot = nn.initializers.glorot_uniform()


class AdditiveAttention(nn.Module):
    """Attention whose scores come from a layer of tanh.

    Attributes:
        hidden: A, the width of that layer.
        dtype: of the computation; that of input and parameters by default.
    """

    hidden: int
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Make the parts."""
        self.query = Linear((self.hidden,), use_bias=False, dtype=self.dtype, kernel_init=_glorot)
        self.key = Linear((self.hidden,), dtype=self.dtype, kernel_init=_glorot)
        self.score = Linear((1,), use_bias=False, dtype=self.dtype, kernel_init=_glorot)

    def keys(self, memory_BSD: Array) -> Array:
        """`U h`, `[B, S, A]`, which doesn't change while the target grows."""
        return self.key(memory_BSD)

    def __call__(
        self, query_BWD: Array, key_BSA: Array, memory_BSD: Array, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """Look at the memory.

        Args:
            query_BWD: `[B, W, D]`.
            key_BSA: `[B, S, A]`, of `keys`.
            memory_BSD: `[B, S, E]`.
            mask: boolean `[B, S]`, false for places that nobody sees; each row has one that is seen.

        Returns:
            `[B, W, E]`, and the weights `[B, W, S]`.
        """
        both_BWSA = jnp.tanh(self.query(query_BWD)[:, :, None] + key_BSA[:, None])
        score_BWS = self.score(both_BWSA)[..., 0]
        score_BWS = score_BWS.astype(jnp.promote_types(score_BWS.dtype, jnp.float32))
        if mask is not None:
            score_BWS = jnp.where(mask[:, None], score_BWS, jnp.finfo(score_BWS.dtype).min)
        weights_BWS = jax.nn.softmax(score_BWS)
        seen_BWD = jnp.einsum("BWS,BSD->BWD", weights_BWS.astype(memory_BSD.dtype), memory_BSD)
        return seen_BWD, weights_BWS


class AttentionRNN(nn.Module):
    """An encoder-decoder of GRUs from tokens to logits; called as `models.Transformer` is.

    Attributes:
        vocabulary_size: V, of both sides, which share one table; it also gives the logits.
        width: D, of the embeddings.
        hidden: H, of the states; the encoder has so many in each direction.
        dropout_rate: probability of dropping an element, of embeddings and of what gives the logits.
        dtype: of the computation and the logits; that of the parameters by default.

    Example:
        >>> model = AttentionRNN(vocabulary_size=20, width=8, hidden=6)
        >>> tokens = {"source": jnp.ones((2, 5), int), "target": jnp.ones((2, 3), int)}
        >>> jax.jit(model.init_with_output)(jax.random.key(0), tokens)[0].shape
        (2, 3, 20)
    """

    vocabulary_size: int
    width: int = 256
    hidden: int = 256
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Make the parts."""
        width, size, dtype = self.width, self.hidden, self.dtype
        init = nn.initializers
        self.embedding = Embedding(
            self.vocabulary_size, width, dtype, init.normal(width**-0.5), axis="vocabulary"
        )
        self.encoder = GRU(size, is_bidirectional=True, dtype=dtype)
        self.start = Linear((size,), dtype=dtype, kernel_init=_glorot)
        self.cross_attention = AdditiveAttention(size, dtype)
        # The gates' input is a token and what was looked at; kernels of their own let the first of them
        # be multiplied for all steps at once.
        self.kernel = self.param("kernel", _glorot, (width, 3 * size), jnp.float32)
        self.context_kernel = self.param("context_kernel", _glorot, (2 * size, 3 * size), jnp.float32)
        self.recurrent_kernel = self.param(
            "recurrent_kernel", init.orthogonal(), (size, 3 * size), jnp.float32
        )
        self.bias = self.param("bias", init.zeros, (3 * size,), jnp.float32)
        self.recurrent_bias = self.param("recurrent_bias", init.zeros, (size,), jnp.float32)
        self.readout = Linear((width,), dtype=dtype, kernel_init=_glorot)
        self.source_dropout = Dropout(self.dropout_rate)
        self.target_dropout = Dropout(self.dropout_rate)
        self.memory_dropout = Dropout(self.dropout_rate)
        self.readout_dropout = Dropout(self.dropout_rate)

    def __call__(
        self,
        tokens: Mapping[str, Array],
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Mapping[str, Array] | Array | None = None,
    ) -> Array:
        """Predict the token after each one of the target.

        Args:
            tokens: integers in [0, V): "source" `[B, S]`, and "target" `[B, T]`, which begins with the
                token that begins a sentence. Others make NaN.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout masks belong.
            mask: boolean "source" `[B, S]`, false for padding; of the target none is needed, as no place
                sees a later one. A mask `[B]` of rows that only fill up a batch is without effect.

        Returns:
            logits `[B, T, V]`.

        Raises:
            ValueError: if the mask is another.
        """
        source_mask = masks_of(mask).get("source")
        memory_BSD, key_BSA, state_BH = self._encode(tokens["source"], source_mask, train, rows)
        x_BTD = self.target_dropout(self._embedded(tokens["target"]), train=train, rows=rows)
        gates_BTG = self._gates(x_BTD)

        def step(state_BH: Array, gates_BG: Array) -> tuple[Array, tuple[Array, ...]]:
            state_B1H, seen_B1D, weights_B1S = self._step(
                state_BH[:, None], gates_BG[:, None], key_BSA, memory_BSD, source_mask
            )
            state_BH = state_B1H[:, 0]
            return state_BH, (state_BH, seen_B1D[:, 0], weights_B1S[:, 0])

        if self.is_initializing():  # a loop may make no parameters
            step(state_BH, gates_BTG[:, 0])
        _, outputs = lax.scan(step, state_BH, gates_BTG.swapaxes(0, 1))
        state_BTH, seen_BTD, weights_BTS = (x.swapaxes(0, 1) for x in outputs)
        self.sow("intermediates", "cross_attention_weights", weights_BTS[:, None])
        return self._logits(x_BTD, state_BTH, seen_BTD, train, rows)

    def begin(
        self, source: Array, *, mask: Array | None = None, num_beams: int = 1, max_length: int
    ) -> tuple[Any, Any]:
        """What `step` needs: of the source, and the states `[B, W, H]`; see `Transformer.begin`."""
        del max_length
        memory_BSD, key_BSA, state_BH = self._encode(source, mask, False, None)
        state_BWH = jnp.repeat(state_BH[:, None], num_beams, axis=1)
        return (memory_BSD, key_BSA, mask), state_BWH

    def step(self, tokens: Array, position: Array, cache: Any, memory: Any) -> tuple[Array, Any]:
        """Logits `[B, W, V]` after one more token `[B, W]`, and the states; see `Transformer.step`."""
        del position
        memory_BSD, key_BSA, mask = memory
        x_BWD = self._embedded(tokens)
        state_BWH, seen_BWD, _ = self._step(cache, self._gates(x_BWD), key_BSA, memory_BSD, mask)
        return self._logits(x_BWD, state_BWH, seen_BWD, False, None), state_BWH

    def _encode(
        self, source: Array, mask: Array | None, train: bool, rows: Array | None
    ) -> tuple[Array, Array, Array]:
        """Outputs, keys, and the state that the target begins with."""
        x_BSD = self.source_dropout(self._embedded(source), train=train, rows=rows)
        memory_BSD, ends = self.encoder(x_BSD, train=train, rows=rows, mask=mask)
        # That of the direction that ends at the first word.
        state_BH = jnp.tanh(self.start(ends[1]))
        state_BH = state_BH.astype(jnp.promote_types(state_BH.dtype, jnp.float32))
        memory_BSD = self.memory_dropout(memory_BSD, train=train, rows=rows)
        return memory_BSD, self.cross_attention.keys(memory_BSD), state_BH

    def _embedded(self, tokens: Array) -> Array:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are integers [B, T], not {tokens.dtype} {tokens.shape}")
        x = self.embedding(tokens)
        return x * jnp.asarray(self.width**0.5, x.dtype)

    def _gates(self, x_BTD: Array) -> Array:
        dtype = x_BTD.dtype
        return ops.add_bias(ops.product(x_BTD, self.kernel.astype(dtype)), self.bias)

    def _step(
        self, state_BWH: Array, gates_BWG: Array, key_BSA: Array, memory_BSD: Array, mask: Array | None
    ) -> tuple[Array, Array, Array]:
        """The states of W sequences after one more token, and what each looked at before it."""
        seen_BWD, weights_BWS = self.cross_attention(state_BWH, key_BSA, memory_BSD, mask)
        dtype = gates_BWG.dtype
        gates_BWG = gates_BWG + ops.product(seen_BWD, self.context_kernel.astype(dtype))
        flat = [x.reshape(-1, x.shape[-1]) for x in (gates_BWG, state_BWH)]
        _, new = ops.gru(
            flat[0][None],
            self.recurrent_kernel.astype(dtype),
            self.recurrent_bias.astype(dtype),
            flat[1],
        )
        return new.reshape(state_BWH.shape), seen_BWD, weights_BWS

    def _logits(
        self, x_BTD: Array, state_BTH: Array, seen_BTD: Array, train: bool, rows: Array | None
    ) -> Array:
        y_BTD = jnp.tanh(self.readout(jnp.concatenate([x_BTD, state_BTH, seen_BTD], axis=2)))
        y_BTD = self.readout_dropout(y_BTD, train=train, rows=rows)
        return self.embedding.attend(y_BTD)


def sharding_rules() -> tuple[tuple[str, P], ...]:
    """Where the leaves of a training state lie, on a mesh with the axes "fsdp" and "tensor".

    Outputs of kernels and the vocabulary are cut over "tensor" and their inputs over "fsdp"; each has to
    divide evenly.

    Returns:
        ordered (pattern, spec) for the paths of `AttentionRNN`.
    """
    return (
        (r"(^|/)embedding/embedding$", P("tensor", "fsdp")),
        (r"(^|/)cross_attention/score/kernel$", P("tensor")),
        (r"(^|/)(\w+_)?kernel$", P("fsdp", "tensor")),
        (r"(^|/)(\w+_)?bias$", P("tensor")),
        (r"^(step|key|guard|health/\w+)$|^opt_state/(.+/)?(count|ns_coeffs)$", P()),
    )
