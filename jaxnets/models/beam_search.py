"""Beam search: the likeliest sequences that a model of the next token can say, W at a time.

Each row keeps its W best hypotheses. One that has ended stays as it is; the others are continued by
every token, and the W best of all are kept, by the sum of their log-probabilities over a penalty that
grows with their length (Wu et al. 2016, arXiv 1609.08144, section 7):

    score = log p / ((5 + length) / 6) ** alpha

With one beam that is greedy search. A row whose hypotheses have all ended changes no more, and the
search ends when all rows have, or at the greatest length. It is one `lax.while_loop`, for use inside
`jit`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.typing import Array, PyTree

StepFn = Callable[[Array, Array, PyTree], tuple[Array, PyTree]]
"""`step_fn(tokens [B, W], position, cache) -> (logits [B, W, V], cache)`, leaves `[B, W, ...]`"""


def beam_search(
    step_fn: StepFn,
    cache: PyTree,
    *,
    batch_size: int,
    num_beams: int,
    max_length: int,
    begin: int,
    end: int,
    length_penalty: float = 0.6,
    limits: Array | None = None,
) -> tuple[Array, Array]:
    """Search.

    Args:
        step_fn: `step_fn(tokens, position, cache) -> (logits, cache)`: what comes after the token
            `[B, W]` at a position, and the cache with that token in it; see `Transformer.step`.
        cache: of empty hypotheses; every leaf begins with `[B, W]`.
        batch_size: B.
        num_beams: W, at least 1.
        max_length: T, of a hypothesis, its end counted.
        begin: the token that begins a sentence; it isn't part of the hypothesis.
        end: the token that ends one.
        length_penalty: alpha, at least 0; 0 prefers short hypotheses, more of it longer ones.
        limits: `[B]`, lengths of each row below max_length; a hypothesis that has come to its row's has
            ended.

    Returns:
        tokens `[B, W, T]`, `end` from the end on, and their scores `[B, W]`, best first. A hypothesis
        of max_length tokens that found no end has none; one that its row's limit stopped is
        filled up with it.

    Raises:
        ValueError: if a number is out of range.
    """
    if num_beams < 1 or max_length < 1 or batch_size < 1 or length_penalty < 0:
        raise ValueError(
            f"a search of {batch_size} rows with {num_beams} beams of at most {max_length} tokens and "
            f"the length penalty {length_penalty} can't be"
        )
    limit_B = jnp.full((batch_size,), max_length) if limits is None else jnp.minimum(limits, max_length)

    def penalty(length: Array) -> Array:
        return ((5 + length) / 6) ** length_penalty

    def step(carry: dict[str, Any]) -> dict[str, Any]:
        t = carry["t"]
        logits_BWV, cache = step_fn(carry["last"], t, carry["cache"])
        dtype = jnp.promote_types(logits_BWV.dtype, jnp.float32)
        said_BWV = carry["log_p"][..., None] + jax.nn.log_softmax(logits_BWV.astype(dtype))
        size = said_BWV.shape[2]
        # One that has ended has a single continuation, by another end that costs nothing.
        is_end_V = jnp.arange(size) == end
        stays_BWV = jnp.where(is_end_V[None, None], carry["log_p"][..., None], -jnp.inf)
        done_BW = carry["done"]
        log_p_BWV = jnp.where(done_BW[..., None], stays_BWV, said_BWV)
        length_BW = jnp.where(done_BW, carry["length"], t + 1)
        score_BWV = log_p_BWV / penalty(length_BW)[..., None]
        score_BW, place_BW = lax.top_k(score_BWV.reshape(batch_size, -1), num_beams)
        parent_BW, token_BW = place_BW // size, place_BW % size

        def of_parent(x: Array) -> Array:
            index = parent_BW.reshape(parent_BW.shape + (1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, index, axis=1)

        log_p_BW = jnp.take_along_axis(log_p_BWV.reshape(batch_size, -1), place_BW, axis=1)
        tokens_BWT = lax.dynamic_update_index_in_dim(of_parent(carry["tokens"]), token_BW, t, axis=2)
        is_over_BW = (token_BW == end) | (t + 1 >= limit_B[:, None])
        return {
            "t": t + 1,
            "last": token_BW,
            "log_p": log_p_BW,
            "score": score_BW,
            "length": of_parent(length_BW),
            "tokens": tokens_BWT,
            "done": of_parent(done_BW) | is_over_BW,
            # With a single beam there is nobody to change places with.
            "cache": cache if num_beams == 1 else jax.tree.map(of_parent, cache),
        }

    def goes_on(carry: dict[str, Any]) -> Array:
        return (carry["t"] < max_length) & ~jnp.all(carry["done"])

    shape = (batch_size, num_beams)
    # All but the first hypothesis of a row are impossible, or the first step would keep W equal ones.
    start_BW = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)[None]
    start_BW = jnp.broadcast_to(start_BW, shape)
    first, _ = jax.eval_shape(step_fn, jnp.full(shape, begin), jnp.int32(0), cache)
    dtype = jnp.promote_types(first.dtype, jnp.float32)
    carry = {
        "t": jnp.int32(0),
        "last": jnp.full(shape, begin, jnp.int32),
        "log_p": start_BW.astype(dtype),
        "score": start_BW.astype(dtype),
        "length": jnp.zeros(shape, jnp.int32),
        "tokens": jnp.full((*shape, max_length), end, jnp.int32),
        "done": jnp.zeros(shape, bool),
        "cache": cache,
    }
    carry = lax.while_loop(goes_on, step, carry)
    return carry["tokens"], carry["score"]
