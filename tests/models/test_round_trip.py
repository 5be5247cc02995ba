"""Models of texts, languages, translations and recommendations go to a checkpoint and come back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import models, registry
from jaxnets.train import Checkpoints, create_state, make_strategy
from tests.models.tiny_gpt import TINY as GPT
from tests.models.tiny_translation import FIELDS, QUICK, draw

V, B, T = 11, 4, 5  # tokens, users, items or classes; rows; places
TINY = {
    "text_model": {"lstm_classifier": {"width": 4, "hidden": 3}, "weighted_naive_bayes": {}},
    "recommender": {
        "matrix_factorization": {"width": 4, "mean": 0.5},
        "embedding_dot": {"width": 4},
        "neumf": {"width": 4, "hidden": (8, 6, 4)},
        "two_tower": {"width": 4, "hidden": (6, 5)},
    },
    "translation_model": {name: {"vocabulary_size": V, **fields} for name, fields in FIELDS.items()},
    "language_model": {
        name: {**GPT, "vocabulary_size": V} for name in ("gpt", "gpt2_small", "gpt_100m")
    },
}
SIZES = {"text_model": (V, 3), "recommender": (V, V)}  # by position


def tokens_of(kind):
    shape = (B, 2) if kind == "recommender" else (B, T)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, shape).astype(np.int32))
    return {"source": tokens, "target": tokens[:, ::-1]} if kind == "translation_model" else tokens


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in TINY for name in registry.names(kind)]
)
def test_outputs_are_the_same_bit_for_bit(kind, name, tmp_path):
    model = registry.get(kind, name)(*SIZES.get(kind, ()), **TINY[kind][name])
    x = tokens_of(kind)
    init_fn, apply_fn = models.functional(model, x)
    strategy = make_strategy(num_devices=1)

    def make_state():
        drawn = draw(jax.eval_shape(init_fn, jax.random.key(0)))  # biases and statistics too
        return create_state(lambda key: drawn, optax.identity(), key=jax.random.key(0))

    @partial(jax.jit, compiler_options=QUICK)
    def outputs(params, model_state):
        return apply_fn(params, model_state, x, train=False)[0]

    state = strategy.init(make_state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path) as checkpoints:
        again, _ = checkpoints.restore(0, strategy.abstract(make_state))
    assert jax.tree.structure(again.params) == jax.tree.structure(state.params)
    found, expected = (outputs(one.params, one.model_state) for one in (again, state))
    assert found.dtype == expected.dtype
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found, expected)
