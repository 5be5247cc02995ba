"""Recurrent layers' loops over time, with the input's products made before them where one trains.

What goes over the time steps one by one is only what must: the product of the last output with the
recurrent kernel, and the gates. The gradient of that kernel is one product after the loop backwards,
instead of a sum that every step adds to.

Outputs and cells go from step to step in at least float32, and gates are computed in it: in bfloat16
what a step adds to a cell would often be less than half of the cell's last digit, and lost. Products
are of the dtype that is given, and add up in at least float32.

Time is the first axis. A step whose mask is false leaves the row's state as it is, so padding, at either
end, changes no number, in both directions of time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxnets.ops.forms import is_for_cpu, is_plain
from jaxnets.ops.product import add_bias, product
from jaxnets.typing import Array

# From here on a step's product is faster with the kernel in front, of 128 and of 512 units.
_MANY_ROWS = 16


def lstm(
    gates: Array,
    kernel: Array,
    h: Array,
    c: Array,
    *,
    mask: Array | None = None,
    keep: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array, Array]:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; with forget gates, Gers et al. 2000).

    `i, f, g, o = gates[t] + (h * keep) @ kernel`, in this order, each of H columns;
    `c = sigmoid(f) * c + sigmoid(i) * tanh(g)`; `h = sigmoid(o) * tanh(c)`.

    Args:
        gates: `[T, B, 4 H]`, what input and bias give to the gates.
        kernel: `[H, 4 H]`.
        h: `[B, H]`, the output before the first step.
        c: `[B, H]`, the cell before the first step.
        mask: boolean `[T, B]`, false for steps that a row doesn't take; it takes all by default.
        keep: `[B, H]`, factors of the output on its way back, such as recurrent dropout's; no gradient
            goes to it. 1 by default.
        reverse: whether the last step is taken first.

    Returns:
        outputs `[T, B, H]`, and output and cell after the last step that was taken, in the dtypes of h
        and c. The gradient is a rule of its own; forward mode (`jax.jvp`) takes `ops.plain()`.
    """
    dtype = jnp.promote_types(gates.dtype, kernel.dtype)
    wide = _wide(dtype)
    start = h.astype(wide), c.astype(wide)
    args = gates.astype(wide), kernel.astype(dtype), *start, mask, _constant(keep), reverse
    found: Any = _lstm_loop(*args) if is_plain() else _lstm(*args)
    y_TBH, last_h, last_c, *_ = found
    return y_TBH.astype(dtype), last_h.astype(h.dtype), last_c.astype(c.dtype)


def _wide(dtype: DTypeLike) -> DTypeLike:
    """What is kept from step to step."""
    return jnp.promote_types(dtype, jnp.float32)


def _constant(keep: Array | None) -> Array | None:
    return None if keep is None else lax.stop_gradient(keep)


def _times(x: Array, kernel: Array) -> Array:
    """`x @ kernel` in the kernel's dtype, added up in that of x."""
    return jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=x.dtype)


def _kernel_grad(fed_TBH: Array, dgates_TBG: Array, dtype: DTypeLike) -> Array:
    """Of the recurrent kernel, `[H, G]`: one product over all steps."""
    fed, dgates = (x.reshape(-1, x.shape[-1]) for x in (fed_TBH, dgates_TBG))
    return _times(fed.T, dgates.astype(dtype)).astype(dtype)


def _scales(size: int, dtype: DTypeLike) -> tuple[Array, Array]:
    """What makes of one tanh over all gates their functions, `[1, 4 H]` each.

    `sigmoid(x) = tanh(x / 2) / 2 + 1 / 2`. On a CPU XLA computes one function of long rows about four
    times as fast as four functions of their parts.
    """
    of_sigmoid, of_tanh = jnp.full(size, 0.5, dtype), jnp.ones(size, dtype)
    scale = jnp.concatenate([of_sigmoid, of_sigmoid, of_tanh, of_sigmoid])[None]
    return scale, 1 - scale


def _lstm_loop(gates, kernel, h, c, mask, keep, reverse):
    scale, shift = _scales(h.shape[1], gates.dtype)

    def step(carry, inputs):
        (h, c), (x, taken) = carry, inputs
        fed = h if keep is None else h * keep
        acts = jnp.tanh((x + _times(fed, kernel)) * scale) * scale + shift
        i, f, g, o = jnp.split(acts, 4, axis=1)
        new_c = f * c + i * g
        new_h = o * jnp.tanh(new_c)
        if taken is not None:
            new_h, new_c = jnp.where(taken[:, None], new_h, h), jnp.where(taken[:, None], new_c, c)
        return (new_h, new_c), (new_h, new_c, acts)

    (h, c), (h_TBH, c_TBH, acts_TBG) = lax.scan(step, (h, c), (gates, mask), reverse=reverse)
    return h_TBH, h, c, c_TBH, acts_TBG


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _lstm(gates, kernel, h, c, mask, keep, reverse):
    return _lstm_loop(gates, kernel, h, c, mask, keep, reverse)[:3]


def _lstm_forward(gates, kernel, h, c, mask, keep, reverse):
    h_TBH, last_h, last_c, c_TBH, acts_TBG = _lstm_loop(gates, kernel, h, c, mask, keep, reverse)
    return (h_TBH, last_h, last_c), (kernel, h, c, mask, keep, h_TBH, c_TBH, acts_TBG)


def _before(first: Array, all_: Array, reverse: bool) -> Array:
    """What was there before each step."""
    with_first = [all_, first[None]] if reverse else [first[None], all_]
    both = jnp.concatenate(with_first)
    return both[1:] if reverse else both[:-1]


def _lstm_backward(reverse, kept, grads):
    kernel, h, c, mask, keep, h_TBH, c_TBH, acts_TBG = kept
    dh_TBH, dh, dc = grads
    turned, size = lax.optimization_barrier(kernel.T), h.shape[1]
    # All that isn't a matter of the steps behind is computed for all of them at once: what each gate's
    # gradient is of that of the cell, or of the output, and these of one another.
    scale, shift = _scales(size, acts_TBG.dtype)
    tanh_TBG = (acts_TBG - shift[None]) / scale[None]
    i, f, g, o = jnp.split(acts_TBG, 4, axis=2)
    tanh_c = jnp.tanh(c_TBH)
    factors = jnp.concatenate([g, _before(c, c_TBH, reverse), i, tanh_c], axis=2)
    factors = factors * (1 - tanh_TBG * tanh_TBG) * (scale * scale)[None]
    of_h = o * (1 - tanh_c * tanh_c)
    if mask is not None:
        taken = mask[:, :, None]
        factors, of_h, f = (
            jnp.where(taken, factors, 0),
            jnp.where(taken, of_h, 0),
            jnp.where(taken, f, 1),
        )

    def step(carry, inputs):
        (dh, dc), (dh_out, factors, of_h, f, taken) = carry, inputs
        dh = dh + dh_out
        d = dc + dh * of_h
        dgates = jnp.concatenate([d, d, d, dh], axis=1) * factors
        back = _times(dgates, turned)
        if keep is not None:
            back = back * keep
        if taken is not None:
            back = back + jnp.where(taken[:, None], 0, dh)
        return (back, d * f), dgates

    (dh, dc), dgates_TBG = lax.scan(
        step, (dh, dc), (dh_TBH, factors, of_h, f, mask), reverse=not reverse
    )
    fed_TBH = _before(h, h_TBH, reverse)
    if keep is not None:
        fed_TBH = fed_TBH * keep[None]
    dkernel = _kernel_grad(fed_TBH, dgates_TBG, kernel.dtype)
    none = None if keep is None else jnp.zeros_like(keep)
    return dgates_TBG, dkernel, dh, dc, None, none


_lstm.defvjp(_lstm_forward, _lstm_backward)


def lstm_of_input(
    x: Array,
    kernel: Array,
    bias: Array,
    recurrent_kernel: Array,
    h: Array,
    c: Array,
    *,
    mask: Array | None = None,
    keep: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array, Array]:
    """`lstm` of an input's product: `gates = x @ kernel + bias`.

    Where nothing is differentiated and there are many rows, a CPU takes input and output in one product
    for each step, with the kernel in front: that is faster than a product of all steps before the loop.

    Args:
        x: `[T, B, D]`.
        kernel: `[D, 4 H]`.
        bias: `[4 H]`.
        recurrent_kernel: `[H, 4 H]`.
        h: as all that follows, and what is returned, that of `lstm`.
        c: `[B, H]`.
        mask: `[T, B]`.
        keep: `[B, H]`.
        reverse: whether the last step is taken first.
    """
    dtype = jnp.result_type(x, kernel, recurrent_kernel)
    x, kernel, recurrent_kernel = (part.astype(dtype) for part in (x, kernel, recurrent_kernel))
    args = x, kernel, bias, recurrent_kernel, h, c, mask, _constant(keep)
    if not is_for_cpu() or x.shape[1] < _MANY_ROWS:
        return _lstm_by_gates(*args, reverse)
    return _lstm_by_steps(*args, reverse)


def _lstm_by_gates(x, kernel, bias, recurrent, h, c, mask, keep, reverse):
    gates = add_bias(product(x, kernel), bias)
    return lstm(gates, recurrent, h, c, mask=mask, keep=keep, reverse=reverse)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _lstm_by_steps(x, kernel, bias, recurrent, h, c, mask, keep, reverse):
    """With rows as the last axis, so that what a step's product has to copy is the smaller factor."""
    wide = _wide(x.dtype)
    scale, shift = (part.T for part in _scales(h.shape[1], wide))
    both = jnp.concatenate([kernel, recurrent]).T * scale.astype(x.dtype)
    bias = bias.astype(wide)[:, None] * scale

    def step(carry, inputs):
        (h, c), (x, taken) = carry, inputs
        fed = h if keep is None else h * keep.T
        fed = jnp.concatenate([x, fed.astype(x.dtype)])
        acts = jnp.tanh(jnp.matmul(both, fed, preferred_element_type=wide) + bias) * scale + shift
        i, f, g, o = jnp.split(acts, 4)
        new_c = f * c + i * g
        new_h = o * jnp.tanh(new_c)
        if taken is not None:
            new_h, new_c = jnp.where(taken[None], new_h, h), jnp.where(taken[None], new_c, c)
        return (new_h, new_c), new_h

    start = h.T.astype(wide), c.T.astype(wide)
    end, h_THB = lax.scan(step, start, (x.swapaxes(1, 2), mask), reverse=reverse)
    return h_THB.astype(x.dtype).swapaxes(1, 2), end[0].T.astype(h.dtype), end[1].T.astype(c.dtype)


def _lstm_by_steps_forward(*args):
    *arrays, reverse = args
    return jax.vjp(partial(_lstm_by_gates, reverse=reverse), *arrays)


_lstm_by_steps.defvjp(_lstm_by_steps_forward, lambda _, pull, grads: pull(grads))


def gru(
    gates: Array,
    kernel: Array,
    bias: Array,
    h: Array,
    *,
    mask: Array | None = None,
    keep: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Gated recurrent unit (Cho et al. 2014), the reset gate behind the product as in cuDNN and PyTorch.

    With `u = (h * keep) @ kernel`, of which as of the gates the parts r, z, n have H columns each:
    `r = sigmoid(gates_r + u_r)`, `z = sigmoid(gates_z + u_z)`, `n = tanh(gates_n + r * (u_n + bias))`,
    `h = (1 - z) * n + z * h`.

    Args:
        gates: `[T, B, 3 H]`, what input and bias give to the gates.
        kernel: `[H, 3 H]`.
        bias: `[H]`, of the product that the reset gate multiplies.
        h: `[B, H]`, the output before the first step.
        mask: boolean `[T, B]`, false for steps that a row doesn't take; it takes all by default.
        keep: `[B, H]`, factors of the output on its way into the product, such as recurrent dropout's;
            no gradient goes to it. 1 by default.
        reverse: whether the last step is taken first.

    Returns:
        outputs `[T, B, H]`, and the output after the last step that was taken, in h's dtype. Of
        derivatives the same holds as for `lstm`.
    """
    dtype = jnp.promote_types(gates.dtype, kernel.dtype)
    wide = _wide(dtype)
    arrays = gates.astype(wide), kernel.astype(dtype), bias.astype(wide), h.astype(wide)
    args = *arrays, mask, _constant(keep), reverse
    found: Any = _gru_loop(*args) if is_plain() else _gru(*args)
    y_TBH, last, *_ = found
    return y_TBH.astype(dtype), last.astype(h.dtype)


def _gru_loop(gates, kernel, bias, h, mask, keep, reverse):
    def step(h, inputs):
        x, taken = inputs
        fed = h if keep is None else h * keep
        x_r, x_z, x_n = jnp.split(x, 3, axis=1)
        u_r, u_z, u_n = jnp.split(_times(fed, kernel), 3, axis=1)
        u_n = u_n + bias[None]
        r, z = (jnp.tanh(0.5 * (x + u)) * 0.5 + 0.5 for x, u in ((x_r, u_r), (x_z, u_z)))
        n = jnp.tanh(x_n + r * u_n)
        new = n + z * (h - n)
        if taken is not None:
            new = jnp.where(taken[:, None], new, h)
        return new, (new, jnp.concatenate([r, z, n, u_n], axis=1))

    h, (h_TBH, acts_TBG) = lax.scan(step, h, (gates, mask), reverse=reverse)
    return h_TBH, h, acts_TBG


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _gru(gates, kernel, bias, h, mask, keep, reverse):
    return _gru_loop(gates, kernel, bias, h, mask, keep, reverse)[:2]


def _gru_forward(gates, kernel, bias, h, mask, keep, reverse):
    h_TBH, last, acts_TBG = _gru_loop(gates, kernel, bias, h, mask, keep, reverse)
    return (h_TBH, last), (kernel, h, mask, keep, h_TBH, acts_TBG)


def _gru_backward(reverse, kept, grads):
    kernel, h, mask, keep, h_TBH, acts_TBG = kept
    dh_TBH, dh = grads
    turned = kernel.T
    before_TBH = _before(h, h_TBH, reverse)

    def step(dh, inputs):
        dh_out, acts, before, taken = inputs
        r, z, n, u_n = jnp.split(acts, 4, axis=1)
        dh = dh + dh_out
        dn = dh * (1 - z) * (1 - n * n)
        parts = [dn * u_n * r * (1 - r), dh * (before - n) * z * (1 - z), dn * r, dn]
        if taken is not None:
            parts = [jnp.where(taken[:, None], part, 0) for part in parts]
        back = _times(jnp.concatenate(parts[:3], axis=1), turned)
        if keep is not None:
            back = back * keep
        stays = dh * z if taken is None else jnp.where(taken[:, None], dh * z, dh)
        return back + stays, jnp.concatenate(parts, axis=1)

    dh, parts_TBG = lax.scan(step, dh, (dh_TBH, acts_TBG, before_TBH, mask), reverse=not reverse)
    size = h.shape[1]
    du_TBG = parts_TBG[..., : 3 * size]
    fed_TBH = before_TBH if keep is None else before_TBH * keep[None]
    dkernel = _kernel_grad(fed_TBH, du_TBG, kernel.dtype)
    dbias = jnp.sum(du_TBG[..., 2 * size :], axis=(0, 1))
    dgates_TBG = jnp.concatenate([du_TBG[..., : 2 * size], parts_TBG[..., 3 * size :]], axis=2)
    none = None if keep is None else jnp.zeros_like(keep)
    return dgates_TBG, dkernel, dbias, dh, None, none


_gru.defvjp(_gru_forward, _gru_backward)
