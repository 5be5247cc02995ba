"""JAX's side of the duel as it runs in its process."""

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxnets.data import Batches
from jaxnets.interop.measure import (
    COPY_BYTES,
    ENDLESS,
    best_seconds,
    num_cores,
    peak_bytes,
    product_flops,
)
from jaxnets.remote import as_path


class JaxSide:
    """Trains as the `train` command does, or predicts, on one device.

    Args:
        spec: as `contender.make_starters` writes it. "mode" is "train" or "inference"; "is_plain" asks
            for `jax.lax`'s own operations and XLA's default options; "threads" is how many XLA
            computes with, "cache" the folder of compiled programs, or None.
    """

    def __init__(self, spec: Mapping[str, Any]):
        import jax

        from jaxnets import ops, registry, startup, train

        startup.limit_threads(spec["threads"])
        from jaxnets.config import RunOptions, from_json
        from jaxnets.train import row_updates

        # Compilation is part of the report, so programs come from no other cache than the duel's own.
        jax.config.update("jax_enable_compilation_cache", spec["cache"] is not None)
        jax.config.update("jax_compilation_cache_dir", spec["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        self.cache_hits = 0
        jax.monitoring.register_event_listener(self._count_hits)
        for file in spec["plugins"]:
            registry.load_file(file)
        experiment = importlib.import_module(spec["module"]).EXPERIMENT
        self.after_imports = peak_bytes()
        config = from_json(type(experiment.config), spec["config"])
        data_dir = spec["data_dir"] and as_path(spec["data_dir"])
        options = RunOptions(data_dir=data_dir, verify=spec["verify"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parent has said it
            recipe = experiment.make_recipe(config, options)
        variables = unflatten(dict(np.load(spec["weights"])))
        params = variables.pop("params")
        strategy = train.make_strategy("jit", num_devices=1)
        key = jax.random.key(recipe.seed)
        self.is_training = spec["mode"] == "train"
        self.is_plain = spec["is_plain"]
        self.state: Any
        if self.is_training:
            self.state = strategy.init(
                lambda: train.create_state(lambda _: (params, variables), recipe.tx, key=key)
            )
            make_step = partial(
                row_updates.step_maker(recipe.tables),
                recipe.loss_fn,
                recipe.tx,
                weights_fn=recipe.weights_fn,
                coefficients=recipe.coefficients,
            )
            compile_program: Any = partial(strategy.compile_step, make_step)
        else:
            predict_fn = recipe.predict_fn
            assert predict_fn is not None  # the parent has checked
            self.state = strategy.init(
                lambda: (params, variables)
            )  # no optimizer's, which PyTorch hasn't

            def make_predict(*, axis_name: str | None) -> Any:
                del axis_name  # None, under jit
                return lambda state, batch: predict_fn(*state, batch)

            compile_program = partial(strategy.compile_eval, make_predict)
        count = spec["steps_per_call"] if self.is_training else 1
        self.several: Any = None
        arrays = strategy.replicate(dict(recipe.train_arrays))  # once for both programs
        with ops.plain() if self.is_plain else contextlib.nullcontext():
            self.program = compile_program(arrays)
            if count > 1:
                programs = {0: compile_program(arrays, num_steps=count)}
                self.several = train.Several(count, programs, lambda step: False)
        self.batches = Batches(recipe.num_examples, recipe.batch_size, ENDLESS, seed=recipe.seed)
        held = self.state.params if self.is_training else self.state[0]
        dtypes = {str(x.dtype) for x in jax.tree.leaves(held)}
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        self.settings = {
            "mode": spec["mode"],
            "dtype": ", ".join(sorted(dtypes)),
            "compute_dtype": spec["compute_dtype"],
            "batch_size": len(self.batches[0]["index"]),
            "matmul_precision": matmul_precision(precision, jax.default_backend()),
            "jax_default_matmul_precision": precision,
            "device": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "strategy": "jit, 1 device",
            "is_plain": self.is_plain,
            "threads": spec["threads"] or num_cores(),
            "steps_per_call": count,
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "versions": {
                "jax": jax.__version__,
                "jaxlib": importlib.import_module("jaxlib").__version__,
            },
        }

    def first(self) -> list[list[float]]:
        """Make the first call of the program that is timed, and wait for it: each step's values."""
        if self.several:
            return [[loss] for loss in np.asarray(self._call(0)).tolist()]
        return [self.finish(self.run(0, 1))]

    def _call(self, first: int) -> Any:
        """Dispatch several steps in one call; their losses."""
        from jaxnets.train import stack

        draws = stack([self.batches[first + k] for k in range(self.several.num_steps)])
        self.state, metrics = self.several.programs[0](self.state, draws)
        return metrics["loss"]

    def run(self, first: int, end: int) -> Any:
        """Dispatch these steps; the last loss or logits, perhaps still being computed."""
        out: Any = None
        while first < end:
            if self.several and self.several.fits(first, end):
                out = self._call(first)[-1]
                first += self.several.num_steps
                continue
            out = self.program(self.state, self.batches[first])
            first += 1
            if self.is_training:
                self.state, metrics = out
                out = metrics["loss"]
        return out

    def check(self) -> dict[str, Any]:
        """Nothing: it is what the others are compared with, by the values of the first steps."""
        return {"parameter": "", "off_by": 0.0}

    def finish(self, value: Any) -> list[float]:
        """Wait for all steps; the last one's loss, or all of its logits."""
        import jax

        jax.block_until_ready((self.state, value))
        return np.ravel(value).tolist()

    def _count_hits(self, event: str, **_: Any) -> None:
        self.cache_hits += event == "/jax/compilation_cache/cache_hits"

    def device_peak_bytes(self) -> int | None:
        """The most of the device's own memory that was in use; None on the CPU."""
        import jax

        device = jax.devices()[0]
        if device.platform == "cpu":
            return None
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    def ceiling(self) -> dict[str, float]:
        """What a matrix product, in the dtype of the computation, and a copy reach here, a second."""
        import jax
        import jax.numpy as jnp

        matmul = jax.jit(jnp.matmul)

        def product(size: int) -> Callable[[], Any]:
            x = jnp.ones((size, size), self.settings["compute_dtype"])
            return lambda: matmul(x, x).block_until_ready()

        y = jnp.ones(COPY_BYTES // 4, jnp.float32)
        copy = jax.jit(lambda y: y + 1)
        return {
            "flops": product_flops(product, jax.default_backend()),
            "bytes": 2 * COPY_BYTES / best_seconds(lambda: copy(y).block_until_ready()),
        }


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
