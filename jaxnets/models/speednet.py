"""SpeedNet: a small network for high accuracy on small images in few epochs.

In the manner of the published speed records on CIFAR-10 (Page 2019, "How to train your ResNet";
Jordan 2024, arXiv 2404.00498): a first layer that `whiten_params` can set to whiten patches, three
stages of two wide convolutions, GELU, batch normalisation without a scale, and one maximum over the
image. It differs from those in being written for any image size.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jaxnets.layers import BatchNorm, Conv, Linear, constrain
from jaxnets.ops import gelu, max_pool, normalize_images
from jaxnets.typing import Array, Indexed, Params, PyTree

PATCH = 2  # pixels a side of the patches that the first layer sees


def dirac_init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    """A kernel whose first outputs copy the inputs; the others are drawn as PyTorch draws them.

    Args:
        key: a PRNG key.
        shape: `(height, width, C, O)`, both sizes odd.
        dtype: of the kernel.

    Returns:
        `[height, width, C, O]`.
    """
    height, width, channels, features = shape
    bound = (height * width * channels) ** -0.5
    kernel = jax.random.uniform(key, tuple(shape), dtype, -bound, bound)
    copies = min(channels, features)
    kernel = kernel.at[..., :copies].set(0)
    each = jnp.arange(copies)
    return kernel.at[height // 2, width // 2, each, each].set(1)


class SpeedNet(nn.Module):
    """A 2x2 convolution, three stages of two 3x3 ones, a maximum over the image, and a head.

    The first layer starts at random and is learnt, unless `whiten_params` sets it and it is frozen.

    Attributes:
        num_classes: V.
        widths: channels of each stage; a stage halves the image.
        statistics_momentum: share of the running statistics that an update keeps; short runs need
            quick ones.
        scale: of the logits.
        dtype: of the computation; that of input and parameters by default.
    """

    num_classes: int = 10
    widths: Sequence[int] = (64, 256, 256)
    statistics_momentum: float = 0.6
    scale: float = 1 / 16
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        image: Array,
        *,
        train: bool = False,
        rows: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Classify.

        Args:
            image: `[B, H, W, C]`, floating; H and W at least 2 to the number of stages, and 1 more.
            train: whether batch statistics are on.
            rows: without effect here.
            mask: boolean `[B]`, false for rows that don't count in the batch statistics.

        Returns:
            logits `[B, V]`.

        Raises:
            ValueError: if the images are so small that a layer's output would be empty.
        """
        del rows
        patches = 2 * PATCH * PATCH * image.shape[3]  # every direction and its opposite
        whiten = Conv(patches, (PATCH, PATCH), dtype=self.dtype, name="whiten")
        x_BHWC = gelu(whiten(image))
        for i, width in enumerate(self.widths, start=1):
            for j in (1, 2):
                x_BHWC = Conv(
                    width,
                    (3, 3),
                    padding=1,
                    use_bias=False,
                    dtype=self.dtype,
                    kernel_init=dirac_init,
                    name=f"conv{i}_{j}",
                )(x_BHWC)
                if j == 1:
                    x_BHWC = max_pool(x_BHWC, (2, 2))
                norm = BatchNorm(
                    momentum=self.statistics_momentum,
                    use_scale=False,
                    dtype=self.dtype,
                    name=f"norm{i}_{j}",
                )
                x_BHWC = gelu(norm(x_BHWC, train=train, mask=mask))
            x_BHWC = constrain(x_BHWC, "batch", None, None, None)
        _, height, width, _ = x_BHWC.shape
        x_BC = max_pool(x_BHWC, (height, width))[:, 0, 0]
        logits_BV = Linear((self.num_classes,), use_bias=False, dtype=self.dtype, name="head")(x_BC)
        return logits_BV * self.scale


def speednet(num_classes: int = 10, **kwargs) -> SpeedNet:
    """SpeedNet; 1,971,640 parameters for 3 channels and 10 classes."""
    return SpeedNet(num_classes=num_classes, **kwargs)


def whiten_params(params: Mapping[str, Any], images: np.ndarray, *, epsilon: float = 5e-4) -> Any:
    """Set SpeedNet's first layer to whiten patches.

    Its filters are the eigenvectors of the patches' covariance, scaled to unit variance, and the same
    with the opposite sign.

    Args:
        params: of SpeedNet.
        images: `[N, H, W, C]` as the network gets them; a few thousand are enough.
        epsilon: added to the variances.

    Returns:
        new params.
    """
    return _with_kernel(params, _whitening_kernel(images, epsilon))


def whitened(
    init_fn: Callable[[Array], tuple[Params, PyTree]], train: Mapping[str, np.ndarray] | Indexed
) -> Callable[[Array], tuple[Params, PyTree]]:
    """SpeedNet's start with its first layer set from the training set, when it is first needed.

    Args:
        init_fn: `init_fn(key) -> (params, model_state)`, as `functional` gives it.
        train: arrays or a source with "image", uint8 `[H, W, C]` each. Of arrays the first 5,000 images
            count, of a source, which may be in order of classes, as many from all over it; fewer where
            they are larger than 32x32. `normalize_images` makes
            numbers of them, with its defaults.

    Returns:
        the new `init_fn`.
    """

    @functools.cache
    def kernel() -> np.ndarray:
        if isinstance(train, Mapping):
            images = train["image"][: _num_seen(train["image"].shape)]
        else:
            count = _num_seen((len(train), *np.shape(train[0]["image"])))
            images = np.stack([train[i * len(train) // count]["image"] for i in range(count)])
        with jax.ensure_compile_time_eval():
            return _whitening_kernel(np.asarray(normalize_images(jnp.asarray(images))), 5e-4)

    def init(key: Array) -> tuple[Params, PyTree]:
        params, model_state = init_fn(key)
        return _with_kernel(params, kernel()), model_state

    return init


def _num_seen(shape: Sequence[int]) -> int:
    pixels = shape[1] * shape[2]
    return min(shape[0], max(1, 5000 * 32 * 32 // pixels))


def _whitening_kernel(images: np.ndarray, epsilon: float) -> np.ndarray:
    """`[PATCH, PATCH, C, 2 PATCH PATCH C]`."""
    height, width = (n - PATCH + 1 for n in images.shape[1:3])
    size = PATCH * PATCH * images.shape[3]
    total, count = np.zeros((size, size)), len(images) * height * width
    for block in np.array_split(images, -(-len(images) // 500)):  # so that patches take little memory
        x_NHWC = np.asarray(block, np.float64)
        patches = np.concatenate(
            [x_NHWC[:, i : i + height, j : j + width] for i in range(PATCH) for j in range(PATCH)],
            axis=-1,
        ).reshape(-1, size)
        total += patches.T @ patches
    variances, vectors = np.linalg.eigh(total / count)
    kernel = (vectors / np.sqrt(variances + epsilon)).reshape(PATCH, PATCH, images.shape[3], -1)
    return np.concatenate([kernel, -kernel], axis=-1)


def _with_kernel(params: Mapping[str, Any], kernel: np.ndarray) -> Any:
    old = params["whiten"]
    return {**params, "whiten": {**old, "kernel": jnp.asarray(kernel, old["kernel"].dtype)}}
