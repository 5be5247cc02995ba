import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxnets import ops

# (H, W), window, strides: tiling, overlapping, with gaps, with a rest that no window covers.
CASES = [
    ((4, 6), (2, 2), None),
    ((5, 7), (2, 2), None),
    ((5, 7), (3, 3), (1, 1)),
    ((6, 5), (3, 2), (2, 1)),
    ((7, 7), (2, 2), (3, 3)),
    ((3, 4), (3, 4), None),
    ((4, 3), (1, 1), (2, 2)),
    ((1, 5), (1, 2), (1, 1)),
]


def windows(x, window, strides):
    """Every window of an image `[B, H, W, C]` with its place, in plain loops."""
    strides = strides or window
    for i in range((x.shape[1] - window[0]) // strides[0] + 1):
        for j in range((x.shape[2] - window[1]) // strides[1] + 1):
            top, left = i * strides[0], j * strides[1]
            yield (i, j), (top, left), x[:, top : top + window[0], left : left + window[1]]


def pooled(x, window, strides, reduce):
    values = {place: reduce(part, axis=(1, 2)) for place, _, part in windows(x, window, strides)}
    rows, columns = (max(place[axis] for place in values) + 1 for axis in (0, 1))
    return np.stack([np.stack([values[i, j] for j in range(columns)], 1) for i in range(rows)], axis=1)


def gradient_of_max(x, window, strides, cotangent):
    """Each window's cotangent goes to its first maximum in row-major order."""
    grad = np.zeros_like(x)
    for (i, j), (top, left), part in windows(x, window, strides):
        for b in range(x.shape[0]):
            for c in range(x.shape[3]):
                row, column = np.unravel_index(np.argmax(part[b, :, :, c]), window)
                grad[b, top + row, left + column, c] += cotangent[b, i, j, c]
    return grad


def distinct(*shape):
    """No two values within 0.1 of each other, so that no difference quotient crosses a kink."""
    return np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape) * 0.1


@pytest.mark.parametrize(("size", "window", "strides"), CASES)
def test_the_plain_form_of_the_maximum_agrees(size, window, strides, x64):
    x = jnp.asarray(distinct(2, *size, 3)).at[0, 0, 0, 0].set(jnp.nan)

    def run(x):
        y, pull = jax.vjp(lambda x: ops.max_pool(x, window, strides), x)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]

    (y, dx), jaxpr = run(x), str(jax.make_jaxpr(lambda x: run(x))(x))
    assert "reduce_window" not in jaxpr
    with ops.plain():
        (y_plain, dx_plain), jaxpr = run(x), str(jax.make_jaxpr(lambda x: run(x))(x))
    assert "reduce_window" in jaxpr
    np.testing.assert_array_equal(y, y_plain)
    np.testing.assert_allclose(dx[1], dx_plain[1], atol=1e-12)


@pytest.mark.parametrize(("size", "window", "strides"), CASES)
@pytest.mark.parametrize(
    ("pool", "reduce"), [(ops.max_pool, np.max), (ops.avg_pool, np.mean)], ids=["max", "avg"]
)
def test_values_equal_a_loop(size, window, strides, pool, reduce, x64):
    x = np.random.default_rng(1).normal(size=(2, *size, 3))
    expected = pooled(x, window, strides, reduce)
    out = jax.jit(lambda x: pool(x, window, strides))(jnp.asarray(x))
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, rtol=1e-13)
    if size == CASES[0][0]:
        np.testing.assert_allclose(pool(jnp.asarray(x), window, strides), expected, rtol=1e-13)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_window_that_fits(data):
    side = st.integers(1, 6)
    size = data.draw(st.tuples(side, side))
    window = tuple(data.draw(st.integers(1, n)) for n in size)
    strides = data.draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 9, (1, *size, 2))
    x = values.astype(np.float32)
    pools = (ops.max_pool, ops.avg_pool)
    largest, mean = jax.jit(lambda x: [pool(x, window, strides) for pool in pools])(x)
    np.testing.assert_array_equal(largest, pooled(x, window, strides, np.max))
    np.testing.assert_allclose(mean, pooled(x, window, strides, np.mean), rtol=1e-6)


@pytest.mark.parametrize(("size", "window", "strides"), CASES[1:4])
@pytest.mark.parametrize("pool", [ops.max_pool, ops.avg_pool])
def test_gradients_equal_finite_differences(size, window, strides, pool, x64):
    fun = jax.jit(lambda x: (pool(x, window, strides) ** 2).sum())
    check_grads(fun, (jnp.asarray(distinct(2, *size, 2)),), order=1, atol=1e-6, rtol=1e-6)


def test_second_derivatives_equal_finite_differences(x64):
    fun = jax.jit(lambda x: (ops.max_pool(x, (2, 2)) ** 3).sum())
    check_grads(fun, (jnp.asarray(distinct(1, 3, 4, 1)),), order=2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "window", "strides"), CASES[1:5])
def test_the_first_of_equal_maxima_gets_the_gradient(size, window, strides):
    rng = np.random.default_rng(2)
    x = rng.integers(0, 3, (2, *size, 2)).astype(np.float32)  # many ties
    shape = pooled(x, window, strides, np.max).shape
    cotangent = rng.integers(1, 9, shape).astype(np.float32)
    grad = jax.jit(jax.grad(lambda x: (ops.max_pool(x, window, strides) * cotangent).sum()))(x)
    np.testing.assert_array_equal(grad, gradient_of_max(x, window, strides, cotangent))


def test_jvp_takes_the_tangent_of_the_maximum():
    x = distinct(2, 5, 5, 3).astype(np.float32)
    tangent = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    pool = jax.jit(lambda x: ops.max_pool(x, (2, 2)))
    _, out = jax.jvp(pool, (jnp.asarray(x),), (jnp.asarray(tangent),))
    grad = jax.grad(lambda x: pool(x).sum())(jnp.asarray(x))
    for i, j, c in np.ndindex(2, 2, 3):
        part = np.s_[1, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        assert out[1, i, j, c] == tangent[part].ravel()[np.argmax(x[part])]
    # With v of ones, <v, J t> = <v J, t>.
    np.testing.assert_allclose(out.sum(), (np.asarray(grad) * tangent).sum(), rtol=1e-5)


@pytest.mark.parametrize("pool", [ops.max_pool, ops.avg_pool])
def test_vmap_equals_a_loop(pool):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2, 5, 4, 2)), jnp.float32)
    alone = jax.jit(lambda x: pool(x, (2, 2)))
    mapped = jax.vmap(alone)(x)
    for i in range(3):
        np.testing.assert_array_equal(mapped[i], alone(x[i]))


@pytest.mark.parametrize("pool", [ops.max_pool, ops.avg_pool])
def test_a_nan_comes_through_in_its_window_and_nowhere_else(pool):
    compiled = jax.jit(lambda x: jnp.isnan(pool(x, (2, 2))))
    for row, column in np.ndindex(2, 2):
        x = np.ones((1, 4, 4, 1), np.float32)
        x[0, 2 + row, column, 0] = np.nan
        assert compiled(x)[0, :, :, 0].tolist() == [[False, False], [True, False]]
    assert compiled(np.full_like(x, np.nan)).all()


def test_infinite_values():
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: ops.max_pool(x, (2, 2)).sum()))
    x = np.full((1, 2, 2, 1), -np.inf, np.float32)
    value, grad = value_and_grad(x)
    assert value == -np.inf
    assert grad.ravel().tolist() == [1, 0, 0, 0]
    x[0, 1, 1] = -1e30
    value, grad = value_and_grad(x)
    assert value == np.float32(-1e30)
    assert grad.ravel().tolist() == [0, 0, 0, 1]
    x[0, 0, 1] = np.inf
    assert value_and_grad(x)[0] == np.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_type_stays(dtype):
    x = jax.ShapeDtypeStruct((1, 4, 4, 1), dtype)
    for pool in (ops.max_pool, ops.avg_pool):
        assert jax.eval_shape(lambda x, pool=pool: pool(x, (2, 2)), x).dtype == dtype


def test_integers_have_a_maximum_and_a_mean_that_is_not_one():
    x = jnp.array([[1, 2], [3, 250]], jnp.uint8).reshape(1, 2, 2, 1)
    assert ops.max_pool(x, (2, 2)).ravel().tolist() == [250]
    assert ops.avg_pool(x, (2, 2)).ravel().tolist() == [64]
    assert ops.avg_pool(x, (2, 2)).dtype == jnp.float32


def test_a_mean_of_many_is_not_added_up_in_bfloat16():
    x = jnp.full((1, 1, 600, 1), 1.0078125, jnp.bfloat16)  # in bfloat16 256 + 1 is 256
    out = jax.jit(lambda x: ops.avg_pool(x, (1, 600)))(x)
    assert out.ravel().tolist() == [1.0078125]


@pytest.mark.parametrize("pool", [ops.max_pool, ops.avg_pool])
def test_what_does_not_fit_is_refused(pool):
    for size in [(1, 4), (4, 1), (0, 4)]:
        with pytest.raises(ValueError, match="leaves nothing of an image"):
            pool(jnp.ones((1, *size, 1)), (2, 2))
    with pytest.raises(ValueError, match=r"takes \[B, H, W, C\]"):
        pool(jnp.ones((4, 4, 1)), (2, 2))
    for window, strides in [((0, 2), None), ((2, 2), (0, 1)), ((2, 2), (1, -1))]:
        with pytest.raises(ValueError, match="at least 1"):
            pool(jnp.ones((1, 4, 4, 1)), window, strides)


@pytest.mark.parametrize("pool", [ops.max_pool, ops.avg_pool])
def test_an_empty_batch_stays_empty(pool):
    assert pool(jnp.ones((0, 4, 4, 2)), (2, 2)).shape == (0, 2, 2, 2)
