"""Random numbers: each key once, each row its own, the same on any devices and in any process."""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from experiments import cifar10
from jaxnets import runner
from jaxnets.config import RunOptions
from jaxnets.data import Batches
from jaxnets.layers import Dropout
from jaxnets.models import functional
from jaxnets.ops import row_bits
from jaxnets.train import augment, create_state, make_strategy, make_train_step
from jaxnets.train.flops import primitives
from jaxnets.train.sharding import gather_rows
from tests.traps import probe

ROOT = Path(cifar10.__file__).parents[1]
TX = optax.sgd(0.1)
QUICK = {"xla_backend_optimization_level": 0}
SIZE, PLACES = 32, 24  # rows of a batch, and what each of two layers of dropout masks of it


@pytest.mark.parametrize(
    "whole",
    [False, True],
    ids=["loss", "step"],
)
def test_no_key_is_used_twice(whole):
    """From the run's seed over parameters, augmentation, mixing and dropout to the gradients.

    JAX sees what its own generators use up; the keys of `row_bits` are compared further down.
    """
    config = cifar10.Config(dataset="digits", model="mlp", batch_size=8, steps=2, crop=2,
                            flip="random", cutout=4, mixup=0.4, ema_decay=0.9)  # fmt: skip
    recipe = cifar10.make_recipe(config, RunOptions())
    draw = Batches(64, 8, 16, partners=True)[1]
    batch = {**gather_rows({name: x[:64] for name, x in recipe.train_arrays.items()}, draw)}

    def gradients(state, batch):
        key = jax.random.fold_in(state.key, state.step)

        def loss(params):
            return recipe.loss_fn(params, state.model_state, batch, key=key)[0]["loss"].sum()

        return jax.grad(loss)(state.params)

    step = make_train_step(recipe.loss_fn, recipe.tx, ema_decay=0.9) if whole else gradients
    with jax.debug_key_reuse(True):
        state = jax.jit(runner.make_state(recipe), compiler_options=QUICK)()
        jax.jit(step, compiler_options=QUICK)(state, batch)


def test_a_key_that_is_used_twice_would_be_found():
    """Or the test above would say nothing."""
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        jax.jit(lambda key: jax.random.normal(key) + jax.random.normal(key))(jax.random.key(0))


class Masks(nn.Module):
    """Two layers of dropout over ones: what they leave is their masks."""

    @nn.compact
    def __call__(self, x, *, train=False, rows=None, mask=None):
        del mask
        ones = jnp.ones((x.shape[0], PLACES), x.dtype)
        layers = [Dropout(0.5, name=name)(ones, train=train, rows=rows) for name in ("one", "two")]
        return jnp.stack(layers, 1) * self.param("scale", nn.initializers.ones, ())


def masks_of(strategy, num_devices, accumulate, *, has_ids):
    """The masks of two steps, `[2 steps, rows, 2 layers, PLACES]`, by a compiled training step."""
    init_fn, apply_fn = functional(Masks(), jax.ShapeDtypeStruct((1, 1), jnp.float32))

    def loss_fn(params, model_state, batch, *, key):
        rows = batch["id"] if has_ids else None
        kept, _ = apply_fn(params, model_state, batch["x"], train=True, key=key, rows=rows)
        table = probe.Table.of((kept > 0).astype(jnp.int32), batch["place"], SIZE)
        return {"loss": kept.sum((1, 2))}, model_state, {"masks": table}

    where = make_strategy(strategy, num_devices=num_devices)
    make_step = functools.partial(make_train_step, loss_fn, optax.sgd(0.0), accumulate=accumulate)
    step = where.compile_step(make_step)
    state = where.init(lambda: create_state(init_fn, TX, key=jax.random.key(3)))
    place = np.arange(SIZE, dtype=np.int32)
    batch = {"x": np.ones((SIZE, 1), np.float32), "place": place, "id": 1000 + 7 * place}
    seen = []
    for _ in range(2):
        state, values = step(state, batch)
        seen.append(np.asarray(values["masks"]))
    return np.stack(seen)


@pytest.mark.parametrize(
    ("has_ids", "ways"),
    [
        pytest.param(False, [("jit", 8, 1), ("pmap", 2, 4)], id="places"),
        pytest.param(True, [("jit", 4, 2), ("pmap", 8, 1)], id="ids", marks=pytest.mark.long),
    ],
)
def test_dropout_masks_differ_by_row_layer_and_step_and_by_nothing_else(has_ids, ways):
    """Rows on other devices or in other micro-batches are other rows."""
    expected = masks_of("jit", 1, 1, has_ids=has_ids)
    assert set(np.unique(expected)) == {0, 1}
    every = expected.transpose(0, 2, 1, 3).reshape(-1, PLACES)
    assert len(np.unique(every, axis=0)) == len(every) == 2 * 2 * SIZE
    for way in ways:
        np.testing.assert_array_equal(masks_of(*way, has_ids=has_ids), expected, err_msg=str(way))


def draw_start(key):
    """Parameters whose axes no number of devices divides, and one that can be spread."""
    keys = jax.random.split(key, 3)
    return {
        "normal": nn.initializers.lecun_normal()(keys[0], (7, 5)),
        "spread": jax.random.uniform(keys[1], (16, 9)),
        "bits": jax.random.bits(keys[2], (17,)),
    }, {}


def start():
    return create_state(draw_start, optax.identity(), key=jax.random.key(11))


@pytest.mark.parametrize("num_devices", [*(pytest.param(n, marks=pytest.mark.long) for n in (2, 4)), 8])
def test_a_start_is_the_same_on_any_number_of_devices(num_devices):
    expected = make_strategy(num_devices=1).init(start)
    where = make_strategy(num_devices=num_devices, rules=[("spread", P("data")), (".*", P())])
    state = where.init(start)
    assert not state.params["spread"].sharding.is_fully_replicated
    assert len(state.params["normal"].sharding.device_set) == num_devices
    probe.assert_same(state, expected)


CONFIG = cifar10.Config(dataset="digits", model="mlp", batch_size=16, steps=3, crop=2,
                        flip="alternate", cutout=4, learning_rate=0.01)  # fmt: skip


def digest():
    """Of everything that a short run with dropout and augmentation computes."""
    recipe = cifar10.make_recipe(CONFIG, RunOptions())
    arrays = {name: x[:64] for name, x in recipe.train_arrays.items()}
    draws = Batches(64, 16, 48, seed=recipe.seed, partners=True)
    where = make_strategy(num_devices=1)
    step = where.compile_step(functools.partial(make_train_step, recipe.loss_fn, recipe.tx), arrays)
    state, found = where.init(runner.make_state(recipe)), hashlib.sha256()
    for i in range(3):
        state, values = step(state, draws[i])
        found.update(json.dumps([draws[i]["index"].tolist(), list(values)]).encode())
        found.update(b"".join(np.asarray(x).tobytes() for x in values.values()))
    for path, x in jax.tree_util.tree_leaves_with_path(probe.host(state)):
        found.update(jax.tree_util.keystr(path).encode() + x.tobytes())
    return found.hexdigest()


def test_two_processes_with_one_seed_compute_the_same_bytes():
    """Whatever order Python hashes words in: another process with another seed of hashing."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    words = "from tests.traps import test_randomness as t; print(t.digest())"
    done = subprocess.run(
        [sys.executable, "-c", words],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()


def test_golden_draws():
    """A JAX that draws otherwise changes every run: see it here, and say so in the change log.

    Whole numbers exactly; of floats only what they are made of, and their values to rounding.
    """
    state = make_strategy(num_devices=1).init(start)
    keys = {"run": state.key, "step 5": jax.random.fold_in(state.key, 5)}
    found = {name: jax.random.key_data(key).tolist() for name, key in keys.items()}
    assert found == GOLDEN["keys"]
    assert state.params["bits"][:3].tolist() == GOLDEN["bits"]
    for name, expected in GOLDEN["floats"].items():
        values = np.ravel(state.params[name])[: len(expected)]
        np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=name)
    masks = masks_of("jit", 1, 1, has_ids=True)
    packed = [int("".join(map(str, row)), 2) for row in masks[1, :3, 1]]
    assert packed == GOLDEN["masks"]
    position = np.arange(6, dtype=np.uint32) + 2**31
    image = np.arange(6 * 8 * 8, dtype=np.float32).reshape(6, 8, 8, 1)
    key = jax.random.key(0)
    crop = augment.random_crop(image, 2, key=key, position=position)[:, 4, 4, 0]
    assert np.asarray(crop).astype(int).tolist() == GOLDEN["crop"]
    mix = jax.jit(functools.partial(augment.mixup_weights, 0.4), compiler_options=QUICK)
    share = mix(key=key, position=position)
    np.testing.assert_allclose(share, GOLDEN["mixup"], rtol=1e-4)


GOLDEN = {
    "keys": {"run": [3947986621, 4020105687], "step 5": [152758983, 822166227]},
    "bits": [113911807, 3438099632, 3476210510],
    "floats": {
        "normal": [-0.130793, 0.173083, -0.05828],
        "spread": [0.148643, 0.127164, 0.723756],
    },
    "masks": [7311044, 7095917, 868126],
    "crop": [43, 92, 165, 220, 299, 348],
    "mixup": [0.37684, 0.014074, 0.99902, 0.99297, 0.49103, 0.88532],
}


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_evaluation_draws_nothing(model):
    """Its program has no primitive of random numbers, and training's has."""
    config = cifar10.Config(dataset="digits", model=model, batch_size=8, steps=1)
    recipe = cifar10.make_recipe(config, RunOptions())
    state = jax.eval_shape(runner.make_state(recipe))
    batch = {"image": jnp.zeros((8, 32, 32, 1), jnp.uint8), "label": jnp.zeros(8, jnp.int32)}
    batch |= {"index": jnp.arange(8), "position": jnp.arange(8), "mask": jnp.ones(8, bool)}

    def random_ones(fn, *args):
        return {name for name in primitives(jax.make_jaxpr(fn)(*args).jaxpr) if "random" in name}

    assert not random_ones(recipe.eval_fn, state.params, state.model_state, batch)
    assert not random_ones(recipe.predict_fn, state.params, state.model_state, batch)
    assert random_ones(make_train_step(recipe.loss_fn, recipe.tx), state, batch)


def test_streams_of_one_seed_have_keys_of_their_own(monkeypatch):
    """Every draw of bits, of augmentation, of mixing and of each layer's dropout; dropout's by step."""
    config = dataclasses.replace(CONFIG, mixup=0.4, window=24, flip="random")
    recipe = cifar10.make_recipe(config, RunOptions())
    seen = []

    def record(key, rows, shape, places=None):
        seen.append(jax.random.key_data(key))
        return row_bits(key, rows, shape, places)

    for module in ("jaxnets.layers.dropout", "jaxnets.train.augment"):
        monkeypatch.setattr(sys.modules[module], "row_bits", record)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def words_of(state, batch):
        seen.clear()
        key = jax.random.fold_in(state.key, state.step)
        recipe.loss_fn(state.params, state.model_state, batch, key=key, size=32)
        return jnp.stack(seen)

    state = jax.jit(runner.make_state(recipe), compiler_options=QUICK)()
    draw = Batches(64, 8, 16, partners=True)[0]
    batch = gather_rows({name: x[:64] for name, x in recipe.train_arrays.items()}, draw)
    first, second = (
        np.asarray(words_of(dataclasses.replace(state, step=jnp.int32(i)), batch)) for i in (0, 1)
    )
    assert len(first) == 2 * 6 + 2  # crop, flip, two of the window and of the square, twice; dropout
    assert len(np.unique(first, axis=0)) == len(first)
    np.testing.assert_array_equal(first[:-2], second[:-2])
    assert len(np.unique(np.concatenate([first, second[-2:]]), axis=0)) == len(first) + 2
