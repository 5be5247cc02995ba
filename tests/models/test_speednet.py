import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import models
from jaxnets.layers import conv2d
from jaxnets.models.speednet import dirac_init, speednet, whiten_params


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
