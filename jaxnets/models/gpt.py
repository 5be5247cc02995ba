"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

A decoder-only transformer: learned positions, layer normalisation before each part of a block and once
at the end, GELU in its tanh form, and logits from the table of token embeddings. Weights start normal
with deviation 0.02, those that write to the residual stream smaller by `sqrt(2 L)`. What differs:
positions start at 0.02, too (0.01 in OpenAI's code), dropout is off by default (0.1 there), and the
vocabulary of 50,257 is filled up to 50,304, which splits over 2, 4 or 8 devices and more.

Rotary positions, no biases and the exact GELU are there as fields; nanoGPT
(github.com/karpathy/nanoGPT) takes the latter two.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxnets import errors, ops
from jaxnets.layers import Dropout, Embedding, KeyValues, LayerNorm, Linear, SelfAttention, constrain
from jaxnets.typing import Array, Params

_init = nn.initializers.normal(0.02)

REMAT: dict[str, Callable[..., bool] | None] = {
    "full": None,
    # Products of queries with keys, and of attention's weights with values, have the batch as an axis of
    # both: they grow with the square of the length, and are computed again.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is kept of a block for the gradient, beside its input: nothing, or its products with kernels."""


POSITIONS = ("learned", "rotary")
Cache = Mapping[str, KeyValues]
"""Keys and values of each block, by its name."""


class MLP(nn.Module):
    """Two linear layers with GELU between them.

    Attributes:
        hidden: F, the width between them.
        dtype: of the computation.
        out_init: of the second kernel.
        use_bias: whether biases are learnt.
        use_tanh: whether GELU is that of GPT-2, with tanh, or the exact one.
    """

    hidden: int
    dtype: DTypeLike | None = None
    out_init: nn.initializers.Initializer = _init
    use_bias: bool = True
    use_tanh: bool = True

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        linear = partial(Linear, use_bias=self.use_bias, dtype=self.dtype)
        h_BTF = linear((self.hidden,), kernel_init=_init, name="up")(x_BTD)
        h_BTF = jax.nn.gelu(h_BTF, approximate=True) if self.use_tanh else ops.gelu(h_BTF)
        h_BTF = constrain(h_BTF, "batch", None, "hidden")
        return linear((x_BTD.shape[2],), kernel_init=self.out_init, name="down")(h_BTF)


class Block(nn.Module):
    """Attention and an MLP, each behind a normalisation and added to the residual stream.

    Attributes:
        num_heads: N.
        hidden: F.
        dropout_rate: probability of dropping an attention weight or an element of what is added.
        dtype: of the computation.
        out_init: of the kernels that write to the residual stream.
        is_rotary: whether queries and keys are turned by their places.
        use_bias: whether biases are learnt, those of normalisations too.
        use_tanh: as of the MLP.
        chunk: of how many queries at a time attention's weights are computed.
    """

    num_heads: int
    hidden: int
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    out_init: nn.initializers.Initializer = _init
    is_rotary: bool = False
    use_bias: bool = True
    use_tanh: bool = True
    chunk: int | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        train: bool,
        rows: Array | None,
        mask: Array | None,
        places: Array | None = None,
        cache: KeyValues | None = None,
    ) -> Any:
        """`[B, T, D]` to `[B, T, D]`, and the new cache if there is one; arguments as of the model."""
        attend = SelfAttention(
            self.num_heads,
            is_causal=True,
            is_rotary=self.is_rotary,
            use_bias=self.use_bias,
            chunk=self.chunk,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            kernel_init=_init,
            out_init=self.out_init,
            name="attention",
        )
        norm = partial(LayerNorm, use_bias=self.use_bias)
        out: Any = attend(
            norm(name="norm1")(x_BTD), train=train, rows=rows, mask=mask, places=places, cache=cache
        )
        y_BTD, new_cache = (out, None) if cache is None else out
        y_BTD = Dropout(self.dropout_rate, name="dropout1")(y_BTD, train=train, rows=rows)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "time", None)
        mlp = MLP(self.hidden, self.dtype, self.out_init, self.use_bias, self.use_tanh, name="mlp")
        y_BTD = mlp(norm(name="norm2")(x_BTD))
        y_BTD = Dropout(self.dropout_rate, name="dropout2")(y_BTD, train=train, rows=rows)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "time", None)
        return x_BTD if cache is None else (x_BTD, new_cache)


class GPT(nn.Module):
    """A decoder-only transformer.

    Attributes:
        vocabulary_size: V, filled up to what splits over the devices.
        max_length: the longest T.
        num_layers: L.
        num_heads: N, of which the width is a multiple.
        width: D.
        hidden: F; 4 D by default.
        dropout_rate: probability of dropping an element, in four places.
        dtype: of the computation and of the logits; that of the parameters by default.
        remat: what the gradient computes again instead of keeping it: "none"; "full", all of a block but
            its input; "dots", all of it but the products with kernels.
        tie_embeddings: whether the logits come from the table of token embeddings or from a kernel of
            their own.
        positions: "learned", a table, or "rotary".
        use_bias: whether biases are learnt, those of normalisations too.
        use_tanh: whether GELU is that of GPT-2, with tanh, or the exact one.
        chunk: of how many queries at a time attention's weights are computed, in memory that then grows
            with T and not its square (see `layers.chunked_attention`); None for all at once.
        returns_hidden: whether the result is what the logits would be made of, `[B, T, D]`, for
            `losses.chunked_cross_entropy`.
    """

    vocabulary_size: int = 50304
    max_length: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    width: int = 768
    hidden: int | None = None
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    remat: str = "none"
    tie_embeddings: bool = True
    positions: str = "learned"
    use_bias: bool = True
    use_tanh: bool = True
    chunk: int | None = None
    returns_hidden: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
        places: Array | None = None,
        cache: Cache | None = None,
        only: Array | None = None,
    ) -> Any:
        """Predict the token after each one.

        Args:
            tokens: integers `[B, T]` in [0, V); T is at most max_length. Others make NaN.
            train: whether dropout is on.
            rows: `[B]`, the id of each row, to which its dropout masks belong.
            mask: boolean `[B, T]`, false for tokens that no other sees, such as padding; their own
                logits mean nothing. A mask `[B]` of rows that only fill up a batch is without effect.
            places: integers `[B, T]`, where in its row each token stands, below max_length; 0, 1, ... by
                default.
            cache: of the places before, as `empty_cache` makes it and the call before this returned it.
                A token then sees what is in it up to its own place. It takes places and no mask.
            only: `[B]`, the one of the T tokens of each row that the prediction is wanted for; all by
                default.

        Returns:
            logits `[B, T, V]`, or `[B, 1, V]` with `only`; with a cache, (logits, the new cache).

        Raises:
            ValueError: if the tokens are no integers `[B, T]` or more than max_length.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are integers [B, T], not {tokens.dtype} {tokens.shape}")
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens in a row; this model takes at most {self.max_length}")
        if self.positions not in POSITIONS:
            raise errors.unknown("kind of positions", self.positions, POSITIONS)
        if mask is not None and mask.ndim == 1:
            mask = None
        width, dtype = self.width, self.dtype
        embed = Embedding(
            self.vocabulary_size, width, dtype, _init, axis="vocabulary", name="token_embedding"
        )
        x_BTD = embed(tokens)
        if self.positions == "learned":
            place = Embedding(self.max_length, width, dtype, _init, name="position_embedding")
            if places is None:
                x_BTD = ops.add_bias(x_BTD, place(jnp.arange(length)))
            else:
                x_BTD = x_BTD + place(places)
        x_BTD = constrain(x_BTD, "batch", "time", None)
        x_BTD = Dropout(self.dropout_rate, name="dropout")(x_BTD, train=train, rows=rows)
        make_block, new_cache = self._block(), {}
        for i in range(1, self.num_layers + 1):
            name = f"block{i}"
            block = make_block(
                self.num_heads,
                self.hidden or 4 * self.width,
                self.dropout_rate,
                self.dtype,
                nn.initializers.normal(0.02 * (2 * self.num_layers) ** -0.5),
                self.positions == "rotary",
                self.use_bias,
                self.use_tanh,
                self.chunk,
                name=name,
            )
            if cache is None:
                x_BTD = block(x_BTD, train, rows, mask, places)
            else:
                x_BTD, new_cache[name] = block(x_BTD, train, rows, mask, places, cache[name])
        if only is not None:
            x_BTD = jnp.take_along_axis(x_BTD, only[:, None, None], axis=1)
        x_BTD = LayerNorm(use_bias=self.use_bias, name="norm")(x_BTD)
        if self.returns_hidden:
            out = x_BTD
        elif self.tie_embeddings:
            out = embed.attend(x_BTD)
        else:
            head = Linear(
                (self.vocabulary_size,), use_bias=False, dtype=self.dtype, kernel_init=_init, name="head"
            )
            out = head(x_BTD)
        if not self.returns_hidden:
            out = constrain(out, "batch", None, "vocabulary")
        return out if cache is None else (out, new_cache)

    def _block(self) -> Callable[..., Block]:
        if self.remat == "none":
            return Block
        if self.remat not in REMAT:
            raise errors.unknown("remat policy", self.remat, ["none", *REMAT])
        return nn.remat(Block, policy=REMAT[self.remat], static_argnums=(2,))


def empty_cache(model: GPT, batch_size: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """Room for the keys and values of so many places, for `model(..., cache=...)`.

    Args:
        model: whose.
        batch_size: B.
        length: S, at most its max_length where positions are learned.
        dtype: of the parameters; that of the model's computation counts, if it has one.
    """
    head_width = model.width // model.num_heads
    empty = partial(KeyValues.empty, batch_size, length, model.num_heads, head_width)
    return {f"block{i}": empty(model.dtype or dtype) for i in range(1, model.num_layers + 1)}


def output_table(model: GPT, params: Params) -> Array:
    """What the logits are products with, `[V, D]`: beside a model that `returns_hidden`."""
    if model.tie_embeddings:
        return params["token_embedding"]["embedding"]
    return params["head"]["kernel"].T


def gpt(vocabulary_size: int = 50304, **fields) -> GPT:
    """A model of any size."""
    return GPT(vocabulary_size, **fields)


def gpt2_small(vocabulary_size: int = 50304, **fields) -> GPT:
    """GPT-2's smallest: 124,475,904 parameters, 124,439,808 with the vocabulary of 50,257."""
    return GPT(vocabulary_size, **fields)


def gpt_100m(vocabulary_size: int = 50304, **fields) -> GPT:
    """103,212,288 parameters: 9 layers of 8 heads, which split over 2, 4 or 8 devices."""
    return GPT(vocabulary_size, **{"num_layers": 9, "num_heads": 8, **fields})


def sharding_rules(vocabulary_size: int | None = None) -> tuple[tuple[str, P], ...]:
    """Where the leaves of a training state lie, on a mesh with the axes "fsdp" and "tensor".

    Heads, hidden units and vocabulary are cut over "tensor" and the width over "fsdp", so that either
    cuts nearly every byte; only biases, less than a thousandth, aren't cut by both. There is no rule for
    everything: a parameter without one of its own is an error.

    Args:
        vocabulary_size: V; one that doesn't split over eight devices, as of characters, stays whole.

    Returns:
        ordered (pattern, spec). A pattern is searched for in paths such as
        "params/block3/attention/query/kernel", "opt_state/0/mu/norm/scale" or "step".
    """
    vocabulary = None if (vocabulary_size or 0) % 8 else "tensor"
    parameters = {
        "token_embedding/embedding": P(vocabulary, "fsdp"),
        "position_embedding/embedding": P(None, ("fsdp", "tensor")),
        r"block\d+/attention/(query|key|value)/kernel": P("fsdp", "tensor"),
        r"block\d+/attention/(query|key|value)/bias": P("tensor"),
        r"block\d+/attention/out/kernel": P("tensor", None, "fsdp"),
        r"block\d+/mlp/up/kernel": P("fsdp", "tensor"),
        r"block\d+/mlp/up/bias": P("tensor"),
        r"block\d+/mlp/down/kernel": P("tensor", "fsdp"),
        r"block\d+/(attention/out|mlp/down)/bias": P("fsdp"),
        r"(block\d+/norm[12]|norm)/(scale|bias)": P("fsdp"),
        "head/kernel": P("fsdp", vocabulary),
    }
    # Of the optimizers here; the parameter of such a name would still lack a rule under "params/".
    counters = (r"^(step|key|guard|health/\w+)$|^opt_state/(.+/)?(count|ns_coeffs)$", P())
    return (*((f"(^|/){path}$", spec) for path, spec in parameters.items()), counters)
