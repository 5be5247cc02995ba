"""experiments.movielens on generated ratings: protocols, commands, exact resume, and bad input."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import movielens
from experiments.movielens import Config, make_recipe
from jaxnets import cli, errors
from jaxnets.config import RunOptions
from jaxnets.data import Batches, load_ratings, ratings, take
from jaxnets.train import Checkpoints
from jaxnets.train.stored_model import read_model

ROWS = ("--update-rows", "--optimizer", "lazy_adam")
QUICK = ("--epochs", "1", "--eval-every", "1000")


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXNETS_DATA", str(tmp_path / "data"))


def run(command, *words):
    if command in ("train", "crossvalidate") and "--num-devices" not in words:
        words = (*words, "--num-devices", "1")
    return cli.main(movielens.EXPERIMENT, [command, *words])


def result_of(folder):
    return json.loads((folder / "result.json").read_text())["eval"]


def params_of(folder):
    checkpoints = Checkpoints(folder / "checkpoints")
    return jax.device_get(read_model(checkpoints, checkpoints.latest())[0])


def recipe_of(**fields):
    return make_recipe(Config(**fields), RunOptions())


def start(recipe):
    return recipe.init_fn(jax.random.key(0))


def evaluated(recipe, params):
    """Over all of the test set at once."""
    size = len(recipe.test["user"])
    batch = take(recipe.test, Batches(size, size, size, shuffle=False)[0])
    found = jax.jit(recipe.eval_fn)(params, {}, jax.tree.map(jnp.asarray, batch))
    return {name: float(metric.compute()) for name, metric in found.items()}


def test_by_default_it_trains_offline_and_learns(tmp_path, capsys):
    assert run("train", "--epochs", "12", "--eval-every", "1000", *ROWS) == 0
    folder = tmp_path / "runs" / "movielens"
    data = load_ratings("generated")
    fold = ratings.five_folds(data)
    found, spread = result_of(folder), data.rating[fold == 0].std()
    assert found["count"] == 2400
    assert found["rmse"] < 0.8 * spread
    assert found["mae"] < found["rmse"]
    assert "test rmse 0." in capsys.readouterr().out
    assert not (folder / "confusion.png").exists()

    assert run("recommend", "--user", "42", "--count", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    seen = data.item[(data.user == 41) & (fold != 0)]
    assert f"who has rated {len(seen)} films in training" in lines[0]
    stars = []
    for rank, line in enumerate(lines[1:], start=1):
        found = re.fullmatch(r" *(\d+)  stars +(\d\.\d\d) +(\d+)  Generated film \3", line)
        assert found, line
        assert int(found[1]) == rank
        assert int(found[3]) - 1 not in seen
        stars.append(float(found[2]))
    assert stars == sorted(stars, reverse=True)

    assert run("predict", f"42:{lines[1].split()[-1]}") == 0
    assert f": stars {stars[0]:.2f}  Generated film" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", *QUICK, "--run-dir", str(folder)) == 0
    return ("--run-dir", str(folder))


def test_predictions_from_a_file_to_a_file(trained, tmp_path, capsys):
    capsys.readouterr()
    pairs, out = tmp_path / "pairs.csv", tmp_path / "out.csv"
    pairs.write_text('userId,movieId\n1,1\n"3","7",5.0\n240,300\n')
    assert run("predict", "--input", str(pairs), "--output", str(out), *trained) == 0
    assert capsys.readouterr().out == f"3 predictions in {out}\n"
    header, *rows = out.read_text().splitlines()
    assert header == "userId,movieId,stars"
    assert [row.split(",")[:2] for row in rows] == [["1", "1"], ["3", "7"], ["240", "300"]]
    assert all(0.5 <= float(row.split(",")[2]) <= 5 for row in rows)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recommend"], "recommend to whom? --user ID"),
        (["recommend", "--user", "241"], "knows no user 241: it was trained on 240, numbered 1 to 240"),
        (["recommend", "--user", "bob"], "a user is given by the number in the data, not 'bob'"),
        (["recommend", "--user", "1", "--count", "301"], "count is 1 to 300"),
        (["predict"], "give either texts, as predict 42:318"),
        (["predict", "1:1", "--input", "bad.csv"], "give either texts"),
        (["predict", "1:301"], "text 1: the model knows no movie 301"),
        (["predict", "1"], "text 1 is no pair of a user and a movie, as 42:318"),
        (["predict", "--input", "bad.csv"], "bad.csv, line 2: the model knows no user 999"),
        (["predict", "--input", "none.csv"], "none.csv can't be read"),
        (["predict", "--input", "latin.csv"], "latin.csv, line 1: not UTF-8"),
        (["predict", "1:1", "--output", "no/x.csv"], "no/x.csv can't be written: there is no folder no"),
    ],
)  # fmt: skip
def test_what_commands_refuse(trained, tmp_path, capsys, words, expected):
    (tmp_path / "bad.csv").write_text("1,1\n999,1\n")
    (tmp_path / "latin.csv").write_bytes(b"1,\xff\n")
    capsys.readouterr()
    assert run(*words, *trained) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--fold", "5"], "fold is one of 0 to 4, not 5"),
        (["--loss", "mse"], "unknown loss 'mse'"),
        (["--model", "neumf"], "neumf doesn't predict ratings"),
        (["--model", "two_tower", "--loss", "bce", "--penalty", "1"], "two_tower has no penalty"),
        (["--model", "neumf", "--loss", "bce", "--width", "8"], "neumf has the paper's widths"),
        (["--penalty", "-1"], "penalty must be at least 0"),
        (["--width", "0"], "width must be at least 1"),
        (["--optimizer", "lazy_adam"], "unknown optimizer 'lazy_adam'"),
        (["--update-rows"], "needs an --optimizer of rows: adagrad, lazy_adam, sgd, not adam"),
        (["--dataset", "ml-10m"], "unknown ratings 'ml-10m'"),
        (["--official-folds"], "generated has no official folds"),
        ([*ROWS, "--ema-decay", "0.9"], "no moving average"),
        ([*ROWS, "--fixed-order", "4"], "there is no fixed order"),
    ],
)
def test_what_training_refuses(capsys, words, expected):
    assert run("train", *words) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("rows", [(), ROWS])
def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(tmp_path, rows):
    words = ("--loss", "bce", *rows, "--schedule", "constant", "--eval-every", "1000")
    assert run("train", *words, "--steps", "7", "--run-dir", "one") == 0
    assert run("train", *words, "--steps", "3", "--run-dir", "two") == 0
    assert run("train", *words, "--steps", "7", "--run-dir", "two") == 0
    left, right = params_of(tmp_path / "one"), params_of(tmp_path / "two")
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)
    assert result_of(tmp_path / "one") == result_of(tmp_path / "two")


@pytest.mark.parametrize(
    "words", [("--strategy", "pmap"), ("--strategy", "fsdp"), ("--strategy", "tensor")]
)
def test_devices_make_no_difference(tmp_path, words):
    rest = ("--loss", "bce", *ROWS, "--steps", "4", "--eval-every", "1000", "--width", "16")
    assert run("train", *rest, "--run-dir", "one", "--num-devices", "1") == 0
    assert run("train", *rest, "--run-dir", "two", "--num-devices", "4", *words) == 0
    left, right = params_of(tmp_path / "one"), params_of(tmp_path / "two")
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("words", "is_rare"), [((), True), (("--patience", "1"), False)])
def test_crossvalidation_with_patience_evaluates_as_often_as_training(monkeypatch, words, is_rare):
    seen = []
    monkeypatch.setattr(cli, "main", lambda experiment, argv: seen.append(argv) or 1)
    assert movielens.crossvalidate(words) == 1
    assert ("--eval-every" in seen[0]) == is_rare


def test_crossvalidation_takes_every_fold_and_the_mean(tmp_path, capsys):
    assert run("crossvalidate", *QUICK, "--run-dir", "runs/cv") == 0
    found = [result_of(tmp_path / "runs" / f"cv-fold-{k}") for k in range(5)]
    assert len({result["rmse"] for result in found}) == 5
    assert sum(result["count"] for result in found) == 12_000
    rmse, mae = capsys.readouterr().out.splitlines()[-2:]
    for line, name in ((rmse, "rmse"), (mae, "mae")):
        mean = np.mean([result[name] for result in found])
        assert line.startswith(f"five-fold {name} {mean:.4f} (deviation 0.")
    assert run("crossvalidate", "--fold", "1") == 2
    assert "leave out --fold" in capsys.readouterr().err
    assert run("crossvalidate", "--loss", "bce") == 2
    assert "crossvalidate is of ratings" in capsys.readouterr().err
    assert run("crossvalidate", "--run-dir", ".") == 2
    assert "has no name that a fold's could begin with" in capsys.readouterr().err
    assert run("crossvalidate", "--num-processes", "2") == 2
    assert "crossvalidate trains in one process" in capsys.readouterr().err
    assert cli.main(movielens.EXPERIMENT, ["--help"]) == 0
    assert re.search("^crossvalidate +train on all five folds", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("scale", [1, 2])
def test_errors_are_of_stars_as_they_can_be(scale, monkeypatch):
    made = load_ratings("generated")
    scaled = dataclasses.replace(made, rating=made.rating * scale)
    monkeypatch.setattr(movielens, "load_ratings", lambda *_, **__: scaled)
    recipe = recipe_of()
    params, _ = start(recipe)
    params["user_bias"]["embedding"] = params["user_bias"]["embedding"].at[:9].set(3.0 * scale)
    found = evaluated(recipe, params)
    stars = recipe.predict_fn(params, {}, {k: jnp.asarray(x) for k, x in recipe.test.items()})
    assert stars.max() > 5 * scale
    error = np.clip(stars, 0.5 * scale, 5 * scale) - recipe.test["rating"]
    np.testing.assert_allclose(found["rmse"], np.sqrt(np.mean(error**2)), rtol=1e-5)
    np.testing.assert_allclose(found["mae"], np.mean(np.abs(error)), rtol=1e-5)


@pytest.mark.parametrize("model", ["embedding_dot", "neumf", "two_tower"])
def test_ranks_are_those_of_the_protocol(model):
    """Leave-one-out by hand: every score from its pair, ranked by NumPy."""
    recipe = recipe_of(model=model, loss="bce")
    params, _ = start(recipe)
    params = jax.tree.map(lambda x: x * 3, params)
    found = evaluated(recipe, params)
    data, test = load_ratings("generated"), recipe.test
    latest = ratings.latest_of_each_user(data)
    assert test["user"].tolist() == data.user[latest].tolist()
    assert len(recipe.train["user"]) == len(data) - 240
    shape = (data.num_users, data.num_items)
    users, items = np.meshgrid(*(np.arange(n, dtype=np.int32) for n in shape), indexing="ij")
    scores = np.asarray(recipe.predict_fn(params, {}, {"user": users.ravel(), "item": items.ravel()}))
    scores = scores.reshape(shape)
    rated = np.zeros(shape, bool)
    rated[recipe.train["user"], recipe.train["item"]] = True
    ranks = {"all": [], "sampled99": []}
    for row, (user, wanted) in enumerate(zip(test["user"], test["item"], strict=True)):
        own = scores[user, wanted]
        others = ~rated[user] & (np.arange(data.num_items) != wanted)
        ranks["all"].append(1 + np.sum(scores[user][others] >= own))
        sampled = test["sampled"][row]
        assert not rated[user][sampled].any()
        assert wanted not in sampled
        ranks["sampled99"].append(1 + np.sum(scores[user][sampled] >= own))
    for name, rank in ranks.items():
        rank = np.array(rank)
        assert abs(found[f"hr10_{name}"] - np.mean(rank <= 10)) < 0.009  # two users, for rounding
        gains = np.where(rank <= 10, 1 / np.log2(1 + rank), 0)
        assert abs(found[f"ndcg10_{name}"] - gains.mean()) < 0.009
    assert abs(found["mrr_all"] - np.mean(1 / np.array(ranks["all"]))) < 0.009


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ("embedding_dot", "bce"),
        pytest.param("neumf", "bce", marks=pytest.mark.long),
        pytest.param("two_tower", "softmax", marks=pytest.mark.long),
    ],
)
def test_implicit_feedback_is_learnt(tmp_path, model, loss):
    """Chance has a tenth of the wanted films among the first ten of a hundred."""
    words = ("--model", model, "--loss", loss, "--epochs", "12", "--eval-every", "1000", *ROWS)
    assert run("train", *words, "--learning-rate", "0.02") == 0
    found = result_of(tmp_path / "runs" / "movielens")
    assert found["hr10_sampled99"] > 0.25
    assert found["hr10_all"] > 2 * 10 / 250


def test_sampled_films_belong_to_an_example_s_place_in_the_run():
    recipe = recipe_of(loss="bce", num_negatives=5, update_rows=True, optimizer="sgd")
    complete = recipe.tables.complete
    batch = take(recipe.train, Batches(1000, 64, 6400, seed=1)[3])
    whole = complete(jax.tree.map(jnp.asarray, batch))
    assert whole["items"].shape == (64, 6)
    np.testing.assert_array_equal(whole["items"][:, 0], batch["item"])
    part = complete(jax.tree.map(lambda x: jnp.asarray(x[::-1][:16]), batch))
    np.testing.assert_array_equal(part["items"], whole["items"][::-1][:16])
    assert complete(whole) is whole
    later = complete({**batch, "position": batch["position"] + 64})
    assert np.mean(np.asarray(later["items"][:, 1:]) == np.asarray(whole["items"][:, 1:])) < 0.1
    other = recipe_of(loss="bce", num_negatives=5, update_rows=True, optimizer="sgd", seed=1)
    assert np.mean(other.tables.complete(batch)["items"][:, 1:] == whole["items"][:, 1:]) < 0.1
    # Evenly over all films that a user hasn't rated in training.
    position = jnp.arange(6000, dtype=jnp.uint32)
    of_one = {"user": jnp.full(6000, 7), "item": jnp.zeros(6000, jnp.int32), "position": position}
    counts = np.bincount(np.asarray(complete(of_one)["items"][:, 1:]).ravel(), minlength=300)
    assert len(counts) == 300
    is_rated = np.isin(np.arange(300), recipe.train["item"][recipe.train["user"] == 7])
    assert 20 < is_rated.sum() < 150
    # All of a film's draws fail once in so many.
    assert counts[is_rated].sum() < 3 * 30_000 * np.mean(is_rated) ** 4 + 10
    expected = counts[~is_rated].mean()
    # chi-square of up to 279 degrees of freedom
    assert np.sum((counts[~is_rated] - expected) ** 2 / expected) < 380


def test_the_penalty_is_a_term_of_the_loss():
    recipe = recipe_of(penalty=0.5, bias_penalty=2.0)
    params, _ = start(recipe)
    params["item_bias"]["embedding"] = params["item_bias"]["embedding"] + 0.5
    batch = take(recipe.train, Batches(1000, 8, 8)[0])
    terms, _, _ = recipe.loss_fn(params, {}, jax.tree.map(jnp.asarray, batch), key=jax.random.key(0))
    vectors = [np.asarray(params[n]["embedding"])[batch[n]] for n in ("user", "item")]
    expected = 0.5 * sum((x**2).sum(1) for x in vectors) + 2.0 * 0.25
    np.testing.assert_allclose(terms["penalty"], expected, rtol=1e-5)
    assert set(recipe_of().loss_fn(params, {}, batch, key=jax.random.key(0))[0]) == {"loss"}


def test_the_catalogue_is_the_same_bytes_every_time():
    left, right = (recipe_of().assets["catalogue.npz"] for _ in range(2))
    assert left == right
    known = np.load(io.BytesIO(left), allow_pickle=False)
    assert known["titles"][41] == "Generated film 42"


def test_a_user_without_a_second_rating_can_not_be_held_out():
    data = load_ratings("generated")
    rows = np.unique(data.user, return_index=True)[1]
    fields = {name: getattr(data, name)[rows] for name in ("user", "item", "rating", "time")}
    single = dataclasses.replace(data, **fields)
    with pytest.raises(errors.ConfigError, match="no user with two ratings"):
        movielens.split_implicit(single, Config())
