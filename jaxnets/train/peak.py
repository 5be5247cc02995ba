"""What the devices could do at most, in floating-point operations a second."""

import dataclasses
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.train.flops import count_flops
from jaxnets.train.state import TrainState
from jaxnets.typing import Batch, LossFn

# Dense bfloat16 products of one device as JAX counts them (float16 where there is no bfloat16), from the
# vendors' data sheets. The first name that `device_kind` contains counts, so longer ones stand first.
_PEAKS = (
    ("TPU v2", 22.5e12),  # of a core, which is a device there
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("T4", 65e12),
)
_SIZE = 768  # of the measured product, in rows and columns
_SECONDS = 0.04  # of measuring, without compilation


@dataclasses.dataclass(frozen=True)
class Usage:
    """How much of the devices' peak a model's training makes use of.

    Attributes:
        flops_per_example: of a training step, for each of its examples.
        peak: of all devices together, in operations a second; None if it isn't known.
    """

    flops_per_example: float
    peak: float | None = None

    def mfu(self, examples_per_second: float) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311), mostly in [0, 1].

        Example:
            >>> Usage(flops_per_example=2e9, peak=1e12).mfu(250)
            0.5
        """
        return self.flops_per_example * examples_per_second / self.peak if self.peak else None


def mean_usage(usages: Mapping[int, Usage], num_steps: int) -> Usage:
    """The mean over the first steps of a run, if each usage holds from its step until the next one's.

    Example:
        >>> usages = {0: Usage(100.0), 30: Usage(200.0)}
        >>> [mean_usage(usages, n).flops_per_example for n in (0, 20, 40)]
        [100.0, 100.0, 125.0]
    """
    begins = [*usages, max(num_steps, *usages)]
    shares = [max(0, min(end, num_steps) - begin) for begin, end in itertools.pairwise(begins)]
    total = sum(share * x.flops_per_example for share, x in zip(shares, usages.values(), strict=True))
    first = next(iter(usages.values()))
    return dataclasses.replace(first, flops_per_example=total / num_steps) if num_steps else first


def usage_of(loss_fn: LossFn, state: TrainState, batch: Batch, peak: float | None = None) -> Usage:
    """Count a model's operations.

    A training step is taken for three forward passes: one forward, two for the gradients.

    Args:
        loss_fn: as `jaxnets.train.make_train_step` takes it.
        state: shapes and dtypes will do.
        batch: the same, `{name: [B, ...]}`.
        peak: of the devices over which the batch is spread.
    """

    def forward(state: TrainState, batch: Batch) -> Any:
        return loss_fn(state.params, state.model_state, batch, key=state.key)[0]

    size = next(iter(batch.values())).shape[0]
    return Usage(3 * count_flops(forward, state, batch) / size, peak)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """The peak of all devices together.

    Args:
        devices: of one kind.

    Returns:
        operations a second: for accelerators from a table, of dense bfloat16 products whatever the
        model computes in; on a CPU what a float32 product reaches when this is called, in about 0.1 s,
        for all of its devices together, since they share its cores; None for other devices, and
        for CPUs of several processes.
    """
    first = devices[0]
    if first.platform == "cpu":
        return _measured(first) if jax.process_count() == 1 else None
    peak = next((peak for name, peak in _PEAKS if re.search(rf"\b{name}\b", first.device_kind)), None)
    return None if peak is None else peak * len(devices)


def _measured(device: Any) -> float:
    x = jax.device_put(np.ones((_SIZE, _SIZE), np.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return 2 * _SIZE**3 / best
