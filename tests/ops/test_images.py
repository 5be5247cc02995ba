import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import ops

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def bytes_of(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_every_byte_lands_between_minus_one_and_one():
    image = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    out = ops.normalize_images(image)
    assert out.dtype == jnp.float32
    expected = (np.arange(256) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(np.asarray(out).ravel(), expected, atol=2e-7)
    assert float(out.min()) == -1
    assert float(out.max()) == 1


@pytest.mark.parametrize("shape", [(3,), (2, 4, 5, 3)])
def test_each_channel_has_its_own_mean_and_std(shape, x64):
    image = bytes_of(*shape)
    out = ops.normalize_images(jnp.asarray(image), MEAN, STD)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, (image / 255 - np.array(MEAN)) / np.array(STD), atol=1e-14)


def test_jit_equals_eager():
    image = jnp.asarray(bytes_of(2, 4, 4, 3))
    eager = ops.normalize_images(image, MEAN, STD)
    jitted = jax.jit(lambda x: ops.normalize_images(x, MEAN, STD))(image)
    # XLA turns the division by a constant into a multiplication: one unit in the last place.
    np.testing.assert_allclose(jitted, eager, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(mean=st.floats(0, 1), std=st.floats(0.01, 1))
def test_it_can_be_undone(mean, std):
    image = bytes_of(2, 3, 3, 1)
    out = np.asarray(ops.normalize_images(jnp.asarray(image), (mean,), (std,)), np.float64)
    np.testing.assert_array_equal(np.round((out * std + mean) * 255), image)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.int8, jnp.bfloat16])
def test_anything_but_bytes_is_refused(dtype):
    with pytest.raises(ValueError, match="takes uint8, not"):
        ops.normalize_images(jnp.zeros((1, 2, 2, 3), dtype))


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises((ValueError, TypeError)):
        ops.normalize_images(jnp.zeros((1, 2, 2, 3), jnp.uint8), (0.5, 0.5), (0.5, 0.5))


def test_a_smaller_image_is_made_of_means():
    x = jnp.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
    assert ops.resize_images(x, (8, 8)) is x
    assert ops.resize_images(x, (5, 3)).shape == (2, 5, 3, 3)
    np.testing.assert_allclose(ops.resize_images(jnp.ones((1, 8, 8, 1)), (5, 3)), 1, rtol=1e-6)
    half = ops.resize_images(x, (4, 4))
    # A triangle over four pixels: on a plane, away from the border, the mean of the middle two.
    means = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(half[:, 1:3, 1:3], means[:, 1:3, 1:3], rtol=1e-5)
    # One bright pixel reaches two places each way, three eighths and one eighth of it.
    bright = ops.resize_images(jnp.zeros((1, 8, 8, 1)).at[0, 4, 4].set(1), (4, 4))[0, :, :, 0]
    np.testing.assert_allclose(bright, np.outer([0, 1, 3, 0], [0, 1, 3, 0]) / 64, atol=1e-6)


def test_six_views_of_an_image():
    x = jnp.arange(2 * 4 * 5 * 3.0).reshape(2, 4, 5, 3)
    assert [weight for weight, _ in ops.image_views(x, 1)] == [1]
    assert [weight for weight, _ in ops.image_views(x, 2)] == [0.5, 0.5]
    weights, views = zip(*ops.image_views(x, 6), strict=True)
    assert weights == (0.25, 0.25, 0.125, 0.125, 0.125, 0.125)
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        np.testing.assert_array_equal(view[:, :, ::-1], mirrored)
    one, up_left, down_right = (np.asarray(view) for view in views[::2])
    np.testing.assert_array_equal(one, x)
    np.testing.assert_array_equal(up_left[:, :-1, :-1], x[:, 1:, 1:])
    np.testing.assert_array_equal(up_left[:, -1, :-1], x[:, -2, 1:])  # reflected
    np.testing.assert_array_equal(down_right[:, 1:, 1:], x[:, :-1, :-1])
    np.testing.assert_array_equal(down_right[:, 0, 0], x[:, 1, 1])
    with pytest.raises(ValueError, match="1, 2 or 6 views"):
        ops.image_views(x, 3)
    with pytest.raises(ValueError, match="not of the shape"):
        ops.image_views(x[0], 2)
