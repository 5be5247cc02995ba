import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import models
from jaxnets.layers import conv2d
from jaxnets.models.speednet import dirac_init, speednet, whiten_params
from jaxnets.ops import normalize_images


def test_whitened_patches_have_unit_covariance():
    """Of images whose neighbours and channels go together, on which the drawn kernel does not."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 9, 10, 3))
    images = images + np.roll(images, 1, axis=2) + 0.5 * images.mean(-1, keepdims=True)
    example = jax.ShapeDtypeStruct((1, 9, 10, 3), jnp.float32)
    params, _ = jax.jit(models.functional(speednet(), example)[0])(jax.random.key(0))
    whitened = whiten_params(params, images, epsilon=0.0)
    for name in params:
        if name != "whiten":
            assert whitened[name] is params[name]
    np.testing.assert_array_equal(whitened["whiten"]["bias"], params["whiten"]["bias"])

    def covariance(kernel):
        rows = np.asarray(conv2d(jnp.asarray(images, jnp.float32), kernel)).reshape(-1, 24)
        return rows.T @ rows / len(rows)

    found = covariance(whitened["whiten"]["kernel"])
    np.testing.assert_allclose(found[:12, :12], np.eye(12), atol=1e-3)
    np.testing.assert_allclose(found[:12, 12:], -np.eye(12), atol=1e-3)
    assert np.abs(covariance(params["whiten"]["kernel"])[:12, :12] - np.eye(12)).max() > 0.1


def test_dirac_kernels_copy_their_inputs():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6, 3)), jnp.float32)
    for features in (2, 5):
        kernel = dirac_init(jax.random.key(0), (3, 3, 3, features))
        copies = min(3, features)
        y = conv2d(x, kernel, padding=1)
        np.testing.assert_allclose(y[..., :copies], x[..., :copies], atol=1e-6)
        assert np.isfinite(kernel).all()
        assert np.abs(kernel[..., copies:]).max(initial=0) <= 27**-0.5


def test_a_start_is_whitened_from_arrays_or_from_all_over_a_source():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (64, 9, 10, 3), dtype=np.uint8)
    images[32:] //= 4  # the second class is dark
    example = jax.ShapeDtypeStruct((1, 9, 10, 3), jnp.float32)
    init_fn, _ = models.functional(speednet(), example)
    drawn = jax.jit(init_fn)(jax.random.key(0))[0]
    kernels = []
    for train in ({"image": images}, [{"image": image} for image in images]):
        params, _ = jax.jit(models.whitened(init_fn, train))(jax.random.key(0))
        expected = whiten_params(drawn, np.asarray(normalize_images(jnp.asarray(images))))
        kernels.append(params["whiten"]["kernel"])
        np.testing.assert_allclose(kernels[-1], expected["whiten"]["kernel"], rtol=1e-5)
        np.testing.assert_array_equal(params["head"]["kernel"], drawn["head"]["kernel"])
    big = [{"image": np.zeros((320, 320, 1), np.uint8) + i} for i in range(100)]
    seen = []

    class Source:
        def __len__(self):
            return len(big)

        def __getitem__(self, i):
            seen.append(i)
            return big[i]

    example = jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32)
    init = models.whitened(models.functional(speednet(), example)[0], Source())
    for _ in range(2):
        jax.eval_shape(init, jax.random.key(0))
    assert seen == [0, *range(0, 100, 2)]  # fewer of larger images, from all over, and only once
