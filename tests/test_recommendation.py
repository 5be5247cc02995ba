"""What a recommender says of those that it has learnt nothing of."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import errors, models, recommendation
from jaxnets.data import ratings


@pytest.fixture
def saved():
    """User 30 and film 7 have no rating in training."""
    seen = ratings.packed_items(np.array([0, 1, 1]), np.array([0, 0, 1]), 3, 3)
    ids, titles = np.array([10, 20, 30]), np.array(["A", "B", "C"])
    bounds = np.array([1, 4], np.float32)
    catalogue = recommendation.Catalogue(ids, np.array([5, 6, 7]), titles, seen, 3.0, bounds)
    model = models.matrix_factorization(3, 3, width=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    return SimpleNamespace(
        asset=lambda name: catalogue.to_bytes(),
        model=(0, params, {}),
        config=SimpleNamespace(loss="squared_error"),
    )


def ask(saved, command, words=(), **flags):
    made = recommendation.make_commands(lambda config, known: models.matrix_factorization(3, 3, width=2))
    kind = type(made[command].flags)
    made[command].run(saved, words, kind(**flags))


def test_a_film_without_a_rating_in_training_is_not_recommended(saved, capsys):
    ask(saved, "recommend", user="10", count=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["B"]


def test_nothing_is_known_of_a_user_without_one(saved):
    with pytest.raises(errors.ConfigError, match="no rating of user 30 was trained on"):
        ask(saved, "recommend", user="30", count=1)


def test_predictions_of_those_come_with_a_warning(saved, capsys, recwarn):
    with pytest.warns(
        UserWarning, match="trained on of user 30, movie 7: predictions of those are chance"
    ):
        ask(saved, "predict", ["10:5", "30:5", "30:7"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    ask(saved, "predict", ["10:5"])
    assert not recwarn.list


@pytest.mark.parametrize(("factor", "expected"), [(1000, {"4.00"}), (-1000, {"1.00"})])
def test_stars_stay_within_those_of_training(saved, capsys, factor, expected):
    params = jax.tree.map(jnp.zeros_like, saved.model[1])
    params["item_bias"]["embedding"] = params["item_bias"]["embedding"] + factor
    saved.model = (0, params, {})
    ask(saved, "predict", ["10:5", "20:6"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("stars ")[1].split()[0] for line in lines} == expected
    ask(saved, "recommend", user="10", count=3)
    assert f"stars  {next(iter(expected))}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no archive"])
def test_a_damaged_catalogue(content):
    with pytest.raises(errors.ConfigError, match="the catalogue can't be read"):
        recommendation.Catalogue.from_bytes(content)
