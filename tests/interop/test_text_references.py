"""The classifier of texts and the translator compute what their PyTorch references compute."""

import pytest

from experiments import imdb_sentiment, multi30k
from jaxnets import errors
from jaxnets.config import RunOptions
from jaxnets.interop.parity import check_parity
from jaxnets.interop.reference import load_reference

LSTM = {
    "vocabulary_size": 60, "max_length": 12, "buckets": (), "width": 8, "hidden": 6, "batch_size": 16,
    "dropout_rate": 0.0, "recurrent_dropout_rate": 0.0,
}  # fmt: skip
TRANSFORMER = {
    "num_layers": 2, "width": 16, "num_heads": 4, "hidden": 24, "max_length": 24, "batch_size": 16,
    "dropout": 0.0, "schedule": "constant", "warmup": 0.0, "clip_norm": None, "ema_decay": None,
    "weight_decay": 0.01,
}  # fmt: skip
CASES = {
    "lstm": (imdb_sentiment, LSTM),
    "transformer": (multi30k, TRANSFORMER),
    "attention_rnn": (multi30k, {**TRANSFORMER, "model": "attention_rnn"}),
}


def recipe_of(name, **changes):
    module, fields = CASES[name]
    return module.make_recipe(module.Config(**{**fields, **changes}), RunOptions())


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_the_same(name):
    """Texts of any length, padded: neither side sees the padding."""
    recipe = recipe_of(name)
    reference = load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)
    report = check_parity(recipe, reference, num_steps=3)
    assert report["float64"]["parameters after 1 step"]["error"] < 1e-9
    assert report["float32"]["outputs"]["error"] < 1e-5
    assert report["float64"]["gradients"]["num_tensors"] > 5
    assert report["float64"]["parameters after all steps"]["error"] < 1e-9


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("lstm", {"model": "weighted_naive_bayes"}, "is an lstm_classifier of one layer"),
        ("lstm", {"is_bidirectional": True}, "is an lstm_classifier of one layer"),
        ("lstm", {"dropout_rate": 0.1}, "has no dropout on the recurrent output"),
        ("lstm", {"dtype": "bfloat16"}, "unknown dtype of the PyTorch reference"),
        ("lstm", {"optimizer": "lion"}, "unknown PyTorch optimizer"),
        ("lstm", {"schedule": "cosine"}, "does not have --schedule"),
        ("attention_rnn", {"dtype": "bfloat16"}, "unknown dtype of the PyTorch reference"),
        ("transformer", {"optimizer": "adam"}, "unknown optimizer of the PyTorch reference"),
        ("transformer", {"dtype": "bfloat16"}, "unknown dtype of the PyTorch reference"),
        ("transformer", {"clip_norm": 1.0}, "does not have --clip-norm"),
    ],
)
def test_what_the_references_do_not_have(name, changes, match):
    recipe = recipe_of(name, **changes)
    with pytest.raises(errors.ConfigError, match=match):
        load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)
