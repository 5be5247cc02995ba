"""What a trained recommender is asked: films for a user, and the ratings of pairs."""

import csv
import dataclasses
import io
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxnets import errors
from jaxnets.commands import Command, SavedRun, read_texts, write_output
from jaxnets.data import ratings

CATALOGUE = "catalogue.npz"
"""The name of the catalogue among a run's assets."""


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """What a model needs beside its weights: who and what its numbers are, and who has rated what.

    Attributes:
        user_ids: int64 `[U]`, ascending, as the data has them.
        item_ids: int64 `[I]`, the same.
        titles: str `[I]`.
        seen: uint8 `[U, ceil(I / 8)]`, a bit for each item that a user has rated in training.
        mean: what ratings are about; 0 where the model has none.
        bounds: the least and the greatest rating in training, `[2]`, in stars; what is predicted lies
            between.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    titles: np.ndarray
    seen: np.ndarray
    mean: float
    bounds: np.ndarray

    @classmethod
    def of(cls, data: ratings.Ratings, train: Any, mean: float) -> "Catalogue":
        """That of ratings, of which `train` has "user" and "item" of those that are learnt from.

        With "rating" among them it has their bounds, too, otherwise those of all ratings.
        """
        found = np.asarray(train.get("rating", data.rating), np.float32)
        bounds = np.array([found.min(), found.max()])
        seen = ratings.packed_items(train["user"], train["item"], data.num_users, data.num_items)
        return cls(data.user_ids, data.item_ids, np.asarray(data.titles, np.str_), seen, mean, bounds)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Catalogue":
        """What `to_bytes` gave.

        Raises:
            ConfigError: if it isn't that.
        """
        try:
            arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
            return cls(**{**arrays, "mean": float(arrays["mean"])})
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            reason = errors.first_line(error)
            raise errors.ConfigError(f"the catalogue can't be read: {reason}") from None

    @property
    def is_learnt(self) -> tuple[np.ndarray, np.ndarray]:
        """Boolean `[U]` and `[I]`: who and what has a rating that was trained on."""
        items = np.unpackbits(np.bitwise_or.reduce(self.seen, axis=0), count=len(self.item_ids))
        return np.asarray(self.seen.any(axis=1)), items.astype(bool)

    def to_bytes(self) -> bytes:
        """All of it, in NumPy's format."""
        content = io.BytesIO()
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in _FIELDS}
        np.savez(content, allow_pickle=False, **arrays)
        return content.getvalue()


_FIELDS = dataclasses.fields(Catalogue)


@dataclasses.dataclass(frozen=True)
class RecommendFlags:
    """To whom, and how many."""

    user: str = ""  # The id that the user has in the data.
    count: int = 10  # How many films.


@dataclasses.dataclass(frozen=True)
class PredictFlags:
    """Pairs in a file instead of words, and a file instead of lines."""

    input: Path | None = None  # A file with a line "userId,movieId" for each.
    output: Path | None = None  # A file for "userId,movieId,stars" (or score), in place of the terminal.


def make_commands(make_model: Callable[[Any, Catalogue], nn.Module]) -> dict[str, Command]:
    """The commands of an experiment of recommendation: `recommend` and `predict`.

    Args:
        make_model: `make_model(config, catalogue)`, as the experiment made it; where `config.loss` is
            "squared_error" its scores are stars.
    """
    return {
        "recommend": Command(
            "titles of films for a user: recommend --user 42",
            partial(_recommend, make_model),
            flags=RecommendFlags(),
        ),
        "predict": Command(
            "what users think of films: predict USER:MOVIE ...",
            partial(_predict, make_model),
            flags=PredictFlags(),
            words="USER:MOVIE",
        ),
    }


def _recommend(make_model, saved: SavedRun, words: Sequence[str], flags: RecommendFlags) -> None:
    del words
    if not flags.user:
        raise errors.ConfigError("recommend to whom? --user ID, as in the data")
    known, model, params = _restored(make_model, saved)
    user = ratings.number_of(known.user_ids, flags.user, "user")
    size = len(known.item_ids)
    if not 1 <= flags.count <= size:
        raise errors.ConfigError(f"count is 1 to {size}, the films there are, not {flags.count}")
    scores_I = model.apply({"params": params}, jnp.array([user]), method="all_items")[0]
    user_is_learnt, item_is_learnt = known.is_learnt
    if not user_is_learnt[user]:
        raise errors.ConfigError(f"no rating of user {flags.user} was trained on: nothing is known")
    is_seen_I = jnp.unpackbits(jnp.asarray(known.seen[user]), count=size) == 1
    # Nothing was learnt of a film without a rating in training: its score is chance.
    is_left_out = is_seen_I | ~jnp.asarray(item_is_learnt)
    scores_I = jnp.where(is_left_out, -jnp.inf, scores_I.astype(jnp.float32))
    best, items = jax.lax.top_k(scores_I, flags.count)
    what = _unit(saved)
    print(f"for user {flags.user}, who has rated {int(is_seen_I.sum())} films in training:")
    for rank, (score, item) in enumerate(zip(best.tolist(), items.tolist(), strict=True), start=1):
        if np.isfinite(score):
            score = float(np.clip(score, *known.bounds)) if what == "stars" else score
            print(f"{rank:>3}  {what} {score:5.2f} {known.item_ids[item]:>7}  {known.titles[item]}")


def _predict(make_model, saved: SavedRun, words: Sequence[str], flags: PredictFlags) -> None:
    texts, places = read_texts(words, flags.input, example="predict 42:318, by the ids in the data,")
    mark = ":" if flags.input is None else ","
    asked = [(place, _cells(text, mark)) for place, text in zip(places, texts, strict=True)]
    if flags.input is not None:
        head = [cell.strip() for cell in asked[0][1][:2]] == ["userId", "movieId"]
        asked = [(place, cells[:2]) for place, cells in asked[head:]]
    if not asked:
        raise errors.DataError(f"{flags.input} has no line behind its head")
    known, model, params = _restored(make_model, saved)
    pairs = []
    for where, cells in asked:
        if len(cells) != 2:
            raise errors.ConfigError(f"{where} is no pair of a user and a movie, as 42{mark}318")
        try:
            user = ratings.number_of(known.user_ids, cells[0], "user")
            pairs.append((user, ratings.number_of(known.item_ids, cells[1], "movie")))
        except errors.ConfigError as error:
            raise errors.ConfigError(f"{where}: {error}") from None
    _warn_of_chance(known, pairs)
    scores = np.asarray(model.apply({"params": params}, jnp.array(pairs)), np.float32)
    what = _unit(saved)
    if what == "stars":
        scores = np.clip(scores, *known.bounds)
    ids = [(known.user_ids[u], known.item_ids[i]) for u, i in pairs]
    if flags.output is not None:
        rows = [f"{u},{i},{score:.4f}" for (u, i), score in zip(ids, scores.tolist(), strict=True)]
        content = "\n".join([f"userId,movieId,{what}", *rows]) + "\n"
        write_output(flags.output, content, f"{len(rows):,} predictions")
        return
    for (u, i), score, (_, item) in zip(ids, scores.tolist(), pairs, strict=True):
        print(f"user {u}, movie {i}: {what} {score:.2f}  {known.titles[item]}")


def _warn_of_chance(known: Catalogue, pairs: Sequence[tuple[int, int]]) -> None:
    """Name those of whom nothing was learnt."""
    users, items = known.is_learnt
    found = {f"user {known.user_ids[u]}": None for u, _ in pairs if not users[u]}
    found |= {f"movie {known.item_ids[i]}": None for _, i in pairs if not items[i]}
    if found:
        more = f" and {len(found) - 5:,} more" if len(found) > 5 else ""
        warnings.warn(
            f"no rating was trained on of {', '.join(list(found)[:5])}{more}: predictions of those are "
            "chance",
            stacklevel=2,
        )


def _cells(text: str, mark: str) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=mark))
    except csv.Error:  # of a cell that is too long
        return [text]


def _unit(saved: SavedRun) -> str:
    """What a model says of a film: stars, or a score that only orders films."""
    return "stars" if saved.config.loss == "squared_error" else "score"


def _restored(make_model, saved: SavedRun) -> tuple[Catalogue, Any, Any]:
    """The catalogue, the model and its parameters."""
    known = Catalogue.from_bytes(saved.asset(CATALOGUE))
    _, params, _ = saved.model
    return known, make_model(saved.config, known), params
