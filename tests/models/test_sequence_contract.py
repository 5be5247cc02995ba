"""Layers of sequences, and encoders of texts: what the contract suite asks of the models of images."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import registry
from jaxnets.interop import state_dict
from tests.models.eight_devices import QUICK, assert_close, assert_eight_equal_one, sums_and_gradients
from tests.models.tiny_translation import draw

V, B, T, D = 11, 16, 5, 8  # tokens, rows, places, width
_RECURRENT = {"hidden": D, "num_layers": 2, "is_bidirectional": True}
_STACK = {"num_layers": 2, "width": D, "num_heads": 2, "hidden": 12}
TINY = {
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
    "transformer_encoder": _STACK,
    "transformer_decoder": _STACK,
    "bert_base": {"vocabulary_size": V, "max_length": 8, **_STACK},
}
DROPOUT = {
    name: {"dropout_rate": 0.3} | ({"recurrent_dropout_rate": 0.2} if name in ("lstm", "gru") else {})
    for name in TINY
}
NUM_PARAMS = {  # by default but for 128 units, of the input too, where a layer has no default
    "lstm": 4 * 128 * (128 + 128 + 1),
    "gru": 3 * 128 * (128 + 128 + 1) + 128,
    "transformer_encoder": 6 * 3_152_384 + 2 * 512,
    "transformer_decoder": 6 * 4_204_032 + 2 * 512,
    "bert_base": 108_891_648,
}
_SIZES = {"num_layers": 2, "width": D, "num_heads": 2}
TABLES = {
    "lstm": state_dict.recurrent("", "", kind="lstm", num_layers=2, is_bidirectional=True),
    "gru": state_dict.recurrent("", "", kind="gru", num_layers=2, is_bidirectional=True),
    "transformer_encoder": state_dict.encoder("", "", use_final_norm=True, **_SIZES),
    "transformer_decoder": state_dict.decoder("", "", use_final_norm=True, **_SIZES),
    "bert_base": state_dict.bert(**_SIZES),
}
KINDS = {
    name: kind for kind in ("layer", "text_encoder") for name in registry.names(kind)
}  # each is tested as soon as it has a name
every_name = pytest.mark.parametrize("name", KINDS)


def build(name, **fields):
    return registry.get(KINDS[name], name)(**{**TINY[name], **fields})


def inputs_of(name, batch):
    """The arguments by position, and those by name."""
    if name == "transformer_decoder":
        return (batch["x"], batch["memory"]), {"memory_mask": batch["memory_places"]}
    return (batch["tokens" if KINDS[name] == "text_encoder" else "x"],), {"mask": batch["places"]}


@cache
def start(name, dtype=np.float32):
    """Parameters drawn by NumPy, biases too."""
    args, _ = inputs_of(name, batch_of())
    return draw(jax.eval_shape(build(name).init, jax.random.key(0), *args)["params"], dtype=dtype)


def batch_of(dtype=np.float32):
    rng = np.random.default_rng(0)

    def places():
        return jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (B, 1)))

    def normal():
        return jnp.asarray(rng.normal(size=(B, T, D)).astype(dtype))

    return {
        "x": normal(),
        "memory": normal(),
        "along": jnp.asarray(rng.normal(size=(B, T, 2 * D)).astype(dtype)),
        "tokens": jnp.asarray(rng.integers(0, V, (B, T)).astype(np.int32)),
        "places": places(),
        "memory_places": places(),
        "index": jnp.asarray(rng.permutation(1000)[:B]),
    }


def outputs(name, params, batch, train=True, **fields):
    """`[B, T, ...]`, 0 where a place is padding."""
    args, named = inputs_of(name, batch)
    out = build(name, **fields).apply(
        {"params": params},
        *args,
        train=train,
        rows=batch["index"],
        rngs={"dropout": jax.random.key(1)} if train else {},
        **named,
    )
    out = out[0] if isinstance(out, tuple) else out
    return jnp.where(batch["places"][..., None], out, 0)


def train(name, params, batch, axis_name=None, **fields):
    """A sum and its gradients over the global batch, and this part's outputs."""

    def loss_fn(params):
        out = outputs(name, params, batch, **fields)
        return (out * batch["along"][..., : out.shape[-1]]).sum(), out

    return sums_and_gradients(loss_fn, params, axis_name)


@every_name
def test_outputs_gradients_and_the_number_of_traces(name):
    traces = []

    def step(params, batch):
        traces.append(None)
        return train(name, params, batch)

    step = jax.jit(step, compiler_options=QUICK)
    params, batch = start(name), batch_of()
    loss, grads, out = step(params, batch)
    assert out.shape == (B, T, 2 * D if "is_bidirectional" in TINY[name] else D)
    assert out.dtype == jnp.float32
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        # The bias of the keys changes all scores of a query alike, and so nothing.
        if [part.key for part in path[-2:]] != ["key", "bias"]:
            assert np.abs(leaf).max() > 1e-6, f"{jax.tree_util.keystr(path)} learns nothing"
    step(jax.tree.map(lambda x, g: x - 0.01 * g, params, grads), jax.tree.map(lambda x: x[::-1], batch))
    assert len(traces) == 1
    assert_close(train(name, params, batch), (loss, grads, out), rtol=1e-4, atol=1e-4)


@every_name
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_eight_devices_equal_one(name, strategy, x64):
    step = partial(train, name, **DROPOUT[name])
    assert_eight_equal_one(step, start(name, np.float64), batch_of(np.float64), strategy)


@every_name
def test_padding_changes_no_number(name):
    params, batch = start(name), batch_of()

    other = batch | {
        "x": jnp.where(batch["places"][..., None], batch["x"], 7),
        "tokens": jnp.where(batch["places"], batch["tokens"], 3),
        "memory": jnp.where(batch["memory_places"][..., None], batch["memory"], 7),
    }
    expected = outputs(name, params, batch, **DROPOUT[name])
    np.testing.assert_allclose(outputs(name, params, other, **DROPOUT[name]), expected, atol=2e-6)
    everything = {x: jnp.ones_like(batch[x]) for x in ("places", "memory_places")}
    shown = outputs(name, params, other | everything, **DROPOUT[name])
    assert np.abs(np.where(batch["places"][..., None], shown - expected, 0)).max() > 1e-3


@every_name
def test_training_follows_the_rows_wherever_they_are(name):
    params, batch = start(name), batch_of()
    expected = np.asarray(outputs(name, params, batch, **DROPOUT[name]))
    turned = outputs(name, params, jax.tree.map(lambda x: x[::-1], batch), **DROPOUT[name])
    np.testing.assert_allclose(turned[::-1], expected, rtol=1e-5, atol=1e-5)
    other = outputs(name, params, batch | {"index": batch["index"] + 1}, **DROPOUT[name])
    assert np.abs(other - expected).max() > 1e-2
    without = outputs(name, params, batch)
    np.testing.assert_array_equal(outputs(name, params, batch, train=False, **DROPOUT[name]), without)


@every_name
def test_the_compute_dtype_is_not_that_of_the_parameters(name):
    params, batch = start(name), batch_of()
    low = outputs(name, params, batch, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), outputs(name, params, batch), atol=0.15)
    args, _ = inputs_of(name, batch)
    shapes = jax.eval_shape(build(name, dtype=jnp.bfloat16).init, jax.random.key(0), *args)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@every_name
def test_its_weights_go_to_a_file_and_come_back(name, tmp_path):
    """In PyTorch's layout, where each array of the layer has its place."""
    pytest.importorskip("safetensors")
    params, batch = start(name), batch_of()
    names = state_dict.to_state_dict(TABLES[name], {"params": params})
    state_dict.save_safetensors(tmp_path / "weights.safetensors", names)
    found = state_dict.read_safetensors(tmp_path / "weights.safetensors")
    blank = {"params": jax.tree.map(np.zeros_like, params)}
    again = state_dict.from_state_dict(TABLES[name], found, blank)["params"]
    assert jax.tree.structure(again) == jax.tree.structure(jax.tree.map(np.asarray, params))
    assert_close(again, params, rtol=0, atol=0)
    np.testing.assert_array_equal(outputs(name, again, batch), outputs(name, params, batch))


@every_name
def test_the_number_of_parameters(name):
    fields = {"hidden": 128} if name in ("lstm", "gru") else {}
    layer = registry.get(KINDS[name], name)(**fields)
    width = 128 if fields else 512
    x = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
    args = {"bert_base": (jax.ShapeDtypeStruct((1, 2), jnp.int32),), "transformer_decoder": (x, x)}
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *args.get(name, (x,)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == NUM_PARAMS[name]
