"""The step itself, with plain functions: it knows no Linen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.metrics import Mean
from jaxnets.train import create_state, make_strategy, make_train_step


def init_fn(key):
    return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}, {"seen": jnp.zeros(())}


def predict(params, x_BD):
    return x_BD @ params["w"] + params["b"]


def loss_fn(params, model_state, batch, *, key):
    error = predict(params, batch["x"]) - batch["y"]
    seen = {"seen": model_state["seen"] + 1}
    return {"square": error**2, "size": jnp.abs(error)}, seen, {"error": Mean.of(error)}


def weights_fn(batch):
    return {"square": batch["mask"] * batch["weight"], "size": batch["mask"].astype(float)}


def batch_of(num_rows=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, 3)).astype(np.float32)
    y = rng.normal(size=num_rows).astype(np.float32)
    mask = np.arange(num_rows) < num_rows - 2
    weight = rng.uniform(0.5, 2, num_rows).astype(np.float32)
    return {"x": x, "y": y, "mask": mask, "weight": weight}


def by_hand(params, batch, coefficient):
    error = predict(params, batch["x"]) - batch["y"]
    weight = batch["mask"] * batch["weight"]
    square = jnp.sum(error**2 * weight) / jnp.sum(weight)
    size = jnp.sum(jnp.abs(error) * batch["mask"]) / jnp.sum(batch["mask"])
    return square + coefficient * size


TX = optax.sgd(0.1)
STEP = functools.partial(
    make_train_step, loss_fn, TX, weights_fn=weights_fn, coefficients={"size": 0.25}
)


def start(strategy):
    return strategy.init(lambda: create_state(init_fn, TX, key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("name", "devices", "accumulate"),
    [("jit", 1, 1), ("jit", 2, 1), ("pmap", 4, 1), ("jit", 1, 4), ("pmap", 2, 2), ("jit", 2, 4)],
)
def test_the_loss_is_the_weighted_mean_over_the_global_batch(name, devices, accumulate):
    strategy = make_strategy(name, num_devices=devices)
    state, batch = start(strategy), batch_of()
    params = jax.device_get(state.params)
    expected, grads = jax.value_and_grad(by_hand)(params, batch, 0.25)
    step = strategy.compile_step(functools.partial(STEP, accumulate=accumulate))
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/square"] + metrics["loss/size"], expected, rtol=1e-6)
    for leaf in ("w", "b"):
        np.testing.assert_allclose(
            state.params[leaf], params[leaf] - 0.1 * grads[leaf], rtol=1e-5, atol=1e-6
        )
    assert int(state.model_state["seen"]) == accumulate
    assert int(state.step) == 1


def test_what_a_masked_row_holds_does_not_matter():
    strategy = make_strategy(num_devices=1)
    step = strategy.compile_step(STEP)
    clean, dirty = batch_of(), batch_of()
    dirty["x"][~dirty["mask"]] = 1e30
    dirty["y"][~dirty["mask"]] = -7
    one, _ = step(start(strategy), clean)
    two, _ = step(start(strategy), dirty)
    np.testing.assert_array_equal(one.params["w"], two.params["w"])


def test_the_mask_is_the_default_weight():
    def plain(params, model_state, batch, *, key):
        return {"loss": (predict(params, batch["x"]) - batch["y"]) ** 2}, model_state, {}

    strategy = make_strategy(num_devices=1)
    state, batch = start(strategy), batch_of()
    kept = {name: x[batch["mask"]] for name, x in batch.items()}
    error = predict(jax.device_get(state.params), kept["x"]) - kept["y"]
    step = strategy.compile_step(functools.partial(make_train_step, plain, TX))
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-6)


@pytest.mark.parametrize(("name", "devices"), [("jit", 1), ("jit", 8), ("pmap", 8)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_step_is_not_applied_and_none_after_it(name, devices, bad):
    strategy = make_strategy(name, num_devices=devices)
    step = strategy.compile_step(STEP)
    state, _ = step(start(strategy), batch_of())
    before = jax.device_get((state.params, state.opt_state, state.model_state))
    faulty = batch_of(seed=1)
    faulty["y"][0] = bad  # on one device of eight alone
    state, metrics = step(state, faulty)
    assert int(metrics["guard"]) == int(state.guard) == 1
    state, _ = step(state, batch_of(seed=2))
    after = jax.device_get((state.params, state.opt_state, state.model_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert int(state.step) == 1
    assert int(state.guard) == 1


def test_the_key_is_folded_with_the_step():
    def noisy(params, model_state, batch, *, key):
        noise = jax.random.normal(key, ())
        return {"loss": noise * jnp.ones(batch["y"].shape)}, model_state, {"noise": Mean.of(noise)}

    strategy = make_strategy(num_devices=1)
    step = strategy.compile_step(functools.partial(make_train_step, noisy, TX))
    state, seen = start(strategy), []
    run_key = jax.random.clone(state.key)  # the state itself is used up
    for _ in range(3):
        state, metrics = step(state, batch_of())
        seen.append(float(metrics["noise"]))
    assert len(set(seen)) == 3
    np.testing.assert_array_equal(*map(jax.random.key_data, (state.key, run_key)))
    expected = jax.random.normal(jax.random.fold_in(run_key, 1), ())
    assert seen[1] == float(expected)


def test_one_trace_for_all_steps():
    traces = []

    def counted(params, model_state, batch, *, key):
        traces.append(1)
        return loss_fn(params, model_state, batch, key=key)

    strategy = make_strategy(num_devices=2)
    make_step = functools.partial(make_train_step, counted, TX, weights_fn=weights_fn)
    step = strategy.compile_step(make_step)
    state, _ = step(start(strategy), batch_of())
    first = len(traces)
    for seed in range(3):
        state, _ = step(state, batch_of(seed=seed))
    assert len(traces) == first


def test_eager_equals_jit():
    results = []
    for use_jit in (True, False):
        strategy = make_strategy(num_devices=1, use_jit=use_jit)
        step = strategy.compile_step(functools.partial(STEP, accumulate=2))
        state = start(strategy)
        for seed in range(3):
            state, _ = step(state, batch_of(seed=seed))
        results.append(np.asarray(state.params["w"]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_clear_errors():
    strategy = make_strategy(num_devices=1)
    with pytest.raises(ValueError, match="accumulate"):
        make_train_step(loss_fn, TX, accumulate=0)
    unknown = functools.partial(make_train_step, loss_fn, TX, coefficients={"sqare": 2.0})
    with pytest.raises(ValueError, match=r"coefficients for \['sqare'\]"):
        strategy.compile_step(unknown)(start(strategy), batch_of())
    no_weights = functools.partial(
        make_train_step, loss_fn, TX, weights_fn=lambda batch: {"size": batch["mask"]}
    )
    with pytest.raises(ValueError, match="no weights for the loss term 'square'"):
        strategy.compile_step(no_weights)(start(strategy), batch_of())
    with pytest.raises(ValueError, match="micro-batches"):
        strategy.compile_step(functools.partial(STEP, accumulate=3))(start(strategy), batch_of())
