"""Evaluation: each example once, the same by any cut, and nothing of training moves."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cifar10
from jaxnets import metrics
from jaxnets.config import RunOptions
from jaxnets.data import Batches, cifar, image_folder, load, take
from jaxnets.evaluation import make_evaluator
from jaxnets.train import create_state, evaluate, make_eval_step, make_strategy, make_train_step
from jaxnets.train.state import TrainState
from tests.traps import probe

BATCH, MOST = 8, 3 * 8 + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Off:
    """Of the ids below a size how many were counted otherwise than once, and of the others at all."""

    total: Any
    size: Any

    def compute(self):
        is_there = np.arange(MOST) < np.max(self.size)
        return np.sum(np.asarray(self.total) != is_there)


def count_ids(params, model_state, batch):
    once = probe.Table.of(batch["mask"].astype(jnp.int32), batch["id"], MOST).total
    # The size of the data set, carried along by the one row that holds it.
    size = jnp.zeros(MOST, jnp.int32).at[batch["id"]].max(jnp.where(batch["mask"], batch["id"] + 1, 0))
    return {
        "off": Off(once, size),
        "mean": metrics.Mean.of(batch["x"] * params, batch["mask"]),
        "odd": metrics.Mean.of(batch["id"] % 2 == 1, batch["mask"]),
    }


@pytest.mark.parametrize(("strategy", "num_devices"), [("jit", 1), ("jit", 8), ("pmap", 2), ("pmap", 8)])
def test_every_size_counts_each_example_once(strategy, num_devices):
    """From one example to one more than three batches, against NumPy over all ids."""
    where = make_strategy(strategy, num_devices=num_devices)
    step = where.compile_eval(functools.partial(make_eval_step, count_ids))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, jnp.float32(2), {}, (), jnp.zeros(2), None, zero - 1)
    x = np.random.default_rng(0).uniform(1, 2, MOST).astype(np.float32)
    for size in range(1, MOST + 1):
        data = {"x": x[:size], "id": np.arange(size, dtype=np.int32)}
        draws = Batches(size, BATCH, size, shuffle=False)
        found = evaluate(step, state, [take(data, draw) for draw in draws])
        assert (found["count"], found["off"]) == (size, 0), size
        assert found["odd"] == (size // 2) / size
        np.testing.assert_allclose(found["mean"], 2 * x[:size].astype(np.float64).mean(), rtol=1e-6)


def trained(recipe, where, *, evaluator=None, num_steps=6):
    """The state after some steps, evaluated or not in between; and the losses."""
    make_step = functools.partial(make_train_step, recipe.loss_fn, recipe.tx)
    step = where.compile_step(make_step, recipe.train)
    state = where.init(lambda: create_state(recipe.init_fn, recipe.tx, key=jax.random.key(0)))
    draws, seen = Batches(recipe.num_examples, 16, 160), []
    for i in range(num_steps):
        if evaluator:
            before = probe.host(state)
            first = evaluator(state)
            assert evaluator(state) == first  # nothing is drawn
            probe.assert_same(state, before)
        state, values = step(state, draws[i])
        seen.append(float(values["loss"]))
    return state, seen


@pytest.mark.parametrize(
    ("strategy", "num_devices"), [("jit", 1), pytest.param("pmap", 2, marks=pytest.mark.long)]
)
def test_evaluation_moves_nothing_of_training(strategy, num_devices):
    """Parameters, statistics, moments and the stream of dropout: bit for bit, with and without."""
    where = make_strategy(strategy, num_devices=num_devices)
    recipe = probe.recipe(probe.arrays(40))
    plain, losses = trained(recipe, where)
    with_evaluation, others = trained(recipe, where, evaluator=make_evaluator(recipe, where))
    assert losses == others
    probe.assert_same(plain, with_evaluation)


def test_the_result_does_not_depend_on_batches_devices_or_order():
    """Running statistics, not the batch's; no dropout. Against one row at a time by hand."""
    data = probe.arrays(37)
    where = make_strategy(num_devices=1)
    state, _ = trained(probe.recipe(data), where)
    state = jax.device_get(dataclasses.replace(state, key=jnp.zeros(2)))
    stats, params = state.model_state["batch_stats"]["norm"], state.params
    assert np.abs(stats["mean"]).max() > 0.01  # they have been learnt
    x = data["image"].reshape(37, -1) / 127.5 - 1
    x = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    x = np.maximum(x * params["norm"]["scale"] + params["norm"]["bias"], 0)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    accuracy = (logits.argmax(1) == data["label"]).mean()
    chosen = logits[np.arange(37), data["label"]]
    loss = (np.log(np.exp(logits).sum(1)) - chosen).mean()
    order = np.random.default_rng(0).permutation(37)
    moved = {name: x[order] for name, x in data.items()}
    for size, name, num_devices, arrays in [
        (8, "jit", 1, data), (37, "jit", 1, moved), (500, "pmap", 8, moved), (16, "jit", 8, data),
    ]:  # fmt: skip
        found = make_evaluator(
            probe.recipe(arrays, eval_batch_size=size), make_strategy(name, num_devices=num_devices)
        )(state)
        assert (found["count"], found["accuracy"]) == (37, pytest.approx(accuracy, rel=1e-12))
        assert found["loss"] == pytest.approx(loss, rel=1e-5)


def write_cifar(folder: Path):
    images = np.random.default_rng(0).integers(0, 256, (6 * 5, 3072), dtype=np.uint8)
    records = np.concatenate([np.arange(30, dtype=np.uint8)[:, None] % 10, images], 1)
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(records[5 * i : 5 * i + 5].tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    return images.reshape(30, 3, 32, 32).transpose(0, 2, 3, 1), 5


def write_idx(folder: Path):
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 4), dtype=np.uint8)
    for part, rows in (("train", images[:8]), ("t10k", images[8:])):
        for kind, array in (("images-idx3", rows), ("labels-idx1", np.arange(len(rows)) % 2)):
            sizes = np.array(array.shape, ">u4").tobytes()
            header = bytes([0, 0, 8, array.ndim]) + sizes
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return images[..., None], 4


def write_folder(folder: Path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        path = folder / ("train" if i < 8 else "test") / f"c{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images, 4


def in_memory(part):
    if isinstance(part, dict):
        return part["image"]
    return np.stack([part[i]["image"] for i in range(len(part))])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # these files are nobody's official ones
@pytest.mark.parametrize(
    ("name", "write"),
    [("digits", None), ("cifar10", write_cifar), ("fashion", write_idx), ("blobs", write_folder)],
)
def test_no_example_is_in_both_parts(tmp_path, monkeypatch, name, write):
    """Every image of the files once, the parts as the files have them; and of the real digits."""
    monkeypatch.setattr(cifar, "_NUM_RECORDS", 5)
    if write:
        folder = tmp_path / name / ("cifar-10-batches-bin" if name == "cifar10" else "")
        folder.mkdir(parents=True)
        images, num_test = write(folder)
    dataset = image_folder.open_images(name, size=8, data_dir=tmp_path, progress=False)
    train, test = ([x.tobytes() for x in in_memory(part)] for part in (dataset.train, dataset.test))
    assert not set(train) & set(test)
    if write:
        expected = [x.tobytes() for x in images]
        assert sorted(train) == sorted(expected[:-num_test])
        assert sorted(test) == sorted(expected[-num_test:])
    else:
        assert (len(train), len(test)) == (1438, 359)


def test_a_start_knows_nothing_of_the_test_set(monkeypatch):
    """The whitening kernel is the one thing that is measured on data before training."""
    digits = load("digits", progress=False)
    starts = []
    for change in (lambda x: x, lambda x: 255 - x):
        other = {**digits.test, "image": change(digits.test["image"])}
        changed = dataclasses.replace(digits, test=other)
        monkeypatch.setattr("jaxnets.data.open_images", lambda *_, changed=changed, **__: changed)
        config = cifar10.Config(dataset="digits", model="speednet", whiten=True)
        recipe = cifar10.make_recipe(config, RunOptions())
        # Of all that a start computes only the kernel, which XLA is given alone.
        kernel = jax.jit(lambda key, r=recipe: r.init_fn(key)[0]["whiten"]["kernel"])
        starts.append(kernel(jax.random.key(0)))
    np.testing.assert_array_equal(*starts)
    assert np.abs(starts[0]).max() > 0
