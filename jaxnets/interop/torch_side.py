"""PyTorch's side of the duel as it runs in its process, which never imports JAX."""

import contextlib
import copy
import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxnets.data import Batches
from jaxnets.interop.distance import allowed, distances
from jaxnets.interop.measure import (
    COPY_BYTES,
    ENDLESS,
    best_seconds,
    num_cores,
    peak_bytes,
    product_flops,
)
from jaxnets.interop.reference import Reference, load_reference

NUM_CHECKS = 3  # batches on which a variant is compared with plain PyTorch
CHECK_BOUND = 1e-3  # of the largest magnitude, in float32: far above rounding, far below a bug


class TorchSide:
    """Trains or predicts with the reference, in one of PyTorch's variants.

    Args:
        spec: as `contender.make_starters` writes it.
    """

    def __init__(self, spec: Mapping[str, Any]):
        import torch

        self._spec = spec
        torch.set_num_threads(spec["threads"])
        device = self.device = torch.device({"cpu": "cpu", "gpu": "cuda"}[spec["device"]])
        precision = spec["matmul_precision"]  # JAX's, convolutions included
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
        torch.backends.cudnn.benchmark = True
        reference = self.reference = load_reference(spec["name"], spec["target"], spec["arguments"])
        if spec["is_compiled"]:
            importlib.import_module("torch._dynamo")
        self.after_imports = peak_bytes()
        self.is_training = spec["mode"] == "train"
        channels_last = self.channels_last = spec["channels_last"]
        arrays = dict(np.load(spec["arrays"]))
        resident = reference.make_resident(arrays, channels_last=channels_last)
        self.resident = {name: x.to(device) for name, x in resident.items()}
        if spec["compile_mode"]:  # or CUDA graphs would copy all of it at every step
            dynamo = importlib.import_module("torch._dynamo")
            for x in self.resident.values():
                dynamo.mark_static_address(x)
        self.batches = Batches(
            len(next(iter(arrays.values()))), spec["batch_size"], ENDLESS, seed=spec["seed"]
        )
        model = self.model = reference.make_model()
        weights = dict(np.load(spec["weights"]))
        model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
        model.to(device).train(self.is_training)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.cache_hits = 0
        self.optimizer, how = None, "none"
        if self.is_training:
            self.optimizer, how = fastest_optimizer(reference.make_optimizer, model, self._wait)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # its trials don't count
        self.compute = self._compute
        if spec["is_compiled"]:
            self.compute = torch.compile(self._compute, mode=spec["compile_mode"])
        dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
        self.settings = {
            "mode": spec["mode"],
            "dtype": ", ".join(sorted(dtypes)),
            "compute_dtype": spec["compute_dtype"],
            "batch_size": len(self.batches[0]["index"]),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "device": spec["device"],
            "device_kind": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "compiled": spec["is_compiled"],
            "compile_mode": spec["compile_mode"],
            "channels_last": channels_last,
            "optimizer": how,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
            "TORCHINDUCTOR_FREEZING": os.environ.get("TORCHINDUCTOR_FREEZING", ""),
            "versions": {"torch": torch.__version__},
        }

    def _compute(
        self,
        resident: Mapping[str, Any],
        places: tuple[Any, ...],
        model: Any,
        reference: Reference | None = None,
    ) -> Any:
        """The loss of the rows, or their logits."""
        reference = reference or self.reference
        batch = reference.take(resident, *places, channels_last=self.channels_last)
        function = reference.loss_fn if self.is_training else reference.predict_fn
        return function(model, batch)

    def _places(self, i: int) -> tuple[Any, ...]:
        import torch

        places = map(torch.from_numpy, self.reference.places(self.batches[i]))
        return tuple(x.to(self.device, non_blocking=True) for x in places)

    def check(self) -> dict[str, Any]:
        """Compare with plain eager PyTorch, dropout off on both: gradients, or logits.

        A variant that skips work is fast: for some batch sizes torch.compile of PyTorch 2.13.0 gives
        the convolutions below max_pool2d gradients of zero on the CPU, at a loss that looks right.

        Returns:
            "parameter", the worst, and how far it is "off_by", as a share of the largest magnitude.
        """
        plain = self._plain()
        before = {name: x.clone() for name, x in self.model.state_dict().items()}
        worst = {"parameter": "", "off_by": 0.0}
        with _without_dropout(self.model, plain):
            for i in range(NUM_CHECKS):
                places = self._places(i)
                expected = self._values(self._compute, places, plain)
                found = self._values(self.compute, places, self.model)
                for name, error in distances(found, expected).items():
                    if _large(error) > worst["off_by"]:
                        worst = {"parameter": name, "off_by": _large(error)}
        self.model.load_state_dict(before)
        return worst

    def check_bound(self) -> dict[str, float]:
        """The bound of `check`: a multiple of what plain PyTorch is off from its own result in float64.

        Where two pixels are about equally the largest of a window, or a unit is all but zero, rounding
        may change a gradient by much, in one variant and not in another.
        """
        plain = self._plain()
        with _default_dtype("float64"):
            exact = copy.deepcopy(plain).double()
            arguments = dict(self._spec["arguments"])
            if "dtype" in arguments:
                arguments["dtype"] = "float32"  # PyTorch's default dtype, that is
            reference = load_reference(self._spec["name"], self._spec["target"], arguments)
        rounding = []
        with _without_dropout(plain, exact):
            for i in range(NUM_CHECKS):
                places = self._places(i)
                rough = self._values(self._compute, places, plain)
                with _default_dtype("float64"):
                    truth = self._values(partial(self._compute, reference=reference), places, exact)
                rounding += distances(rough, truth).values()
        return {"bound": allowed(CHECK_BOUND, rounding)}

    def _plain(self) -> Any:
        import torch

        return copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)

    def _values(
        self, compute: Callable[..., Any], places: tuple[Any, ...], model: Any
    ) -> dict[str, np.ndarray]:
        """What is compared: the gradients by parameter, or the logits."""
        import torch

        if not self.is_training:
            with torch.inference_mode():
                return {"the logits": compute(self.resident, places, model).cpu().numpy().copy()}
        model.zero_grad(set_to_none=True)
        compute(self.resident, places, model).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        dense = {name: x.to_dense() if x.is_sparse else x for name, x in grads.items()}
        return {name: x.cpu().numpy().copy() for name, x in dense.items()}

    def first(self) -> list[list[float]]:
        """Take the first step, and wait for it: its values."""
        return [self.finish(self.run(0, 1))]

    def run(self, first: int, end: int) -> Any:
        """Take these steps; the last one's loss, or its logits."""
        out = None
        for i in range(first, end):
            out = self._step(i)
        return out

    def _step(self, i: int) -> Any:
        import torch

        places = self._places(i)
        if self.optimizer is None:
            with torch.inference_mode():
                return self.compute(self.resident, places, self.model)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compute(self.resident, places, self.model)
        loss.backward()
        self.optimizer.step()
        return loss

    def finish(self, value: Any) -> list[float]:
        """Wait for all steps; the last one's loss, or all of its logits."""
        return value.detach().reshape(-1).tolist()

    def ceiling(self) -> dict[str, float]:
        """What a product and a copy reach here, in operations and bytes a second.

        "one_thread_flops" is the product's with one thread, which tells two cores from the two
        threads of one.
        """
        import torch

        dtype = getattr(torch, self.settings["compute_dtype"])

        def product(size: int) -> Callable[[], None]:
            x = torch.ones(size, size, device=self.device, dtype=dtype)
            return lambda: self._wait(torch.mm(x, x))

        y = torch.ones(COPY_BYTES // 4, device=self.device)
        out = torch.empty_like(y)
        found = {}
        for name, threads in (("one_thread_flops", 1), ("flops", num_cores())):
            torch.set_num_threads(threads)
            found[name] = product_flops(product, self.settings["device"])
        found["bytes"] = 2 * COPY_BYTES / best_seconds(lambda: self._wait(torch.add(y, 1, out=out)))
        return found

    def device_peak_bytes(self) -> int | None:
        """The most of the device's own memory that was in use; None on the CPU."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _wait(self, _: Any = None) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _large(error: float) -> float:
    """A number that JSON has, also for infinity and NaN."""
    return error if math.isfinite(error) else 1e30


@contextlib.contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _without_dropout(*models: Any) -> Iterator[None]:
    places = [place for model in models for place in dropout_places(model)]
    rates = [getattr(*place) for place in places]
    for place in places:
        setattr(*place, 0.0)
    try:
        yield
    finally:
        for place, rate in zip(places, rates, strict=True):
            setattr(*place, rate)


def dropout_places(model: Any) -> list[tuple[Any, str]]:
    """The layers of a model that drop elements, and the attribute that is each one's rate."""
    import torch

    names = {torch.nn.Dropout: "p", torch.nn.MultiheadAttention: "dropout"}
    return [
        (layer, name)
        for layer in model.modules()
        for kind, name in names.items()
        if isinstance(layer, kind)
    ]


def fastest_optimizer(
    make_optimizer: Any, model: Any, wait: Callable[[], None] = lambda: None
) -> tuple[Any, str]:
    """Try PyTorch's implementations on copies of the parameters; the fastest one, and its name.

    `wait` is called before a time is taken, for a device that computes behind.
    """
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
            wait()
        except (RuntimeError, ValueError):
            continue  # not for this optimizer or device
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(20):
                optimizer.step()
            wait()
            rounds.append(time.perf_counter() - start)
        times[name] = min(rounds)
    if not times:  # it is for sparse gradients alone
        return make_optimizer(model.parameters()), "for sparse gradients"
    best = min(times, key=lambda name: times[name])
    return make_optimizer(model.parameters(), **ways[best]), best
