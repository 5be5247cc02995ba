"""Classifiers of texts: what the contract suite asks of the models of images."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxnets import losses, models, registry
from jaxnets.models import text_classifier
from jaxnets.train.mesh import shard_by_rules
from tests.models.eight_devices import QUICK, assert_close, assert_eight_equal_one, sums_and_gradients

NAMES = registry.names("text_model")
every_model = pytest.mark.parametrize("name", NAMES)
V, C, B, T = 11, 3, 16, 6  # words, classes, rows, places
TINY = {"lstm_classifier": {"width": 4, "hidden": 3}, "weighted_naive_bayes": {}}
NUM_PARAMS = {  # 20,000 words, two classes
    "lstm_classifier": 20_000 * 128 + (128 + 128 + 1) * 4 * 128 + 128 * 2 + 2,
    "weighted_naive_bayes": 20_000 + 2,
}
HAS_DROPOUT = {"lstm_classifier"}


def tiny(name, **fields):
    model = registry.get("text_model", name)(V, C, **{**TINY[name], **fields})
    return models.functional(model, jax.ShapeDtypeStruct((1, T), jnp.int32))


@cache
def start(name):
    """Parameters and statistics drawn by NumPy, biases too."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(tiny(name)[0], jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.5, shapes)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def batch_of():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, B)
    return {
        "tokens": jnp.asarray(rng.integers(0, V, (B, T)).astype(np.int32)),
        "places": jnp.asarray(np.arange(T) < lengths[:, None]),
        "label": jnp.asarray(rng.integers(0, C, B)),
        "index": jnp.asarray(rng.permutation(1000)[:B]),
        "mask": jnp.asarray(rng.random(B) < 0.8),
    }


def logits_of(name, start, batch, **fields):
    params, model_state = start
    return tiny(name, **fields)[1](
        params,
        model_state,
        batch["tokens"],
        train=True,
        key=jax.random.key(1),
        rows=batch["index"],
        mask=batch["places"],
    )[0]


def train(name, start, batch, axis_name=None):
    """The loss and gradients over the global batch, and this part's logits."""

    def loss_fn(params):
        logits = logits_of(name, (params, start[1]), batch)
        loss = losses.softmax_cross_entropy(logits, batch["label"])
        return jnp.where(batch["mask"], loss, 0).sum(), logits

    return sums_and_gradients(loss_fn, start[0], axis_name)


@every_model
def test_outputs_gradients_and_the_number_of_traces(name):
    traces = []

    def step(start, batch):
        traces.append(None)
        return train(name, start, batch)

    step = jax.jit(step, compiler_options=QUICK)
    given, batch = cast(start(name), np.float32), batch_of()
    loss, grads, logits = step(given, batch)
    assert logits.shape == (B, C)
    assert logits.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all()
        assert np.any(np.asarray(leaf) != 0), f"{jax.tree_util.keystr(path)} learns nothing"
    learnt = jax.tree.map(jnp.subtract, given[0], grads)
    step((learnt, given[1]), jax.tree.map(lambda x: x[::-1], batch))
    assert len(traces) == 1
    assert_close(train(name, given, batch), (loss, grads, logits), rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_eight_devices_equal_one(name, strategy, x64):
    given, batch = cast(start(name), np.float64), batch_of()
    assert_eight_equal_one(partial(train, name), given, batch, strategy)


@every_model
def test_a_row_does_not_depend_on_the_others(name):
    given, batch = cast(start(name), np.float32), batch_of()
    apply_fn = tiny(name)[1]
    evaluate = jax.jit(lambda x: apply_fn(*given, x, train=False, mask=batch["places"])[0])
    expected = np.asarray(evaluate(batch["tokens"]))
    for other in (0, V - 1, -1, V, 10**6):
        others = jnp.full_like(batch["tokens"], other).at[3].set(batch["tokens"][3])
        found = evaluate(others)
        np.testing.assert_array_equal(found[3], expected[3])
        assert np.isnan(found[4]).all() == (not 0 <= other < V)


@every_model
def test_training_follows_the_rows_wherever_they_are(name):
    given, batch = cast(start(name), np.float32), batch_of()
    expected = np.asarray(logits_of(name, given, batch))
    turned = logits_of(name, given, jax.tree.map(lambda x: x[::-1], batch))
    np.testing.assert_allclose(turned[::-1], expected, rtol=1e-5, atol=1e-6)
    other = logits_of(name, given, {**batch, "index": batch["index"] + 1})
    assert np.allclose(other, expected) == (name not in HAS_DROPOUT)


def test_pooling_that_is_not_there():
    with pytest.raises(ValueError, match="pooling"):
        logits_of(
            "lstm_classifier", cast(start("lstm_classifier"), np.float32), batch_of(), pooling="men"
        )


@pytest.mark.parametrize("name", sorted(HAS_DROPOUT))
def test_the_compute_dtype_is_not_that_of_the_parameters(name):
    given, batch = cast(start(name), np.float32), batch_of()
    low = logits_of(name, given, batch, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), logits_of(name, given, batch), atol=0.05)
    shapes, _ = jax.eval_shape(tiny(name, dtype=jnp.bfloat16)[0], jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@every_model
def test_the_sharding_rules_cut_every_parameter(name):
    model = registry.get("text_model", name)(12, 2, **TINY[name] | ({"hidden": 4} if TINY[name] else {}))
    init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, T), jnp.int32))
    params, model_state = jax.eval_shape(init_fn, jax.random.key(0))
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    state = {"params": params, "model_state": model_state, "step": jnp.int32(0)}
    shardings = shard_by_rules(state, text_classifier.sharding_rules(), mesh)
    for path, sharding in jax.tree.leaves_with_path(shardings):
        is_small = path[-1].key == "step" or [part.key for part in path[-2:]] == ["head", "bias"]
        is_small = is_small or (name == "weighted_naive_bayes" and path[-1].key == "bias")
        assert sharding.is_fully_replicated == is_small, path


@every_model
def test_the_number_of_parameters(name):
    model = registry.get("text_model", name)(20_000, 2)
    init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, 9), jnp.int32))
    params, _ = jax.eval_shape(init_fn, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == NUM_PARAMS[name]
