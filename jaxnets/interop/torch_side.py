"""PyTorch's side of the duel as it runs in its process, which never imports JAX."""

import contextlib
import copy
import importlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxnets.data import Batches
from jaxnets.interop.measure import (
    COPY_BYTES,
    ENDLESS,
    PRODUCT_SIZE,
    best_seconds,
    num_cores,
    peak_bytes,
)

NUM_CHECKS = 3  # batches on which a variant is compared with plain PyTorch


class TorchSide:
    """Trains or predicts with the reference, in one of PyTorch's variants.

    Args:
        spec: as `contender.make_starters` writes it.
    """

    def __init__(self, spec: Mapping[str, Any]):
        import torch

        torch.set_num_threads(spec["threads"])
        from jaxnets.interop.reference import load_reference

        reference = self.reference = load_reference(spec["name"], spec["target"], spec["arguments"])
        if spec["is_compiled"]:
            importlib.import_module("torch._dynamo")
        self.after_imports = peak_bytes()
        self.is_training = spec["mode"] == "train"
        channels_last = self.channels_last = spec["channels_last"]
        arrays = dict(np.load(spec["arrays"]))
        self.resident = reference.make_resident(arrays, channels_last=channels_last)
        self.batches = Batches(
            len(next(iter(arrays.values()))), spec["batch_size"], ENDLESS, seed=spec["seed"]
        )
        model = self.model = reference.make_model()
        weights = dict(np.load(spec["weights"]))
        model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
        model.train(self.is_training)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.cache_hits = 0
        self.optimizer, how = None, "none"
        if self.is_training:
            self.optimizer, how = fastest_optimizer(reference.make_optimizer, model)
        self.compute = torch.compile(self._compute) if spec["is_compiled"] else self._compute
        dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
        self.settings = {
            "mode": spec["mode"],
            "dtype": ", ".join(sorted(dtypes)),
            "batch_size": len(self.batches[0]["index"]),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "device": next(model.parameters()).device.type,
            "threads": torch.get_num_threads(),
            "compiled": spec["is_compiled"],
            "channels_last": channels_last,
            "optimizer": how,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
            "TORCHINDUCTOR_FREEZING": os.environ.get("TORCHINDUCTOR_FREEZING", ""),
            "versions": {"torch": torch.__version__},
        }

    def _compute(self, resident: Mapping[str, Any], index: Any, model: Any = None) -> Any:
        """The loss of the rows, or their logits."""
        batch = self.reference.take(resident, index, channels_last=self.channels_last)
        function = self.reference.loss_fn if self.is_training else self.reference.predict_fn
        return function(self.model if model is None else model, batch)

    def _index(self, i: int) -> Any:
        import torch

        return torch.from_numpy(self.batches[i]["index"].astype(np.int64))

    def check(self) -> dict[str, Any]:
        """Compare with plain eager PyTorch, dropout off on both: gradients, or logits; the worst.

        A variant that skips work is fast: for some batch sizes torch.compile of PyTorch 2.13.0 gives
        the convolutions below max_pool2d gradients of zero on the CPU, at a loss that looks right.
        """
        import torch

        plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)
        worst = {"parameter": "", "off_by": 0.0}

        def compare(name: str, found: Any, expected: Any) -> None:
            nonlocal worst
            peak = expected.abs().max().item() or 1.0
            error = (found - expected).abs().max().item() / peak
            if not error <= worst["off_by"]:
                worst = {"parameter": name, "off_by": error if math.isfinite(error) else 1e30}

        if not self.is_training:
            with torch.inference_mode():
                for i in range(NUM_CHECKS):
                    index = self._index(i)
                    expected = self._compute(self.resident, index, plain)
                    compare("the logits", self.compute(self.resident, index), expected)
            return worst
        before = {name: x.clone() for name, x in self.model.state_dict().items()}
        with _without_dropout(self.model, plain):
            for i in range(NUM_CHECKS):
                index = self._index(i)
                for model in (self.model, plain):
                    model.zero_grad(set_to_none=True)
                self.compute(self.resident, index).backward()
                self._compute(self.resident, index, plain).backward()
                expected = {name: p.grad for name, p in plain.named_parameters()}
                for name, p in self.model.named_parameters():
                    compare(name, p.grad, expected[name])
        self.model.load_state_dict(before)
        return worst

    def step(self, i: int) -> Any:
        """Take step i; its loss, or its logits."""
        import torch

        index = self._index(i)
        if self.optimizer is None:
            with torch.inference_mode():
                return self.compute(self.resident, index)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compute(self.resident, index)
        loss.backward()
        self.optimizer.step()
        return loss

    def finish(self, value: Any) -> list[float]:
        """The last step's loss, or all of its logits."""
        return value.detach().reshape(-1).tolist()

    def ceiling(self) -> dict[str, float]:
        """What a float32 product and a copy reach here, in operations and bytes a second.

        "one_thread_flops" is the product's with one thread, which tells two cores from the two
        threads of one.
        """
        import torch

        x = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE)
        y = torch.ones(COPY_BYTES // 4)
        out = torch.empty_like(y)
        found = {}
        for name, threads in (("one_thread_flops", 1), ("flops", num_cores())):
            torch.set_num_threads(threads)
            found[name] = 2 * PRODUCT_SIZE**3 / best_seconds(lambda: torch.mm(x, x))
        found["bytes"] = 2 * COPY_BYTES / best_seconds(lambda: torch.add(y, 1, out=out))
        return found


@contextlib.contextmanager
def _without_dropout(*models: Any) -> Iterator[None]:
    import torch

    layers = [m for model in models for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate


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
