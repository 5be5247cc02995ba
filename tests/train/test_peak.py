import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.train import peak
from jaxnets.train.state import create_state


@dataclasses.dataclass
class Device:
    device_kind: str
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("a device that nobody knows", None),
    ],
)
def test_the_table(kind, expected):
    assert peak.peak_flops([Device(kind)]) == expected
    assert peak.peak_flops([Device(kind)] * 4) == (expected and 4 * expected)


def test_a_cpu_is_measured_as_a_whole():
    """No machine that runs this is slower than a GFLOP/s or faster than a PFLOP/s."""
    one, eight = peak.peak_flops(jax.devices()[:1]), peak.peak_flops(jax.devices())
    assert 1e9 < one < 1e15
    assert eight < 4 * one  # its devices share the cores: eight are not eight times as much


def test_a_step_is_three_forward_passes():
    def loss_fn(params, model_state, batch, *, key):
        return {"loss": (batch["x"] @ params["w"]).sum(-1)}, model_state, {}

    state = jax.eval_shape(
        lambda: create_state(
            lambda key: ({"w": jnp.ones((3, 5))}, {}), optax.sgd(0.1), key=jax.random.key(0)
        )
    )
    usage = peak.usage_of(loss_fn, state, {"x": jax.ShapeDtypeStruct((8, 3), np.float32)}, 1e6)
    assert usage == peak.Usage(flops_per_example=3 * 2 * 3 * 5, peak=1e6)
    assert usage.mfu(1000) == 90 * 1000 / 1e6
    assert peak.Usage(90).mfu(1000) is None
