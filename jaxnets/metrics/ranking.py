"""How well scores rank items: one number for each query, whose `Mean` over queries merges exactly.

Ties count against the model: of items with equal scores the wanted one comes last, so a model that
says the same of all hits nothing. I: the items that are ranked.
"""

import chex
import jax.numpy as jnp

from jaxnets.typing import Array


def rank_of(scores: Array, wanted: Array, candidates: Array | None = None) -> Array:
    """The rank that one wanted item has among its candidates, from 1.

    Args:
        scores: `[B, I]`, greater is better. A NaN counts as greater than any number, except that of the
            wanted item, which then comes last.
        wanted: integers `[B]`, the item's place in the row. One that isn't in [0, I) is no item, and no
            list has it.
        candidates: boolean `[B, I]`, with whom it is ranked; all by default. Whether it has the wanted
            one makes no difference.

    Returns:
        int32 `[B]`, 1 to I; 2^31 - 1, which is within no k, where the wanted one is no item.

    Example:
        >>> rank_of(jnp.array([[0.1, 0.9, 0.5], [1.0, 1.0, 0.0]]), jnp.array([2, 0])).tolist()
        [2, 2]
    """
    chex.assert_rank([scores, wanted], [2, 1])
    chex.assert_equal_shape_prefix([scores, wanted], 1)
    own_B1 = jnp.take_along_axis(scores, wanted[:, None], axis=1)
    is_before_BI = ~(scores < own_B1)  # also where one of them is NaN
    if candidates is not None:
        chex.assert_equal_shape([scores, candidates])
        is_before_BI = is_before_BI & candidates
    is_wanted_BI = jnp.arange(scores.shape[1])[None] == wanted[:, None]
    ranks_B = 1 + jnp.sum(is_before_BI & ~is_wanted_BI, axis=1, dtype=jnp.int32)
    return jnp.where(jnp.any(is_wanted_BI, axis=1), ranks_B, jnp.iinfo(jnp.int32).max)


def is_hit(ranks: Array, k: int) -> Array:
    """Whether the wanted item is among the first k; its mean is HR@k.

    Args:
        ranks: `[B]`, from 1.
        k: at least 1.

    Returns:
        boolean `[B]`.
    """
    _check(k)
    return ranks <= k


def gain_at(ranks: Array, k: int) -> Array:
    """nDCG@k of queries that have one wanted item: `1 / log2(1 + rank)` if it is among the first k.

    Args:
        ranks: `[B]`, from 1.
        k: at least 1.

    Returns:
        float32 `[B]`.
    """
    _check(k)
    return jnp.where(ranks <= k, 1 / jnp.log2(1 + ranks.astype(jnp.float32)), 0)


def reciprocal_rank(ranks: Array) -> Array:
    """`1 / rank`, whose mean is the MRR (Voorhees 1999).

    Args:
        ranks: `[B]`, from 1.

    Returns:
        float32 `[B]`.
    """
    return 1 / ranks.astype(jnp.float32)


def ndcg(scores: Array, relevance: Array, k: int) -> Array:
    """Normalised discounted cumulative gain (Järvelin & Kekäläinen 2002), with gains as they are.

    `DCG / ideal DCG`, where `DCG = sum over the first k of relevance / log2(1 + rank)`. Items of equal
    scores share the mean of their gains (McSherry & Najork 2008), as in scikit-learn.

    Args:
        scores: `[B, I]`.
        relevance: `[B, I]`, at least 0.
        k: at least 1.

    Returns:
        `[B]`, in at least float32; 0 where nothing is relevant, NaN where a score or a relevance is.
    """
    _check(k)
    chex.assert_equal_shape([scores, relevance])
    chex.assert_rank(scores, 2)
    relevance = relevance.astype(jnp.promote_types(relevance.dtype, jnp.float32))
    place_I = jnp.arange(scores.shape[1])
    discount_I = jnp.where(place_I < k, 1 / jnp.log2(2 + place_I.astype(relevance.dtype)), 0)
    is_integer = not jnp.issubdtype(scores.dtype, jnp.floating)
    order_BI = jnp.argsort(~scores if is_integer else -scores, axis=1)
    sorted_BI = jnp.take_along_axis(scores, order_BI, axis=1)
    gains_BI = jnp.take_along_axis(relevance, order_BI, axis=1)
    # Runs of equal scores are groups; each item gets the mean gain of its group.
    is_new_BI = jnp.pad(sorted_BI[:, 1:] != sorted_BI[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    group_BI = jnp.cumsum(is_new_BI, axis=1) - 1
    rows_B1 = jnp.arange(scores.shape[0])[:, None]
    sums_BI = jnp.zeros_like(gains_BI).at[rows_B1, group_BI].add(gains_BI)
    counts_BI = jnp.zeros_like(gains_BI).at[rows_B1, group_BI].add(1)
    means_BI = jnp.take_along_axis(sums_BI / jnp.maximum(counts_BI, 1), group_BI, axis=1)
    gain_B = jnp.sum(means_BI * discount_I[None], axis=1)
    ideal_B = jnp.sum(-jnp.sort(-relevance, axis=1) * discount_I[None], axis=1)
    is_nan_B = (sorted_BI[:, -1] != sorted_BI[:, -1]) | jnp.isnan(ideal_B)  # NaN are sorted to the end
    found_B = jnp.where(ideal_B > 0, gain_B / jnp.where(ideal_B > 0, ideal_B, 1), 0)
    return jnp.where(is_nan_B, jnp.nan, found_B)


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"the first k are at least 1, not {k}")
