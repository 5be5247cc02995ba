from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import models

# Without LLVM's optimisations, which take most of the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(3)
IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 1)), jnp.float32)
EXAMPLE = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)


def stateless():
    return models.mlp(num_classes=3, hidden=(8,), dropout_rate=0.5)


def stateful():
    return models.convnet(num_classes=3, features=(4,), hidden=8, dropout_rate=0.0)


def test_what_a_model_without_state_gives():
    init_fn, apply_fn = models.functional(stateless(), EXAMPLE)
    params, model_state = jit(init_fn)(KEY)
    assert model_state == {}
    assert set(params) == {"dense1", "head"}
    for train in (True, False):
        output, after = apply_fn(params, model_state, IMAGE, train=train, key=KEY)
        assert output.shape == (6, 3)
        assert after == model_state


def test_only_training_changes_the_state():
    init_fn, apply_fn = models.functional(stateful(), EXAMPLE)
    params, model_state = jit(init_fn)(KEY)
    assert set(model_state) == {"batch_stats"}
    before = jax.tree.map(np.array, model_state)
    _, after = apply_fn(params, model_state, IMAGE, train=False)
    jax.tree.map(np.testing.assert_array_equal, after, model_state)
    _, after = jit(lambda *x: apply_fn(*x, train=True))(params, model_state, IMAGE)
    assert type(after) is type(model_state)
    assert jax.tree.structure(after) == jax.tree.structure(model_state)
    for new, old, kept in zip(*map(jax.tree.leaves, (after, model_state, before)), strict=True):
        assert (new != old).any()
        np.testing.assert_array_equal(old, kept)  # the old one is left as it was


def test_the_start_is_that_of_the_module_and_depends_on_the_key_alone():
    model = stateful()
    init_fn, _ = models.functional(model, EXAMPLE)
    params, model_state = jit(init_fn)(KEY)
    variables = jit(model.init)(KEY, IMAGE[:1])  # other content than zeros
    same = zip(*map(jax.tree.leaves, ({"params": params, **model_state}, variables)), strict=True)
    for left, right in same:
        np.testing.assert_array_equal(left, right)
    other, _ = jit(init_fn)(jax.random.key(4))
    assert (other["head"]["kernel"] != params["head"]["kernel"]).any()


def test_key_and_rows_reach_dropout():
    init_fn, apply_fn = models.functional(stateless(), EXAMPLE)
    variables = jit(init_fn)(KEY)
    apply = jit(lambda key, rows: apply_fn(*variables, IMAGE, train=True, key=key, rows=rows)[0])
    rows = jnp.arange(6)
    output = apply(KEY, rows)
    np.testing.assert_array_equal(apply(KEY, rows), output)
    assert (apply(jax.random.key(9), rows) != output).any()
    assert (apply(KEY, rows + 6) != output).any()
    np.testing.assert_array_equal(apply(KEY, rows.at[0].set(99))[1:], output[1:])
    with pytest.raises(Exception, match="dropout"):
        apply_fn(*variables, IMAGE, train=True)


def test_the_mask_reaches_the_batch_statistics():
    init_fn, apply_fn = models.functional(stateful(), EXAMPLE)
    variables = jit(init_fn)(KEY)
    step = jit(lambda image, mask: apply_fn(*variables, image, train=True, mask=mask)[1])
    mask = jnp.arange(6) < 4
    kept = step(IMAGE, mask)
    changed = step(IMAGE.at[4:].set(50.0), mask)
    for left, right in zip(jax.tree.leaves(kept), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (step(IMAGE, mask)["batch_stats"]["norm1"]["mean"]
            != step(IMAGE, mask | True)["batch_stats"]["norm1"]["mean"]).any()  # fmt: skip
