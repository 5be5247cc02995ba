"""Every exported loss against NumPy by hand, finite differences, and what breaks losses.

A new loss needs an entry in `CASES`, or the first test fails.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxnets import losses


class Case(NamedTuple):
    """A loss with its options, the same in NumPy, and inputs of it."""

    name: str
    options: dict
    by_hand: Callable  # of the same arguments, in float64
    inputs: Callable  # rng -> arguments, the first of which is differentiated
    extreme: Callable  # size -> arguments with values of that size


def softmax_by_hand(logits, labels, label_smoothing=0.0):
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    num_classes = logits.shape[-1]
    target = (1 - label_smoothing) * np.eye(num_classes)[labels] + label_smoothing / num_classes
    return -(target * log_probs).sum(-1)


def sigmoid_by_hand(logits, labels):
    return -(labels * -np.log1p(np.exp(-logits)) + (1 - labels) * -np.log1p(np.exp(logits)))


def huber_by_hand(predictions, targets, delta=1.0):
    error = np.abs(predictions - targets)
    return np.where(error <= delta, 0.5 * error**2, delta * (error - 0.5 * delta))


def pair(rng):
    return rng.normal(size=(4, 3)) * 2, rng.normal(size=(4, 3))


def extreme_pair(size):
    return np.array([size, -size, size, -size]), np.array([size, -size, -size, size])


def classes(rng):
    return rng.normal(size=(6, 5)), rng.integers(0, 5, 6)


def extreme_classes(size):
    return np.array([[size, -size, 0.0]] * 3 + [[size] * 3] * 2), np.array([0, 1, 2, 0, 2])


CASES = [
    Case("softmax_cross_entropy", {}, softmax_by_hand, classes, extreme_classes),
    Case(
        "softmax_cross_entropy",
        {"label_smoothing": 0.1},
        softmax_by_hand,
        classes,
        extreme_classes,
    ),
    Case(
        "sigmoid_cross_entropy",
        {},
        sigmoid_by_hand,
        lambda rng: (rng.normal(size=(4, 3)) * 3, rng.uniform(size=(4, 3)).round(1)),
        lambda size: (np.array([size, size, -size, -size, 0.0]), np.array([1.0, 0, 1, 0, 0.5])),
    ),
    Case("huber", {}, huber_by_hand, pair, extreme_pair),
    Case("huber", {"delta": 0.3}, huber_by_hand, pair, extreme_pair),
    Case("squared_error", {}, lambda p, t: (p - t) ** 2, pair, extreme_pair),
]
IDS = ["-".join([case.name, *map(str, case.options.values())]) for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def compiled(case):
    return jax.jit(lambda *arrays: getattr(losses, case.name)(*arrays, **case.options))


def arguments(case, seed=0):
    return [jnp.asarray(x) for x in case.inputs(np.random.default_rng(seed))]


def test_every_exported_loss_is_tested_here():
    exported = {name for name, value in vars(losses).items() if inspect.isfunction(value)}
    elsewhere = {"chunked_cross_entropy"}  # in a file of its own
    assert exported == {case.name for case in CASES} | elsewhere


@every_case
def test_values_equal_numpy(case, x64):
    arrays = arguments(case)
    expected = case.by_hand(*map(np.asarray, arrays), **case.options)
    out = compiled(case)(*arrays)
    assert out.dtype == jnp.float64
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    eager = getattr(losses, case.name)(*arrays, **case.options)
    np.testing.assert_allclose(eager, expected, rtol=1e-12)


@every_case
def test_gradients_equal_finite_differences(case, x64):
    first, *others = arguments(case)
    loss = compiled(case)
    check_grads(jax.jit(lambda x: loss(x, *others)), (first,), order=1, atol=1e-7, rtol=1e-7)


@every_case
def test_each_element_has_its_own_loss(case, x64):
    """Gradients don't cross rows, and a row alone has the loss that it has among others."""
    first, *others = arguments(case)
    loss = compiled(case)
    jacobian = np.asarray(jax.jacrev(lambda x: loss(x, *others).reshape(len(x), -1).sum(1))(first))
    rows = np.abs(jacobian).reshape(len(first), len(first), -1).sum(-1)
    np.testing.assert_array_equal(rows > 0, np.eye(len(first), dtype=bool))
    np.testing.assert_allclose(
        loss(first[1:2], *(x[1:2] for x in others))[0], loss(first, *others)[1], rtol=1e-14
    )


@every_case
@pytest.mark.parametrize("size", [1e4, 0.0])
def test_extreme_inputs_stay_finite_and_right(case, size):
    values = case.extreme(size)
    arrays = [jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32) for x in values]
    loss = compiled(case)
    out, grads = loss(*arrays), jax.grad(lambda x, *y: loss(x, *y).sum())(*arrays)
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert np.isfinite(grads).all()
    if case.by_hand is sigmoid_by_hand:
        expected = np.array([0, size, size, 0, np.log(2)]) if size else np.full(5, np.log(2))
    else:
        expected = case.by_hand(*values, **case.options)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert (np.asarray(out) >= 0).all()


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_comes_out_in_float32(case, dtype):
    first, *others = arguments(case)
    others = [x.astype(dtype) if x.dtype.kind == "f" else x for x in others]
    first, loss = first.astype(dtype), compiled(case)
    out = loss(first, *others)
    assert out.dtype == jnp.float32
    exact = [np.asarray(x, np.float64 if x.dtype.kind != "i" else None) for x in (first, *others)]
    np.testing.assert_allclose(out, case.by_hand(*exact, **case.options), rtol=1e-5)
    assert jax.grad(lambda x: loss(x, *others).sum())(first).dtype == dtype


@every_case
def test_shapes_that_do_not_fit_are_refused(case):
    first, *others = arguments(case)
    for wrong in ([x[:1] for x in others], [x[:-1] for x in others], [x[None] for x in others]):
        with pytest.raises((AssertionError, ValueError)):
            getattr(losses, case.name)(first, *wrong, **case.options)


@every_case
def test_more_leading_axes(case, x64):
    arrays = arguments(case)
    flat = compiled(case)(*arrays)
    out = compiled(case)(*(x.reshape(2, -1, *x.shape[1:]) for x in arrays))
    np.testing.assert_allclose(out.reshape(flat.shape), flat, rtol=1e-14)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8])
def test_a_label_out_of_range_gives_nan_and_no_other_row_does(label_smoothing, dtype):
    labels = jnp.array([-1, 0, 4, 5, 100], dtype)
    loss = losses.softmax_cross_entropy(jnp.zeros((5, 5)), labels, label_smoothing=label_smoothing)
    assert np.isnan(loss).tolist() == [True, False, False, True, True]


def test_labels_of_a_type_too_small_for_the_classes():
    loss = losses.softmax_cross_entropy(jnp.zeros((2, 300)), jnp.array([5, 255], jnp.uint8))
    np.testing.assert_allclose(loss, np.full(2, np.log(300)), rtol=1e-5)  # class 261 is not 5


def test_a_label_between_two_classes_gives_nan():
    loss = losses.softmax_cross_entropy(jnp.zeros((2, 3)), jnp.array([1.0, 1.5]))
    assert np.isnan(loss).tolist() == [False, True]


def test_a_single_class_costs_nothing():
    labels = jnp.zeros(3, jnp.int32)
    for smoothing in (0.0, 0.3):
        loss = losses.softmax_cross_entropy(jnp.ones((3, 1)), labels, label_smoothing=smoothing)
        assert loss.tolist() == [0, 0, 0]


def test_an_impossible_class_is_infinitely_wrong_and_does_not_spoil_the_others():
    logits = jnp.array([[0.0, -jnp.inf], [0.0, -jnp.inf]])
    loss = losses.softmax_cross_entropy(logits, jnp.array([0, 1]))
    assert loss.tolist() == [0, np.inf]


@settings(max_examples=40, deadline=None)
@given(shift=st.floats(-100, 100), smoothing=st.sampled_from([0.0, 0.2]))
def test_a_shift_of_all_logits_changes_nothing(shift, smoothing):
    logits, labels = classes(np.random.default_rng(3))
    logits = logits.astype(np.float32)
    loss = [
        losses.softmax_cross_entropy(jnp.asarray(x), jnp.asarray(labels), label_smoothing=smoothing)
        for x in (logits, logits + np.float32(shift))
    ]
    np.testing.assert_allclose(loss[0], loss[1], atol=1e-4)


def test_the_sigmoid_keeps_its_gradient_at_zero():
    grad = jax.grad(lambda x: losses.sigmoid_cross_entropy(x, jnp.array([0.0, 1.0])).sum())
    assert grad(jnp.zeros(2)).tolist() == [0.5, -0.5]


def test_huber_joins_its_two_parts_smoothly(x64):
    delta = 0.5
    grad = jax.vmap(jax.grad(lambda x: losses.huber(x, jnp.zeros(()), delta=delta)))
    x = jnp.array([-2, -0.5, -0.2, 0, 0.2, 0.5, 2])
    np.testing.assert_allclose(grad(x), np.clip(x, -delta, delta), atol=1e-15)


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_a_wrong_delta_is_refused(delta):
    with pytest.raises(ValueError, match="delta must be above 0"):
        losses.huber(jnp.ones(2), jnp.ones(2), delta=delta)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_a_wrong_smoothing_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing lies in \[0, 1\]"):
        losses.softmax_cross_entropy(
            jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), label_smoothing=smoothing
        )
