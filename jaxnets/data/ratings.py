"""Ratings of items by users: what every loader returns, and the splits of the published protocols."""

import dataclasses
import operator
from pathlib import Path

import numpy as np

from jaxnets import errors, registry
from jaxnets.data import order
from jaxnets.data.datasets import check_verify, data_folder
from jaxnets.data.progress import Progress

_NEGATIVES = 2**60  # added to a seed, so that this draw has a stream of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Ratings:
    """Who rated what, how and when; all of it in memory.

    Users are numbered 0..U-1 and items 0..I-1 by their ids in the files, ascending; items that nobody
    rated have no number. The N ratings are in the order of the file.

    Attributes:
        name: that it was loaded by.
        user: int32 `[N]`.
        item: int32 `[N]`; no pair of user and item comes twice.
        rating: float32 `[N]`, in stars.
        time: int64 `[N]`, seconds since 1970.
        user_ids: int64 `[U]`, the ids in the files.
        item_ids: int64 `[I]`.
        titles: of the items.
        source: where it came from, for the log.
        fold: int8 `[N]`, the official test set of five that each rating is in; None if there are none.
    """

    name: str
    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    titles: tuple[str, ...]
    source: str
    fold: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)

    def __len__(self) -> int:
        return len(self.user)

    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`user`, `item` and `rating` of some ratings, `[M]` each."""
        return {"user": self.user[rows], "item": self.item[rows], "rating": self.rating[rows]}


def load_ratings(
    name: str, *, data_dir: Path | None = None, verify: str = "warn", progress: Progress = True
) -> Ratings:
    """Load ratings, downloading them first if they aren't there.

    Args:
        name: of a registered set, such as generated, ml-latest-small, ml-100k or ml-1m.
        data_dir: as of `jaxnets.data.load`.
        verify: "warn", or "strict", to refuse files whose bytes can't be checked against a digest.
        progress: of a download.

    Raises:
        ConfigError: if there is no such set.
        DataError: if it can't be downloaded, or is damaged.
    """
    check_verify(verify)
    loader = registry.get("ratings", name)
    folder = data_folder(data_dir, "movielens")
    try:
        return loader(data_dir=folder, verify=verify, progress=progress)
    except OSError as error:
        place = error.filename or folder
        raise errors.DataError(f"{name}: can't read {place}: {error.strerror or error}") from error


def number_of(ids: np.ndarray, wanted: str, kind: str) -> int:
    """The number of a user or an item by its id in the files.

    Args:
        ids: int64 `[M]`, ascending.
        wanted: the id as a user of a command typed it.
        kind: "user" or "item", for the message.

    Raises:
        ConfigError: if it isn't a number, or there is none of that id.

    Example:
        >>> number_of(np.array([3, 7, 8]), "7", "user")
        1
    """
    if not (wanted.isascii() and wanted.strip().isdecimal() and len(wanted) <= 18):
        raise errors.ConfigError(f"a {kind} is given by the number in the data, not {wanted[:40]!r}")
    value = int(wanted)
    place = int(np.searchsorted(ids, value))
    if place < len(ids) and ids[place] == value:
        return place
    near = ids[np.argsort(np.abs(ids - np.float64(value)), kind="stable")[:3]]
    raise errors.ConfigError(
        f"the model knows no {kind} {value}: it was trained on {len(ids)}, numbered {ids[0]} to "
        f"{ids[-1]}, the nearest {', '.join(map(str, sorted(near)))}"
    )


def five_folds(ratings: Ratings, *, seed: int = 0, official: bool = False) -> np.ndarray:
    """Which of five test sets each rating is in.

    Args:
        ratings: to be split.
        seed: of a random split, whose parts differ by one rating at most.
        official: take the folds of the files instead, as u1 to u5 of ml-100k.

    Returns:
        int8 `[N]`, 0..4.

    Raises:
        ConfigError: if there are no official folds, or fewer than five ratings.
    """
    if official:
        if ratings.fold is None:
            raise errors.ConfigError(f"{ratings.name} has no official folds; ml-100k does")
        return ratings.fold
    if len(ratings) < 5:
        raise errors.ConfigError(f"{ratings.name} has {len(ratings)} ratings, too few for five folds")
    place = order.index(operator.index(seed), np.arange(len(ratings)), len(ratings))
    fold = np.empty(len(ratings), np.int8)
    fold[place] = np.arange(len(ratings)) % 5
    return fold


def latest_of_each_user(ratings: Ratings) -> np.ndarray:
    """The rows of each user's latest rating, for the protocol leave-one-out (He et al. 2017).

    The latest is the one with the greatest time; of several, as when somebody rates a list at once, the
    last in the file. Users with a single rating have none.

    Returns:
        int64 `[at most U]`, by user.
    """
    sorted_ = np.lexsort((np.arange(len(ratings)), ratings.time, ratings.user))
    users = ratings.user[sorted_]
    is_last = np.append(users[1:] != users[:-1], True)
    counts = np.bincount(ratings.user, minlength=ratings.num_users)
    rows = sorted_[is_last]
    return rows[counts[ratings.user[rows]] > 1]


def unseen_items(ratings: Ratings, users: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """For each user items that they never rated, drawn evenly without repetition.

    Args:
        ratings: all of them, of training and test.
        users: `[M]`, numbers of users.
        count: J, how many.
        seed: of the draw, which for each user depends on that and the user alone.

    Returns:
        int32 `[M, J]`.

    Raises:
        ConfigError: if a user has fewer such items.
    """
    seen = packed_items(ratings.user, ratings.item, ratings.num_users, ratings.num_items)
    size, users = ratings.num_items, np.asarray(users, np.int64)
    drawn = np.empty((len(users), count), np.int32)
    # One epoch of the stream is a permutation of the items: the first of it that are new to the user.
    # For most the beginning will do.
    width = min(size, 2 * count + 64)
    first_MJ = order.index(seed + _NEGATIVES, users[:, None] * size + np.arange(width), size)
    for row, (user, items) in enumerate(zip(users.tolist(), first_MJ, strict=True)):
        is_new = np.unpackbits(seen[user], count=size) == 0
        found = items[is_new[items]]
        if len(found) < count:
            items = order.index(seed + _NEGATIVES, user * size + np.arange(size), size)
            found = items[is_new[items]]
        if len(found) < count:
            raise errors.ConfigError(
                f"user {ratings.user_ids[user]} has {len(found)} items left that they didn't rate; "
                f"{count} are to be drawn"
            )
        drawn[row] = found[:count]
    return drawn


def packed_items(user: np.ndarray, item: np.ndarray, num_users: int, num_items: int) -> np.ndarray:
    """Which items each user has rated, a bit for each.

    Args:
        user: int `[N]`.
        item: int `[N]`.
        num_users: U.
        num_items: I.

    Returns:
        uint8 `[U, ceil(I / 8)]`; `np.unpackbits(row, count=num_items)` is a user's.
    """
    bits = np.zeros((num_users, -(-num_items // 8)), np.uint8)
    np.bitwise_or.at(bits, (user, item >> 3), (128 >> (item & 7)).astype(np.uint8))
    return bits
