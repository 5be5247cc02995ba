"""A step that updates the rows of a batch, over the size of the table; beside PyTorch's SparseAdam.

    python -m benchmarks.row_updates [--rows 10000 10000000] [--out runs/row-updates]

Matrix factorisation of 1,000 users and more and more items, lazy Adam. All sizes are in memory at once,
and rounds go over them and over both libraries in turns. What a step takes beside the state is the
program's own plan. The goal: that memory and time are the same for ten million rows as for ten thousand.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxnets import errors
from jaxnets.config import read_words
from jaxnets.interop.duel_report import processor
from jaxnets.version import __version__

NUM_USERS, NUM_BATCHES = 1000, 16


@dataclasses.dataclass(frozen=True)
class Options:
    """What a step costs over the size of the table."""

    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Items, of which each size is measured."""
    batch_size: int = 1024
    """Ratings in a step."""
    width: int = 32
    """Of the vectors."""
    rounds: int = 9
    """Timed rounds of each size and library."""
    steps: int = 100
    """Steps in a round."""
    out: Path = Path("runs/row-updates")
    """Folder for row_updates.json."""


def draws(num_rows: int, options: Options) -> list[dict[str, Any]]:
    """Batches of random ratings."""
    import numpy as np

    rng = np.random.default_rng(0)
    size = options.batch_size
    return [
        {
            "user": rng.integers(0, NUM_USERS, size, dtype=np.int32),
            "item": rng.integers(0, num_rows, size, dtype=np.int32),
            "rating": rng.integers(1, 6, size).astype(np.float32),
            "mask": np.ones(size, bool),
            "index": np.arange(size, dtype=np.int32),
        }
        for _ in range(NUM_BATCHES)
    ]


def with_jaxnets(num_rows: int, options: Options) -> tuple[Callable[[int], None], dict[str, int]]:
    """A function that takes steps, and what a step takes of memory, in bytes."""
    import jax
    import jax.numpy as jnp

    from jaxnets import losses, models, train
    from jaxnets.train import row_optim
    from jaxnets.train.row_updates import Tables, step_maker

    model = models.matrix_factorization(NUM_USERS, num_rows, width=options.width, mean=3.0)
    init_fn, apply_fn = models.functional(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))

    def loss_fn(params, model_state, batch, *, key):
        del key
        pairs = jnp.stack([batch["user"], batch["item"]], axis=-1)
        stars, model_state = apply_fn(params, model_state, pairs, train=True)
        return {"loss": losses.squared_error(stars, batch["rating"])}, model_state, {}

    kinds = ("user", "item")
    tables = Tables({f"{e}{end}/embedding": e for e in kinds for end in ("", "_bias")})
    tx = row_optim.lazy_adam(0.01)
    strategy = train.make_strategy("jit", num_devices=1)
    state = strategy.init(lambda: train.create_state(init_fn, tx, key=jax.random.key(0)))
    make_step = partial(step_maker(tables), loss_fn, tx)
    batches = [jax.tree.map(jnp.asarray, batch) for batch in draws(num_rows, options)]
    step = strategy.compile_step(make_step)
    plan = jax.jit(make_step(), donate_argnums=0).lower(state, batches[0]).compile().memory_analysis()
    assert plan is not None
    memory = {
        "state": sum(x.nbytes for x in jax.tree.leaves(state)),
        "beside": plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes,
    }

    def run(count: int) -> None:
        nonlocal state
        for i in range(count):
            state, _ = step(state, batches[i % NUM_BATCHES])
        jax.block_until_ready(state)

    return run, memory


def with_torch(num_rows: int, options: Options) -> Callable[[int], None]:
    """The same in PyTorch."""
    import torch

    from benchmarks.torch_reference.recommender_models import MatrixFactorization

    model = MatrixFactorization(NUM_USERS, num_rows, is_sparse=True, width=options.width, mean=3.0)
    torch.sparse.check_sparse_tensor_invariants.disable()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
    batches = [
        {name: torch.from_numpy(x) for name, x in batch.items()} for batch in draws(num_rows, options)
    ]

    def run(count: int) -> None:
        for i in range(count):
            batch = batches[i % NUM_BATCHES]
            optimizer.zero_grad()
            error = model(batch["user"], batch["item"]) - batch["rating"]
            (error * error).mean().backward()
            optimizer.step()

    return run


def measure(options: Options) -> dict[str, Any]:
    """Medians of each size, in seconds for a step."""
    runs, memory = {}, {}
    has_torch = importlib.util.find_spec("torch") is not None
    for num_rows in options.rows:
        runs["jaxnets", num_rows], memory[num_rows] = with_jaxnets(num_rows, options)
        if has_torch:
            runs["torch", num_rows] = with_torch(num_rows, options)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run(options.steps)
    for _ in range(options.rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            run(options.steps)
            times[key].append((time.perf_counter() - start) / options.steps)
    found = []
    for num_rows in options.rows:
        row: dict[str, Any] = {"rows": num_rows, "bytes": memory[num_rows]}
        row |= {name: sorted(times[name, num_rows]) for name, size in times if size == num_rows}
        found.append(row)
    return {"options": dataclasses.asdict(options) | {"out": str(options.out)}, "found": found}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep it."""
    try:
        options = read_words(Options, sys.argv[1:] if argv is None else argv, prog="row_updates")
        if min(options.rows, default=0) < 1:
            raise errors.ConfigError(f"rows are numbers of at least 1, not {options.rows}")
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from jaxnets.allocator import keep_freed_memory

    keep_freed_memory()
    record = measure(options)
    for row in record["found"]:
        ours = statistics.median(row["jaxnets"])
        line = f"{row['rows']:>12,} rows: {ours * 1e3:.3f} ms a step, {row['bytes']['beside']:,} bytes"
        line += f" beside a state of {row['bytes']['state']:,}"
        if "torch" in row:
            theirs = statistics.median(row["torch"])
            line += f"; PyTorch {theirs * 1e3:.3f} ms, ratio {theirs / ours:.2f}"
        print(line)
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("jax", "jaxlib", "numpy", "torch")
    versions = {name: metadata.version(name) for name in names if importlib.util.find_spec(name)}
    about = {"jaxnets": __version__, "processor": processor(), "versions": versions}
    text = json.dumps({**about, **record}, indent=1)
    (options.out / "row_updates.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
