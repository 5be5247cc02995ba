"""The loss, its gradients and what is logged: one weighted mean, however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import losses
from jaxnets.metrics import Mean
from jaxnets.train import create_state, make_strategy, make_train_step, optim
from tests.traps import probe

B, T, D, V = 24, 5, 3, 4
RATE, DECAY, CLIP = 0.5, 0.25, 0.05
TX = optim.clipped(optim.sgd(RATE, momentum=0.5, weight_decay=DECAY), CLIP)
# Devices and micro-batches of every kind, with parts that hold nothing but padding.
QUICK = [("jit", 1, 3), ("jit", 8, 3), ("pmap", 8, 3)]
LONG = [("jit", 1, 1), ("jit", 1, 2), ("jit", 2, 3), ("jit", 8, 1), ("pmap", 2, 2), ("pmap", 4, 1)]
WAYS = [*QUICK, *(pytest.param(way, marks=pytest.mark.long) for way in LONG)]


def init_fn(key):
    return {"w": jax.random.normal(key, (D, V)), "b": jnp.zeros(V)}, {}


def loss_fn(params, model_state, batch, *, key):
    logits = jnp.einsum("btd,dv->btv", batch["x"], params["w"]) + params["b"][None, None]
    token = losses.softmax_cross_entropy(logits, batch["label"])
    size = (logits**2).mean(-1)
    seen = Mean.of(logits.argmax(-1) == batch["label"], batch["tokens"])
    return {"token": token, "size": size}, model_state, {"accuracy": seen}


def weights_fn(batch):
    """By token, uneven over rows, devices and micro-batches; the other term has weights of its own."""
    weight = batch["tokens"] * batch["weight"]
    return {"token": weight, "size": batch["tokens"].astype(weight.dtype)}


def batch_of(seed):
    """The last rows are short, then padding; with eight devices two have nothing but it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B)
    lengths[-7:] = 0
    return {
        "x": rng.normal(size=(B, T, D)),
        "label": rng.integers(0, V, (B, T)),
        "tokens": np.arange(T)[None] < lengths[:, None],
        "weight": rng.uniform(0.1, 3, (B, T)),
    }


def by_hand(params, batch):
    """Loss and gradients in NumPy, over the tokens that count and no others."""
    kept = batch["tokens"]
    x, label, weight = batch["x"][kept], batch["label"][kept], batch["weight"][kept]
    logits = x @ params["w"] + params["b"]
    shifted = logits - logits.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    share = (weight / weight.sum())[:, None]
    token = -(share[:, 0] * np.log(probs[np.arange(len(x)), label])).sum()
    size = (logits**2).mean()
    grad = share * (probs - np.eye(V)[label]) + 0.5 * 2 * logits / logits.size
    accuracy = (logits.argmax(-1) == label).mean()
    return token, 0.5 * size, {"w": x.T @ grad, "b": grad.sum(0)}, accuracy


def compiled(where, accumulate, tx=TX, **options):
    options = {"weights_fn": weights_fn, "coefficients": {"size": 0.5}, **options}
    return where.compile_step(
        functools.partial(make_train_step, loss_fn, tx, accumulate=accumulate, **options)
    )


def start(where, tx=TX):
    def make_state():
        return tiny.to_float(create_state(init_fn, tx, key=jax.random.key(0)), jnp.float64)

    return where.init(make_state)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_any_cut_of_the_batch_is_the_weighted_mean_by_hand(way, x64):
    """Losses, accuracy, the clipped norm, decay counted once: three steps against NumPy.

    Then a batch of padding alone, whose gradient is zero and no NaN, although it is divided by its norm
    and its weights' sum; and an infinite gradient, of which clipping would make zeros and NaN.
    """
    strategy, num_devices, accumulate = way
    where = make_strategy(strategy, num_devices=num_devices)
    step, state = compiled(where, accumulate), start(where)
    params = jax.tree.map(np.asarray, state.params)
    speed = jax.tree.map(np.zeros_like, params)
    for seed in range(4):
        batch = batch_of(seed)
        token, size, grads, accuracy = by_hand(params, batch)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > CLIP
        if seed == 3:
            batch["tokens"] = np.zeros((B, T), bool)
            token, size, norm, accuracy = np.zeros(4)
            grads = jax.tree.map(np.zeros_like, grads)
        state, values = step(state, batch)
        found = [values[name] for name in ("loss", "loss/token", "loss/size", "grad_norm")]
        np.testing.assert_allclose(found, [token + size, token, size, norm], rtol=1e-12)
        np.testing.assert_allclose(values["accuracy"], accuracy, rtol=1e-7)  # a float32 of two counts
        for name, grad in grads.items():
            clipped = grad * min(1, CLIP / norm) if norm else grad
            speed[name] = 0.5 * speed[name] + clipped + DECAY * params[name]
            params[name] = params[name] - RATE * speed[name]
            np.testing.assert_allclose(state.params[name], params[name], rtol=1e-11, atol=1e-13)
    assert int(state.guard) == -1
    before = probe.host((state.params, state.opt_state))
    batch = batch_of(0)
    batch["x"][0, 0] = 1e100  # on one device: loss and gradients are finite, the norm is not
    state, values = step(state, batch)
    assert np.isfinite(values["loss"])
    assert int(values["guard"]) == 4
    probe.assert_same((state.params, state.opt_state), before)


@pytest.mark.parametrize(
    ("strategy", "num_devices", "accumulate"),
    [pytest.param("jit", 8, 1, marks=pytest.mark.long), ("pmap", 4, 2)],
)
def test_what_padding_holds_cannot_be_seen_after_a_step(strategy, num_devices, accumulate):
    """Loss, metrics, gradients' norm, parameters, moments and batch statistics: bit for bit."""
    init_model, _, loss_of = probe.normed()
    where = make_strategy(strategy, num_devices=num_devices)
    tx = optim.clipped(optim.adamw(0.01), 1.0)
    make_step = functools.partial(make_train_step, loss_of, tx, accumulate=accumulate, ema_decay=0.9)
    step = where.compile_step(make_step)
    data = probe.arrays(16)
    index = np.arange(16, dtype=np.int32)
    results = []
    for seed in range(3):
        state = where.init(lambda: create_state(init_model, tx, key=jax.random.key(0), use_ema=True))
        rng, seen = np.random.default_rng(seed), []
        for num_real in (11, 5):  # the second with devices that have nothing else
            mask = index < num_real
            image, label = data["image"].copy(), data["label"].copy()
            image[~mask] = rng.integers(0, 256, image[~mask].shape)
            label[~mask] = rng.integers(0, 4, 16 - num_real)
            rows = np.where(mask, index, rng.integers(0, 10**6, 16)).astype(np.int32)
            state, values = step(state, {"image": image, "label": label, "index": rows, "mask": mask})
            seen.append(values)
        assert np.isfinite(values["grad_norm"])
        results.append(probe.host((state, seen)))
    probe.assert_same(results[0], results[1])
    probe.assert_same(results[0], results[2])


@pytest.mark.parity
def test_class_weights_and_ignored_labels_are_pytorchs(x64):
    """Weighted by the label's class and divided by the weights' sum; a label of -100 has weight 0."""
    import torch

    class_weights = np.array([0.2, 1.0, 3.0, 0.0])

    def by_class(batch):
        known = batch["label"] >= 0
        weight = jnp.where(known, jnp.asarray(class_weights)[jnp.clip(batch["label"], 0)], 0)
        return {"token": weight, "size": jnp.zeros_like(weight)}

    batch = batch_of(5)
    batch["label"][::3, ::2] = -100
    batch["tokens"][:] = True
    where = make_strategy("pmap", num_devices=4)
    tx = optax.sgd(1.0)
    step, state = compiled(where, 3, tx, weights_fn=by_class), start(where, tx)
    before = probe.host(state.params)
    weight, bias = (torch.tensor(before[name], requires_grad=True) for name in ("w", "b"))
    logits = torch.tensor(batch["x"]) @ weight + bias
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V),
        torch.tensor(batch["label"]).reshape(-1),
        weight=torch.tensor(class_weights),
    )
    loss.backward()
    state, values = step(state, batch)
    np.testing.assert_allclose(values["loss"], loss.item(), rtol=1e-12)
    for name, theirs in (("w", weight), ("b", bias)):
        moved = before[name] - np.asarray(state.params[name])
        np.testing.assert_allclose(moved, theirs.grad.numpy(), rtol=1e-9, atol=1e-13)
