"""Generated ratings of low rank with biases: a recommender learns something, and needs no download."""

from pathlib import Path

import numpy as np

from jaxnets.data.datasets import check_verify
from jaxnets.data.progress import Progress
from jaxnets.data.ratings import Ratings

_RANK = 3
_NOISE = 0.4  # stars, of each rating


def load_generated(
    *, data_dir: Path | None = None, verify: str = "warn", progress: Progress = True
) -> Ratings:
    """12,000 ratings by 240 users of 300 films that don't exist; arguments as of the other loaders."""
    del data_dir, progress
    check_verify(verify)
    return generate_ratings()


def load_generated_1m(
    *, data_dir: Path | None = None, verify: str = "warn", progress: Progress = True
) -> Ratings:
    """A million ratings of as many users and items as ml-1m has, to measure speed on."""
    del data_dir, progress
    check_verify(verify)
    return generate_ratings(6040, 3706, mean_count=166, name="generated-1m")


def generate_ratings(
    num_users: int = 240,
    num_items: int = 300,
    *,
    mean_count: int = 50,
    seed: int = 0,
    name: str = "generated",
) -> Ratings:
    """Draw ratings: biases plus a product of rank 3, in half stars.

    Users rate what is popular, and what is to their taste, more often.

    Args:
        num_users: U.
        num_items: I.
        mean_count: ratings of a user in the mean, at most half of I.
        seed: of all of it.
        name: that they get.
    """
    rng = np.random.default_rng(seed)
    taste_UD = rng.normal(size=(num_users, _RANK))
    item_ID = rng.normal(size=(num_items, _RANK))
    bias_U, bias_I = rng.normal(0, 0.3, num_users), rng.normal(0, 0.4, num_items)
    popularity_I = rng.normal(0, 1, num_items) + bias_I
    counts = np.full(num_users, mean_count)
    shift = rng.integers(0, mean_count // 2 + 1, num_users // 2)  # as many more as others have fewer
    counts[: len(shift)] += shift
    counts[len(shift) : 2 * len(shift)] -= shift
    user = np.repeat(np.arange(num_users), counts)

    def affinity(u: np.ndarray, i: np.ndarray) -> np.ndarray:
        return 0.5 * np.sum(taste_UD[u] * item_ID[i], axis=-1) / np.sqrt(_RANK)

    items, every = [], np.arange(num_items)
    for u, count in enumerate(counts):
        # The greatest of scores with Gumbel noise are a draw without repetition.
        scores_I = popularity_I + 2 * affinity(np.array([u]), every) + rng.gumbel(size=num_items)
        items.append(rng.permutation(np.argpartition(-scores_I, count)[:count]))
    item = np.concatenate(items)
    stars = 3.5 + bias_U[user] + bias_I[item] + affinity(user, item)
    rating = stars + rng.normal(0, _NOISE, len(user))
    return Ratings(
        name=name,
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        rating=np.clip(np.round(rating * 2) / 2, 0.5, 5).astype(np.float32),
        time=np.cumsum(rng.integers(1, 1000, len(user))),
        user_ids=np.arange(1, num_users + 1),
        item_ids=np.arange(1, num_items + 1),
        titles=tuple(f"Generated film {i}" for i in range(1, num_items + 1)),
        source="generated",
    )
