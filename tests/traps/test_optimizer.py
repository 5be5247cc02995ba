"""Optimizers against NumPy written by hand, decay by name, rates at the edges, small updates."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import models, registry
from jaxnets.train import create_state, make_schedule, make_strategy, make_train_step, optim
from jaxnets.train.mesh import path_of
from tests.traps import probe

RATE, MOMENTUM, DECAY, CLIP, STEPS = 0.01, 0.8, 0.1, 1.0, 20


def decays(p):
    return DECAY if p.ndim > 1 else 0.0


def average(s, name, decay, new):
    """`s[name] = decay * s[name] + (1 - decay) * new`, from zero."""
    s[name] = decay * s.get(name, 0.0) + (1 - decay) * new
    return s[name]


def sgd(g, p, s, t):
    s["v"] = MOMENTUM * s.get("v", 0.0) + g + decays(p) * p
    return -RATE * s["v"]


def adam_direction(g, s, t, *, epsilon=1e-8, is_nesterov=False):
    m, v = average(s, "m", MOMENTUM, g), average(s, "v", 0.999, g * g)
    if is_nesterov:
        ahead, now = MOMENTUM ** (t + 1), MOMENTUM**t
        m_hat = MOMENTUM * m / (1 - ahead) + (1 - MOMENTUM) * g / (1 - now)
    else:
        m_hat = m / (1 - MOMENTUM**t)
    return m_hat / (np.sqrt(v / (1 - 0.999**t)) + epsilon)


def adam(g, p, s, t):
    return -RATE * adam_direction(g + decays(p) * p, s, t)


def adamw(g, p, s, t):
    return -RATE * (adam_direction(g, s, t) + decays(p) * p)


def nadamw(g, p, s, t):
    return -RATE * (adam_direction(g, s, t, is_nesterov=True) + decays(p) * p)


def lamb(g, p, s, t):
    update = adam_direction(g, s, t, epsilon=1e-6) + decays(p) * p
    return -RATE * update * np.linalg.norm(p) / np.linalg.norm(update)


def lion(g, p, s, t):
    sign = np.sign(MOMENTUM * s.get("m", 0.0) + (1 - MOMENTUM) * g)
    average(s, "m", 0.99, g)
    return -RATE * (sign + decays(p) * p)


def rmsprop(g, p, s, t):
    g = g + decays(p) * p
    scaled = g / np.sqrt(average(s, "v", 0.9, g * g) + 1e-8)
    s["m"] = MOMENTUM * s.get("m", 0.0) + RATE * scaled
    return -s["m"]


def adagrad(g, p, s, t):
    g = g + decays(p) * p
    s["sum"] = s.get("sum", 0.1) + g * g
    return -RATE * g / np.sqrt(s["sum"] + 1e-7)


def newton_schulz(x, num_steps, epsilon):
    """With the smaller square, as the records do it."""
    x = x / (np.linalg.norm(x) + epsilon)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(num_steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


def muon(g, p, s, t):
    """Nesterov's momentum with bias correction; Adam with the same for what is no matrix."""
    if p.ndim < 2:
        return -RATE * (adam_direction(g, s, t, is_nesterov=True) + decays(p) * p)
    m = average(s, "m", MOMENTUM, g)
    ahead, now = MOMENTUM ** (t + 1), MOMENTUM**t
    m_hat = MOMENTUM * m / (1 - ahead) + (1 - MOMENTUM) * g / (1 - now)
    matrix = newton_schulz(m_hat.reshape(-1, p.shape[-1]), 5, 1e-8)
    matrix = matrix * max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
    return -RATE * (matrix.reshape(p.shape) + decays(p) * p)


def muon_sgd(g, p, s, t):
    """Kernels of convolutions orthogonal steps at a norm that is set; SGD at rates of their own."""
    momentum = MOMENTUM if p.ndim > 2 else 0.85
    s["v"] = momentum * s.get("v", 0.0) + g
    ahead = momentum * s["v"] + g
    if p.ndim <= 2:
        return -RATE * ((5.5 if p.ndim == 2 else 110.0) * ahead + decays(p) * p)
    matrix = newton_schulz(ahead.reshape(-1, p.shape[-1]), 3, 1e-7).reshape(p.shape)
    kept = p * p.shape[-1] ** 0.5 / np.linalg.norm(p)
    return kept - p - RATE * (matrix + decays(p) * p)


BY_HAND = {
    fn.__name__: fn for fn in (sgd, adam, adamw, nadamw, lamb, lion, rmsprop, adagrad, muon, muon_sgd)
}


def test_every_optimizer_is_written_down_here():
    assert set(registry.names("optimizer")) == set(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_twenty_steps_with_decay_and_clipping_are_those_by_hand(name, x64):
    """In float64; two kernels decay and their biases don't, and some of the gradients are clipped."""
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": rng.normal(size=(2, 2, 3, 5)), "bias": rng.normal(size=5)},
        "head": {"kernel": rng.normal(size=(6, 3)), "bias": rng.normal(size=3)},
    }
    tx = registry.get("optimizer", name)(
        RATE, momentum=MOMENTUM, weight_decay=DECAY, decay_mask=optim.matrices_only
    )
    tx = optim.clipped(tx, CLIP)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(grads, state, ours):
        updates, state = tx.update(grads, state, ours)
        return optax.apply_updates(ours, updates), state

    ours, state = params, tx.init(params)
    memory = jax.tree.map(lambda _: {}, params)
    num_clipped, params = 0, jax.tree.map(np.copy, params)
    for t in range(1, STEPS + 1):
        scale = 10.0 ** rng.uniform(-2.0, 0.5)
        grads = jax.tree.map(lambda p, scale=scale: scale * rng.normal(size=p.shape), params)
        ours, state = step(grads, state, ours)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        num_clipped += norm > CLIP
        for layer, leaves in params.items():
            for leaf, p in leaves.items():
                g = grads[layer][leaf] * min(1, CLIP / norm)
                leaves[leaf] = p + BY_HAND[name](g, p, memory[layer][leaf], t)
    assert 3 < num_clipped < STEPS - 3
    for layer, leaves in params.items():
        for leaf, expected in leaves.items():
            found = np.asarray(ours[layer][leaf])
            assert found.dtype == np.float64
            np.testing.assert_allclose(
                found, expected, rtol=1e-10, atol=1e-12, err_msg=f"{layer} {leaf}"
            )


@pytest.mark.parametrize("name", sorted(tiny.TINY))
def test_what_decays_by_name(name):
    """A golden list for each model: kernels do; biases, and scales of normalisations, don't."""
    golden = json.loads((Path(__file__).parent / "decayed.json").read_text())
    model = registry.get("model", name)(num_classes=4, **tiny.TINY[name])
    init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))
    params, _ = jax.eval_shape(init_fn, jax.random.key(0))
    found = {"decayed": [], "spared": []}
    for path, is_decayed in jax.tree_util.tree_leaves_with_path(optim.matrices_only(params)):
        found["decayed" if is_decayed else "spared"].append(path_of(path))
    assert found == golden[name]


def test_rates_at_the_edges_and_by_optimizer_steps_not_micro_batches():
    """Steps 0 and 1, around the end of the warm-up, the last and beyond; and what a step takes."""
    num_steps, peak = 20, 0.5
    for name in ("constant", "linear", "cosine"):
        rate = make_schedule(name, peak, num_steps, warmup=0.25, end=0.1)

        def by_hand(t, name=name):
            if t < 5:
                return peak * t / 5
            done = min((t - 5) / 15, 1)
            left = {"constant": None, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[name]
            return peak * (1 if left is None else 0.1 + 0.9 * left)

        for t in (0, 1, 4, 5, 6, num_steps - 1, num_steps, num_steps + 1, 10 * num_steps):
            np.testing.assert_allclose(rate(t), by_hand(t), rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(rate(jnp.int32(t)), by_hand(t), rtol=1e-6, atol=1e-8)
    assert make_schedule(name, peak, num_steps)(0) == peak

    def loss_fn(params, model_state, batch, *, key):
        return {"loss": params * batch["x"]}, model_state, {}

    tx, where = optim.sgd(rate), make_strategy(num_devices=1)
    step = where.compile_step(functools.partial(make_train_step, loss_fn, tx, accumulate=4))
    state = where.init(lambda: create_state(lambda key: (jnp.zeros(()), {}), tx, key=jax.random.key(0)))
    for t in range(8):
        before = float(state.params)
        state, _ = step(state, {"x": np.ones(8, np.float32)})
        np.testing.assert_allclose(before - float(state.params), by_hand(t), rtol=1e-5, atol=1e-7)


def test_a_thousand_tiny_updates_move_the_weights_of_a_bfloat16_model():
    """Each is below what bfloat16 can add to 1; parameters in float32 take them all."""

    def loss_fn(params, model_state, batch, *, key):
        y = batch["x"].astype(jnp.bfloat16) * params["w"].astype(jnp.bfloat16)
        return {"loss": y}, model_state, {}

    tx, where = optim.sgd(1e-4), make_strategy(num_devices=1)
    assert float(jnp.bfloat16(1) - jnp.bfloat16(1e-4)) == 1  # the trap
    step = where.compile_step(functools.partial(make_train_step, loss_fn, tx), num_steps=1000)
    state = where.init(
        lambda: create_state(lambda key: ({"w": jnp.ones(())}, {}), tx, key=jax.random.key(0))
    )
    state, _ = step(state, {"x": np.ones((1000, 4), np.float32)})
    assert state.params["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.params["w"], 0.9, rtol=1e-4)


def test_moments_of_a_bfloat16_model_are_float32():
    """Of every optimizer, without compiling: nothing of the state is in a lower precision."""
    init_fn, _, loss_fn = probe.normed(dtype=jnp.bfloat16)
    draw = {"index": np.arange(8), "mask": np.ones(8, bool)}
    for name in registry.names("optimizer"):
        tx = registry.get("optimizer", name)(0.1, momentum=0.9, weight_decay=0.1)
        state = jax.eval_shape(lambda tx=tx: create_state(init_fn, tx, key=jax.random.key(0)))
        state, _ = jax.eval_shape(make_train_step(loss_fn, tx), state, {**probe.arrays(8), **draw})
        floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert floats == {np.dtype("float32")}, name
