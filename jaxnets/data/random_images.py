"""Generated images: nothing to learn, for measuring speed where no data set is at hand."""

from pathlib import Path

import numpy as np

from jaxnets.data.datasets import Dataset, check_verify
from jaxnets.data.progress import Progress

_SHAPE = (32, 32, 3)
_NUM_TRAIN, _NUM_TEST, _NUM_CLASSES = 10_000, 2_000, 10


def load_random_images(
    *, data_dir: Path | None = None, verify: str = "warn", progress: Progress = True
) -> Dataset:
    """Random images: 10,000 and 2,000 images of CIFAR-10's shape and number of classes, drawn by NumPy.

    Args:
        data_dir: not used; there for the sake of one signature.
        verify: not used, but checked.
        progress: not used.

    Returns:
        The data set, images uint8 `[N, 32, 32, 3]`, pixels and labels uniform.
    """
    del data_dir, progress
    check_verify(verify)
    rng = np.random.default_rng(0)
    parts = [
        {
            "image": rng.integers(0, 256, (count, *_SHAPE), dtype=np.uint8),
            "label": rng.integers(0, _NUM_CLASSES, count, dtype=np.int32),
        }
        for count in (_NUM_TRAIN, _NUM_TEST)
    ]
    names = tuple(f"class {i}" for i in range(_NUM_CLASSES))
    return Dataset("random_images", parts[0], parts[1], names, "generated")
