import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import cifar10
from jaxnets import errors, registry
from jaxnets.config import RunOptions
from jaxnets.interop import contender, reference, sides, torch_side, weights
from tests.interop import tiny_duel as tiny


@pytest.fixture
def worker(tmp_path):
    made = contender.Contender("eager", "torch", {}, os.environ, tmp_path / "log")
    yield made
    made.close()
    assert not made.is_open


def wait_until_gone(pid):
    for _ in range(200):
        try:
            # A zombie has ended too; its parent just hasn't asked.
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} is still there")


def test_a_worker_reports_its_errors_and_lives_on(worker):
    for _ in range(2):
        with pytest.raises(contender.WorkerError, match=r"eager: (KeyError|ModuleNotFoundError)"):
            worker.start()
    assert worker.ask("memory")["peak_bytes"] > 2**20


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "dtype"), [("convnet", "float32"), ("lenet", "float32"), ("lenet", "bfloat16")]
)
def test_a_variant_with_wrong_gradients_is_found(model, dtype, tmp_path):
    import torch

    made = tiny.recipe(model)
    variables = sides.initial_variables(made)
    loaded = reference.load_reference("tiny", made.torch_reference, made.torch_arguments)
    np.savez(tmp_path / "torch.npz", **weights.to_torch(loaded.weights, variables))
    np.savez(tmp_path / "train.npz", **made.train)
    spec = {
        "name": "tiny",
        "target": made.torch_reference,
        "arguments": {**made.torch_arguments, "dtype": dtype},
        "weights": str(tmp_path / "torch.npz"),
        "arrays": str(tmp_path / "train.npz"),
        "batch_size": 8,
        "seed": 0,
        "threads": torch.get_num_threads(),
        "is_compiled": False,
        "compile_mode": None,
        "channels_last": True,
        "mode": "train",
        "device": "cpu",
        "compute_dtype": dtype,
        "matmul_precision": "highest",
    }
    side = torch_side.TorchSide(spec)
    before = {name: x.clone() for name, x in side.model.state_dict().items()}
    bound, is_rough = side.check_bound()["bound"], dtype == "bfloat16"
    assert torch_side.CHECK_BOUND <= bound <= (0.3 if is_rough else 0.01)
    assert side.check()["off_by"] < (bound if is_rough else 1e-4)
    for name, x in side.model.state_dict().items():
        assert torch.equal(x, before[name]), name
    if model == "convnet":
        assert side.model.dropout1.p == 0.3
    side.model.conv1.weight.register_hook(lambda grad: grad * 0)
    assert side.check() == {"parameter": "conv1.weight", "off_by": 1.0}


def test_a_worker_that_dies_is_one_line(worker):
    worker.ask("memory")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(errors.UserError, match="the worker of eager died with exit status -9"):
        worker.ask("memory")
    with pytest.raises(errors.UserError, match="died"):
        worker.ask("memory")


def test_a_worker_ends_with_its_parent(tmp_path):
    code = (
        "import os, sys, pathlib; from jaxnets.interop.contender import Contender; "
        f"log = pathlib.Path({str(tmp_path / 'log')!r}); "
        "c = Contender('eager', 'torch', {}, os.environ, log); "
        "c.ask('memory'); print(c.pid, flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    wait_until_gone(int(done.stdout))


def test_the_peak_is_the_workers_own(worker):
    """Linux hands ru_maxrss on from parent to child; the parent here is large on purpose."""
    ballast = np.ones(2**26)  # 512 MiB
    assert ballast.sum() == 2**26
    made = contender.Contender("second", "torch", {}, os.environ, worker._log)
    with contextlib.closing(made):
        assert made.ask("memory")["peak_bytes"] < 2**28


PLUGIN = """
import numpy as np
from jaxnets import data, registry

def load(*, data_dir, verify, progress):
    arrays = {
        "image": np.arange(64 * 16 * 16, dtype=np.uint8).reshape(64, 16, 16, 1),
        "label": np.arange(64, dtype=np.int32) % 2,
    }
    return data.Dataset("mine", arrays, arrays, ("even", "odd"), "made up")

registry.register("dataset", "mine", load)
"""


@pytest.mark.parity
def test_a_worker_of_jax_loads_the_plugins(tmp_path):
    """The experiment asks for a data set that only the plugin has."""
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    options = RunOptions(plugin=(file,))
    settings = cifar10.Config(dataset="mine", model="mlp", batch_size=8, steps=4)
    registry.load_file(file)
    try:
        made = cifar10.make_recipe(settings, options)
    finally:
        registry.unload("dataset", "mine")
    twin = reference.load_reference("mine", made.torch_reference, made.torch_arguments)
    with contextlib.ExitStack() as stack:
        starters = contender.make_starters(
            "experiments.cifar10", made, twin, settings, options, tmp_path, stack
        )
        ours = starters.ours[0]()
        ours.start()
        assert ours.side == "jax"
        assert np.isfinite(ours.facts["first_values"]).all()
