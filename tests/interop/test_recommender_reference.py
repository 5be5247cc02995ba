"""Recommenders and their PyTorch reference compute the same, by whole tables and by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.movielens import Config, make_recipe
from jaxnets import errors, ops
from jaxnets.config import RunOptions
from jaxnets.interop.parity import check_parity
from jaxnets.interop.reference import load_reference
from jaxnets.interop.torch_side import fastest_optimizer


def recipe_of(**fields):
    plain = {"schedule": "constant", "batch_size": 64, "width": 8, "penalty": 0.1, "bias_penalty": 0.02}
    return make_recipe(Config(**{**plain, **fields}), RunOptions())


def reference_of(recipe):
    return load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("optimizer", "update_rows"),
    [
        *((name, False) for name in ("sgd", "adam", "adamw")),
        *((name, True) for name in ("sgd", "adagrad", "lazy_adam")),
    ],
)
def test_three_steps_are_the_same(optimizer, update_rows):
    recipe = recipe_of(optimizer=optimizer, update_rows=update_rows, learning_rate=0.02)
    report = check_parity(recipe, reference_of(recipe), num_steps=3)
    for dtype, bound in (("float64", 1e-9), ("float32", 1e-5)):
        assert report[dtype]["outputs"]["error"] < bound
        assert report[dtype]["gradients"]["num_tensors"] == 4
    assert report["float64"]["parameters after all steps"]["error"] < 1e-9


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "loss", "fields", "num_arrays"),
    [
        ("embedding_dot", "bce", {"update_rows": True, "optimizer": "lazy_adam"}, 2),
        ("neumf", "bce", {"weight_decay": 0.01, "width": 32}, 12),
        ("two_tower", "softmax", {"num_negatives": 6}, 10),
    ],
)
def test_sampled_films_are_the_same(model, loss, fields, num_arrays):
    recipe = recipe_of(model=model, loss=loss, penalty=0.0, bias_penalty=0.0, **fields)
    report = check_parity(recipe, reference_of(recipe), num_steps=2)
    assert report["float64"]["gradients"]["num_tensors"] == num_arrays
    assert report["float64"]["gradients"]["error"] < 1e-9
    assert report["float64"]["parameters after all steps"]["error"] < 1e-9


@pytest.mark.parity
def test_sampled_films_are_those_of_the_hash():
    """The first try that finds a film without a rating, of the bits of a place in the run."""
    import torch

    from benchmarks.torch_reference.sampled_items import make_sampler

    rng = np.random.default_rng(0)
    num_items, num_tries, key = 30, 3, jax.random.key(7)
    seen = rng.random((9, num_items)) < 0.6
    user, item = rng.integers(0, 9, 40), rng.integers(0, num_items, 40)
    place = np.arange(2**32 - 40, 2**32, dtype=np.uint32)
    bits = np.asarray(ops.row_bits(key, jnp.asarray(place), (5, num_tries)))
    tried = (bits % num_items).astype(int)
    expected = [
        [item[b], *(next((i for i in row if not seen[user[b], i]), row[0]) for row in rows)]
        for b, rows in enumerate(tried)
    ]
    words = jax.random.key_data(key).tolist()
    arrays = {"user": user, "item": item, "position": place.astype(np.int64), "seen": seen}
    batch = {name: torch.from_numpy(x) for name, x in arrays.items()}
    assert make_sampler(words, num_items, 5, num_tries)(batch).tolist() == expected


@pytest.mark.parity
def test_sparse_gradients_have_an_optimizer_though_trials_are_dense():
    import torch

    recipe = recipe_of(optimizer="lazy_adam", update_rows=True)
    reference = reference_of(recipe)
    model = reference.make_model()
    _, how = fastest_optimizer(reference.make_optimizer, model)
    assert how == "for sparse gradients"
    resident = reference.make_resident({name: x[:8] for name, x in recipe.train.items()})
    reference.loss_fn(model, reference.take(resident, torch.arange(8))).backward()
    assert model.item.weight.grad.is_sparse


@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "svd"}, "unknown model of the PyTorch reference"),
        ({"loss": "hinge"}, "unknown loss of the PyTorch reference"),
        ({"loss": "softmax"}, "softmax doesn't depend on one of matrix_factorization's biases"),
        ({"model": "neumf", "update_rows": True, "optimizer": "lazy_adam"}, "is for tables alone"),
        ({"optimizer": "lazy_adam"}, "unknown optimizer of the PyTorch reference"),
        ({"dtype": "bfloat16"}, "unknown dtype of the PyTorch reference"),
        ({"schedule": "cosine"}, "takes --schedule at its plainest alone"),
        ({"update_rows": True, "optimizer": "sgd", "weight_decay": 0.1}, "no weight decay"),
    ],
)
def test_what_the_reference_does_not_have(changes, match):
    from benchmarks.torch_reference import recommender

    arguments = {**recipe_of().torch_arguments, **changes}
    with pytest.raises(errors.ConfigError, match=match):
        recommender.reference(**arguments)


def test_the_recipe_hands_over_what_it_has_and_the_reference_has_not():
    arguments = recipe_of(schedule="linear", ema_decay=0.9).torch_arguments
    assert (arguments["schedule"], arguments["ema_decay"]) == ("linear", 0.9)
    assert "schedule" not in recipe_of().torch_arguments
    assert np.isclose(arguments["mean"], 3.83, atol=0.02)
