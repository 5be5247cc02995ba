"""The loops against their plain forms and by hand, with masks, factors and both directions of time."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import ops

T, B, H = 19, 3, 5  # steps: no whole number of unrolled iterations
GATES = {"lstm": 4, "gru": 3}
every_kind = pytest.mark.parametrize("kind", GATES)
both_ways = pytest.mark.parametrize("reverse", [False, True])


def draw(kind, seed=0):
    """The arrays that a loop differentiates."""
    rng = np.random.default_rng(seed)
    shapes = [(T, B, GATES[kind] * H), (H, GATES[kind] * H), (B, H), (B, H)]
    if kind == "gru":
        shapes[2:] = [(H,), (B, H)]
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def extras(has_mask, has_keep, seed=1):
    rng = np.random.default_rng(seed)
    mask = rng.random((T, B)) < 0.6
    mask[:, 1] = False  # a row that takes no step
    keep = (rng.random((B, H)) < 0.7) / 0.7
    return {
        "mask": jnp.asarray(mask) if has_mask else None,
        "keep": jnp.asarray(keep) if has_keep else None,
    }


@both_ways
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_keep", [False, True])
@pytest.mark.parametrize("many", [1, 16])
def test_the_lstm_of_an_input_is_that_of_its_product(
    many, reverse, has_mask, has_keep, x64, monkeypatch
):
    """Its values, for which many rows make no gates before the loop, and its gradients, which do."""
    monkeypatch.setattr("jaxnets.ops.recurrent._MANY_ROWS", many)
    rng = np.random.default_rng(3)
    _, recurrent, h, c = draw("lstm")
    x, kernel, bias = (jnp.asarray(rng.normal(size=n)) for n in ((T, B, 4), (4, 4 * H), (4 * H,)))
    options = {**extras(has_mask, has_keep), "reverse": reverse}

    def by_gates(x, kernel, bias, recurrent, h, c):
        return ops.lstm(x @ kernel + bias[None, None], recurrent, h, c, **options)

    arrays = x, kernel, bias, recurrent, h, c
    expected = by_gates(*arrays)
    by_hand_ = by_hand("lstm", (x @ kernel + bias[None, None], recurrent, h, c), **options)
    found = ops.lstm_of_input(*arrays, **options)
    with ops.plain():
        plain = ops.lstm_of_input(*arrays, **options)
    for a, b, c_, d in zip(found, plain, expected, by_hand_, strict=True):
        for other in (b, c_, d):
            np.testing.assert_allclose(a, other, rtol=1e-12, atol=1e-12)

    def grads(function):
        return jax.grad(lambda *args: sum(jnp.sum(y**2) for y in function(*args)), tuple(range(6)))(
            *arrays
        )

    pairs = zip(grads(partial(ops.lstm_of_input, **options)), grads(by_gates), strict=True)
    for a, b in pairs:
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_lstm_of_no_step_is_its_start():
    _, recurrent, h, c = draw("lstm")
    y, *end = ops.lstm_of_input(
        jnp.zeros((0, B, 4)), jnp.ones((4, 4 * H)), jnp.ones(4 * H), recurrent, h, c
    )
    assert y.shape == (0, B, H)
    np.testing.assert_array_equal(end[0], h.astype(y.dtype))


@every_kind
def test_no_step_at_all_has_gradients(kind):
    arrays = draw(kind)
    arrays[0] = arrays[0][:0]
    loop = getattr(ops, kind)
    grads = jax.grad(lambda *x: jnp.sum(loop(*x)[1] ** 2), tuple(range(4)))(*arrays)
    place = 2 if kind == "lstm" else 3  # of the output before the first step, which is the last
    np.testing.assert_allclose(grads[place], 2 * arrays[place])
    assert all(not np.any(x) for i, x in enumerate(grads) if i != place)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(kind, arrays, mask=None, keep=None, reverse=False):
    """Row by row, step by step."""
    gates, kernel, *rest = (np.asarray(x) for x in arrays)
    y = np.zeros((T, B, H))
    ends = [np.zeros((B, H)) for _ in range(2 if kind == "lstm" else 1)]
    for b in range(B):
        h = rest[0][b] if kind == "lstm" else rest[1][b]
        c = rest[1][b]
        for t in reversed(range(T)) if reverse else range(T):
            if mask is None or mask[t, b]:
                u = (h if keep is None else h * np.asarray(keep[b])) @ kernel
                if kind == "lstm":
                    i, f, g, o = np.split(gates[t, b] + u, 4)
                    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                    h = sigmoid(o) * np.tanh(c)
                else:
                    (x_r, x_z, x_n), (u_r, u_z, u_n) = np.split(gates[t, b], 3), np.split(u, 3)
                    r, z = sigmoid(x_r + u_r), sigmoid(x_z + u_z)
                    h = (1 - z) * np.tanh(x_n + r * (u_n + rest[0])) + z * h
            y[t, b] = h
        for end, value in zip(ends, (h, c), strict=False):
            end[b] = value
    return y, *ends


@every_kind
@both_ways
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_keep", [False, True])
def test_values_by_hand_and_gradients_of_the_plain_form(kind, reverse, has_mask, has_keep, x64):
    arrays, options = draw(kind), extras(has_mask, has_keep)
    loop = partial(getattr(ops, kind), **options, reverse=reverse)
    out = loop(*arrays)
    for found, expected in zip(out, by_hand(kind, arrays, **options, reverse=reverse), strict=True):
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    rng = np.random.default_rng(2)
    weights = [jnp.asarray(rng.normal(size=x.shape)) for x in out]

    def total(*arrays):
        return sum(jnp.sum(x * w) for x, w in zip(loop(*arrays), weights, strict=True))

    places = tuple(range(len(arrays)))
    fast = jax.jit(jax.grad(total, places))(*arrays)
    with ops.plain():
        plain = jax.grad(total, places)(*arrays)
    for one, two in zip(fast, plain, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)
    assert all(np.abs(x).max() > 0.01 for x in plain)


@every_kind
@both_ways
def test_steps_that_are_not_taken_have_no_gradient_and_no_effect(kind, reverse):
    arrays, options = draw(kind), extras(True, False)
    arrays = [x.astype(jnp.float32) for x in arrays]
    loop = partial(getattr(ops, kind), **options, reverse=reverse)
    there = options["mask"][..., None]

    def total(gates):
        return sum(jnp.sum(x * x) for x in loop(gates, *arrays[1:]))

    spoiled = jnp.where(there, arrays[0], 1e30)
    for one, two in zip(loop(*arrays), loop(spoiled, *arrays[1:]), strict=True):
        np.testing.assert_array_equal(one, two)
    for gates in (arrays[0], spoiled):
        grad = jax.grad(total)(gates)
        np.testing.assert_array_equal(jnp.where(there, 0, grad), jnp.zeros_like(grad))
        assert np.all(np.abs(jnp.where(there, grad, 1)).min(axis=2) > 0)


@every_kind
def test_a_row_does_not_depend_on_what_it_is_padded_to(kind):
    arrays = [x.astype(jnp.float32) for x in draw(kind)]
    mask = jnp.ones((T, B), bool)
    longer = jnp.concatenate([arrays[0], jnp.full((6, B, GATES[kind] * H), 3.0)])
    mask = jnp.concatenate([mask, jnp.zeros((6, B), bool)])
    for reverse in (False, True):
        loop = partial(getattr(ops, kind), reverse=reverse)
        short, long = loop(*arrays), loop(longer, *arrays[1:], mask=mask)
        np.testing.assert_array_equal(short[0], long[0][:T])
        for one, two in zip(short[1:], long[1:], strict=True):
            np.testing.assert_array_equal(one, two)


@every_kind
def test_second_derivatives_are_those_of_the_plain_form(kind, x64):
    arrays = draw(kind)

    def penalty(kernel):
        def total(gates):
            return jnp.sum(getattr(ops, kind)(gates, kernel, *arrays[2:])[1] ** 2)

        return jnp.sum(jax.grad(total)(arrays[0]) ** 2)

    fast = jax.grad(penalty)(arrays[1])
    with ops.plain():
        np.testing.assert_allclose(fast, jax.grad(penalty)(arrays[1]), rtol=1e-9, atol=1e-11)


@every_kind
def test_extreme_gates_stay_finite(kind):
    arrays = [x.astype(jnp.float32) for x in draw(kind)]
    arrays[0] = arrays[0] * 1e4

    def total(*arrays):
        return sum(jnp.sum(x) for x in getattr(ops, kind)(*arrays))

    grads = jax.grad(total, tuple(range(len(arrays))))(*arrays)
    assert all(np.isfinite(x).all() for x in (total(*arrays), *grads))


@pytest.mark.parametrize("form", ["fast", "plain", "many rows"])
def test_a_cell_in_bfloat16_counts_steps_below_its_last_digit(form):
    """0.0015 for each of 400 steps; in bfloat16 that stops at 0.5."""
    steps, rows = 400, 16
    gates = jnp.log(jnp.array([0.0015 / np.tanh(4) / (1 - 0.0015), 1e9, 1, 1]))  # of sigmoids
    gates = gates.at[2].set(4.0).astype(jnp.bfloat16)
    kernel, start = jnp.zeros((1, 4), jnp.bfloat16), jnp.zeros((rows, 1))
    if form == "many rows":
        x = jnp.zeros((steps, rows, 1), jnp.bfloat16)
        y, h, c = ops.lstm_of_input(x, kernel, gates, kernel, start, start)
    else:
        with ops.plain() if form == "plain" else contextlib.nullcontext():
            all_ = jnp.broadcast_to(gates, (steps, rows, 4))
            y, h, c = ops.lstm(all_, kernel, start, start)
    assert (y.dtype, h.dtype, c.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(c, 0.6, rtol=0.01)


@pytest.mark.parametrize("is_plain", [False, True])
def test_an_output_of_the_gru_in_bfloat16_does_not_stand_still(is_plain):
    """`1 - z` is 0.0025 at each of 400 steps, and 0 in bfloat16."""
    gates = jnp.broadcast_to(jnp.array([0, 6, 9], jnp.bfloat16), (400, 2, 3))
    kernel, bias = jnp.zeros((1, 3), jnp.bfloat16), jnp.zeros(1, jnp.bfloat16)
    with ops.plain() if is_plain else contextlib.nullcontext():
        _, h = ops.gru(gates, kernel, bias, jnp.zeros((2, 1)))
    np.testing.assert_allclose(h, 1 - sigmoid(6.0) ** 400, rtol=0.01)


@every_kind
def test_no_gradient_goes_to_the_factors_of_the_output(kind):
    arrays, keep = draw(kind), extras(False, True)["keep"]

    def total(keep):
        return jnp.sum(getattr(ops, kind)(*arrays, keep=keep)[0] ** 2)

    assert not np.any(jax.grad(total)(keep))
    with ops.plain():
        assert not np.any(jax.grad(total)(keep))


@pytest.mark.parametrize("rows", [4, 16])
def test_the_widest_dtype_counts_however_many_rows_there_are(rows, x64):
    x, state = jnp.ones((3, rows, 2), jnp.float32), jnp.ones((rows, 1), jnp.float32)
    kernel = jnp.ones((2, 4), jnp.float64)
    recurrent = jnp.ones((1, 4), jnp.float32)
    y, h, c = ops.lstm_of_input(x, kernel, jnp.zeros(4), recurrent, state, state)
    assert (y.dtype, h.dtype, c.dtype) == (jnp.float64, jnp.float32, jnp.float32)
