"""The tiny run whose checkpoints are kept in tests/goldens, one of each version that wrote its own way.

It knows only what a state is made of, so that it stays the same however the library changes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets.train import create_state

TX = optax.sgd(0.1, momentum=0.9)


def init_fn(key):
    rng = np.random.default_rng(0)  # of NumPy, whose stream no release of JAX moves
    params = {"w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "b": jnp.zeros(4)}
    return params, {"mean": jnp.zeros(4)}


def make_state():
    return create_state(init_fn, TX, key=jax.random.key(0), use_ema=True)


def step(state):
    """One step of least squares on rows that follow from the number of the step."""
    rng = np.random.default_rng(int(state.step))
    x, y = (jnp.asarray(rng.normal(size=(6, n)), jnp.float32) for n in (8, 4))

    def loss_fn(params):
        return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, state.ema, params)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema,
        model_state={"mean": jnp.mean(y, axis=0)},
    ), loss  # fmt: skip
