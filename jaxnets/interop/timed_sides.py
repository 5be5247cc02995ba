"""The two sides of the duel as they train in their processes."""

import copy
import importlib
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.data import Batches

NUM_CHECKS = 3  # batches whose gradients are checked
_ENDLESS = 2**40  # positions; the order goes on over any number of epochs


class JaxSide:
    """Trains as the `train` command does, on one device."""

    def __init__(self, spec: Mapping[str, Any]):
        # tensorboardX imports PyTorch where it is there; JAX's side must not pay for that.
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
        import jax

        from jaxnets import registry, train

        del sys.modules["torch"]
        from jaxnets.config import RunOptions, from_json

        # Compilation is part of the report, so it isn't taken from a cache.
        jax.config.update("jax_enable_compilation_cache", False)
        for file in spec["plugins"]:
            registry.load_file(file)
        experiment = importlib.import_module(spec["module"]).EXPERIMENT
        self.after_imports = peak_bytes()
        config = from_json(type(experiment.config), spec["config"])
        data_dir = spec["data_dir"] and Path(spec["data_dir"])
        options = RunOptions(data_dir=data_dir, verify=spec["verify"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parent has said it
            recipe = experiment.make_recipe(config, options)
        variables = unflatten(dict(np.load(spec["weights"])))
        params = variables.pop("params")
        strategy = train.make_strategy("jit", num_devices=1)
        key = jax.random.key(recipe.seed)
        self.state = strategy.init(
            lambda: train.create_state(lambda _: (params, variables), recipe.tx, key=key)
        )
        make_step = partial(
            train.make_train_step,
            recipe.loss_fn,
            recipe.tx,
            weights_fn=recipe.weights_fn,
            coefficients=recipe.coefficients,
        )
        self.step_fn = strategy.compile_step(make_step, recipe.train_arrays)
        self.batches = Batches(recipe.num_examples, recipe.batch_size, _ENDLESS, seed=recipe.seed)
        dtypes = {str(x.dtype) for x in jax.tree.leaves(self.state.params)}
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        self.settings = {
            "dtype": ", ".join(sorted(dtypes)),
            "batch_size": len(self.batches[0]["index"]),
            "matmul_precision": matmul_precision(precision, jax.default_backend()),
            "jax_default_matmul_precision": precision,
            "device": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "strategy": "jit, 1 device",
            "threads": f"XLA's pool on {num_cores()} cores",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "versions": {
                "jax": jax.__version__,
                "jaxlib": importlib.import_module("jaxlib").__version__,
            },
        }

    def step(self, i: int) -> Any:
        """Dispatch step i; the loss, perhaps still being computed."""
        self.state, metrics = self.step_fn(self.state, self.batches[i])
        return metrics["loss"]

    def check(self) -> dict[str, Any]:
        """Nothing to do: parity has been shown of this very step."""
        return {"parameter": "", "off_by": 0.0}

    def finish(self, loss: Any) -> float:
        """Wait for all steps; the last one's loss."""
        import jax

        jax.block_until_ready((self.state, loss))
        return float(loss)


class TorchSide:
    """Trains with the reference, in one of PyTorch's variants."""

    def __init__(self, spec: Mapping[str, Any]):
        import torch

        torch.set_num_threads(spec["threads"])
        from jaxnets.interop.reference import load_reference

        reference = self.reference = load_reference(spec["name"], spec["target"], spec["arguments"])
        if spec["is_compiled"]:
            importlib.import_module("torch._dynamo")
        self.after_imports = peak_bytes()
        channels_last = self.channels_last = spec["channels_last"]
        arrays = dict(np.load(spec["arrays"]))
        self.resident = reference.make_resident(arrays, channels_last=channels_last)
        self.batches = Batches(
            len(next(iter(arrays.values()))), spec["batch_size"], _ENDLESS, seed=spec["seed"]
        )
        model = self.model = reference.make_model()
        weights = dict(np.load(spec["weights"]))
        model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
        model.train()
        if channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer, how = fastest_optimizer(reference.make_optimizer, model)

        def compute(resident: Mapping[str, Any], index: Any) -> Any:
            return reference.loss_fn(model, reference.take(resident, index, channels_last=channels_last))

        self.compute = torch.compile(compute) if spec["is_compiled"] else compute
        dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
        self.settings = {
            "dtype": ", ".join(sorted(dtypes)),
            "batch_size": len(self.batches[0]["index"]),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "device": next(model.parameters()).device.type,
            "threads": torch.get_num_threads(),
            "compiled": spec["is_compiled"],
            "channels_last": channels_last,
            "optimizer": how,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
            "versions": {"torch": torch.__version__},
        }

    def check(self) -> dict[str, Any]:
        """Compare gradients with plain eager ones, dropout off on both; the worst parameter.

        A variant that skips work is fast: for some batch sizes torch.compile of PyTorch 2.13.0 gives
        the convolutions below max_pool2d gradients of zero on the CPU, at a loss that looks right.
        """
        import torch

        before = {name: x.clone() for name, x in self.model.state_dict().items()}
        dropouts = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout)]
        rates = [m.p for m in dropouts]
        for m in dropouts:
            m.p = 0.0
        plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)
        worst = {"parameter": "", "off_by": 0.0}
        for i in range(NUM_CHECKS):
            index = torch.from_numpy(self.batches[i]["index"].astype(np.int64))
            batch = self.reference.take(self.resident, index, channels_last=self.channels_last)
            for model in (self.model, plain):
                model.zero_grad(set_to_none=True)
            self.compute(self.resident, index).backward()
            self.reference.loss_fn(plain, batch).backward()
            expected = {name: p.grad for name, p in plain.named_parameters()}
            for name, p in self.model.named_parameters():
                peak = expected[name].abs().max().item() or 1.0
                error = (p.grad - expected[name]).abs().max().item() / peak
                if not error <= worst["off_by"]:
                    worst = {"parameter": name, "off_by": error if math.isfinite(error) else 1e30}
        for m, rate in zip(dropouts, rates, strict=True):
            m.p = rate
        self.model.load_state_dict(before)
        return worst

    def step(self, i: int) -> Any:
        """Take step i; its loss."""
        import torch

        index = torch.from_numpy(self.batches[i]["index"].astype(np.int64))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compute(self.resident, index)
        loss.backward()
        self.optimizer.step()
        return loss

    def finish(self, loss: Any) -> float:
        """The last step's loss."""
        return loss.item()


def fastest_optimizer(make_optimizer: Any, model: Any) -> tuple[Any, str]:
    """Try PyTorch's implementations on copies of the parameters; the fastest one, and its name."""
    import torch

    times = {}
    ways: dict[str, dict[str, bool]] = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "for-loop": {"foreach": False},
    }
    for name, how in ways.items():
        copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for p in copies:
            p.grad = torch.full_like(p, 1e-3)
        try:
            optimizer = make_optimizer(copies, **how)
            optimizer.step()
        except (RuntimeError, ValueError):
            continue  # not for this optimizer or device
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(20):
                optimizer.step()
            rounds.append(time.perf_counter() - start)
        times[name] = min(rounds)
    best = min(times, key=lambda name: times[name])
    return make_optimizer(model.parameters(), **ways[best]), best


def matmul_precision(setting: str | None, backend: str) -> str:
    """JAX's precision of float32 matmuls in PyTorch's words: highest, high or medium."""
    names = {
        "highest": ("highest", "float32", "F32_F32_F32"),
        "high": ("high", "tensorfloat32", "bfloat16_3x", "TF32_TF32_F32", "BF16_BF16_F32_X3"),
        "medium": ("bfloat16", "fastest", "BF16_BF16_F32"),
    }
    if setting in (None, "default"):  # what that means is the backend's choice
        return {"cpu": "highest", "gpu": "high"}.get(backend, "medium")
    return next((name for name, ours in names.items() if setting in ours), str(setting))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """The most memory that this process has held."""
    # Linux hands ru_maxrss on through exec, so a child starts with the parent's; VmHWM is its own.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested dicts from paths such as "params/conv1/kernel"."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return tree
