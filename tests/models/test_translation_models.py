"""What every model of translation keeps to: the contract suite, and what generation needs."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnets import losses, models
from jaxnets.train.mesh import shard_by_rules
from tests.models.tiny_translation import (
    KEY,
    NAMES,
    QUICK,
    B,
    S,
    T,
    V,
    batch_of,
    build,
    draw,
    functions,
    start,
)

every_model = pytest.mark.parametrize("name", NAMES)


def apply(name, params, batch, train, fields):
    _, apply_fn = functions(name, **fields)
    return apply_fn(
        params,
        {},
        batch["tokens"],
        train=train,
        key=KEY if train else None,
        rows=batch["index"],
        mask={"source": batch["source_mask"]},
    )[0]


@cache
def compiled(name, train, fields):
    return jax.jit(
        lambda params, batch: apply(name, params, batch, train, dict(fields)), compiler_options=QUICK
    )


def forward(name, params, batch, train=False, **fields):
    """Logits; without LLVM's optimisations, which take most of the time."""
    return compiled(name, train, tuple(fields.items()))(params, batch)


def total(name, params, batch, **fields):
    logits = apply(name, params, batch, True, fields)
    loss = losses.softmax_cross_entropy(logits, batch["label"])
    return jnp.where(batch["label_mask"], loss, 0).sum()


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("transformer", {}, 3_660_800),
        ("transformer", {"source_vocabulary_size": 100, "tie_embeddings": False}, 3_660_800 + 1_049_600),
        ("attention_rnn", {}, 3_125_248),
    ],
)
def test_the_number_of_parameters(name, fields, expected):
    sizes = {"num_layers": 2, "num_heads": 4} if name == "transformer" else {}
    from jaxnets import registry

    model = registry.get("translation_model", name)(
        vocabulary_size=4000, width=256, hidden=512 if sizes else 256, **sizes, **fields
    )
    example = {side: jax.ShapeDtypeStruct((1, 2), jnp.int32) for side in ("source", "target")}
    shapes = jax.eval_shape(model.init, KEY, example)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == expected


@every_model
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_shape_dtype_and_finite_values(name, dtype):
    logits = forward(name, start(name), batch_of(), dtype=dtype)
    assert logits.shape == (B, T, V)
    assert logits.dtype == (dtype or jnp.float32)
    assert np.isfinite(np.asarray(logits, np.float32)).all()


@every_model
def test_gradients_are_finite_and_each_parameter_has_one(name):
    grads = jax.jit(
        jax.grad(lambda p: total(name, p, batch_of(), dropout_rate=0.2)), compiler_options=QUICK
    )(start(name))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        # The bias of the keys changes all scores of a query alike, and so nothing.
        if [part.key for part in path[-2:]] != ["key", "bias"]:
            assert np.abs(grad).max() > 1e-6, path


@every_model
def test_compiled_as_eager_and_traced_once(name):
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        return apply(name, params, batch, False, {})

    for seed in (0, 1):
        batch = batch_of(seed)
        np.testing.assert_allclose(
            run(start(name), batch), apply(name, start(name), batch, False, {}), rtol=1e-4, atol=1e-5
        )
    assert len(traces) == 1


@every_model
def test_one_device_and_eight_agree(name, x64):
    params, batch = start(name, np.float64), batch_of()

    def run(params, batch):
        return jax.value_and_grad(lambda p: total(name, p, batch, dropout_rate=0.3))(params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    one = jax.jit(run, compiler_options=QUICK)(params, batch)
    eight = jax.jit(run, compiler_options=QUICK)(
        jax.device_put(params, everywhere), jax.device_put(batch, rows)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), one, eight)


@every_model
def test_the_sharding_rules_cut_every_parameter(name):
    rules = getattr(models, name).sharding_rules()
    shapes = jax.eval_shape(functions(name, width=16, hidden=16)[0], KEY)[0]
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = shard_by_rules({"params": shapes, "step": jnp.int32(0)}, rules, mesh)
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings["params"]):
        assert not sharding.is_fully_replicated, path
    assert shardings["step"].is_fully_replicated


@every_model
def test_padding_changes_no_number(name):
    """Neither what padding holds, nor how much of it there is, in training either."""
    params, batch = start(name), batch_of()
    mask = np.asarray(batch["source_mask"])
    other = batch | {
        "tokens": batch["tokens"] | {"source": jnp.where(mask, batch["tokens"]["source"], 7)}
    }
    wider = batch | {
        "tokens": batch["tokens"] | {"source": jnp.pad(batch["tokens"]["source"], ((0, 0), (0, 3)))},
        "source_mask": jnp.pad(batch["source_mask"], ((0, 0), (0, 3))),
    }
    assert not mask.all()
    for options in ({}, {"train": True}, {"train": True, "dropout_rate": 0.3}):
        expected = forward(name, params, batch, **options)
        np.testing.assert_allclose(forward(name, params, other, **options), expected, atol=1e-6)
        np.testing.assert_allclose(forward(name, params, wider, **options), expected, atol=2e-6)
    grad_fn = jax.jit(jax.grad(lambda p, b: total(name, p, b)), compiler_options=QUICK)
    grads = [grad_fn(params, b) for b in (batch, other, wider)]
    for grad in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads[0], grad)
    # Without its mask it does change them: the test sees it.
    seen = other | {"source_mask": jnp.ones_like(batch["source_mask"])}
    assert np.abs(forward(name, params, seen) - expected).max() > 1e-3


@every_model
def test_nothing_of_the_future_is_seen(name):
    params, batch = start(name), batch_of()
    expected = np.asarray(forward(name, params, batch))
    for t in range(T):
        target = batch["tokens"]["target"].at[:, t].add(1) % V
        changed = forward(name, params, batch | {"tokens": batch["tokens"] | {"target": target}})
        np.testing.assert_allclose(changed[:, :t], expected[:, :t], atol=1e-6)
        assert np.abs(changed[:, t:] - expected[:, t:]).max() > 1e-3


@every_model
def test_dropout_belongs_to_the_row(name):
    params, batch = start(name), batch_of()
    out = forward(name, params, batch, train=True, dropout_rate=0.5)
    turned = jax.tree.map(lambda x: x[::-1], batch)
    again = forward(name, params, turned, train=True, dropout_rate=0.5)
    np.testing.assert_allclose(again[::-1], out, rtol=1e-4, atol=1e-5)
    others = forward(name, params, batch | {"index": batch["index"] + 1}, train=True, dropout_rate=0.5)
    assert np.abs(others - out).max() > 0.01
    assert np.abs(forward(name, params, batch, dropout_rate=0.5) - out).max() > 0.01


@every_model
def test_steps_give_what_a_call_gives(name):
    """One token at a time with a cache, three sequences for each row."""
    model, params, batch = build(name), start(name), batch_of()
    num_beams, rng = 3, np.random.default_rng(4)
    said = jnp.asarray(rng.integers(0, V, (B, num_beams, T)).astype(np.int32))
    variables, source = {"params": params}, batch["tokens"]["source"]
    memory, cache = model.apply(
        variables,
        source,
        mask=batch["source_mask"],
        num_beams=num_beams,
        max_length=T + 2,
        method="begin",
    )
    step = jax.jit(
        lambda tokens, t, cache: model.apply(variables, tokens, t, cache, memory, method="step")
    )
    found = []
    for t in range(T):
        logits, cache = step(said[:, :, t], t, cache)
        assert all(x.shape[:2] == (B, num_beams) for x in jax.tree.leaves(cache))
        found.append(logits)
    for w in range(num_beams):
        tokens = {"source": source, "target": said[:, w]}
        expected = forward(name, params, batch | {"tokens": tokens})
        np.testing.assert_allclose(jnp.stack(found, axis=2)[:, w], expected, rtol=1e-4, atol=1e-5)


@every_model
def test_the_start_is_sound(name):
    init_fn, _ = functions(name)
    params, model_state = jax.jit(init_fn)(KEY)
    assert model_state == {}
    logits = forward(name, params, batch_of())
    loss = losses.softmax_cross_entropy(logits, batch_of()["label"]).mean()
    assert 0.5 * np.log(V) < loss < 2.5 * np.log(V)
    again, _ = jax.jit(init_fn)(jax.random.key(7))
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    others = [x for x in jax.tree.leaves(again) if x.ndim > 1]
    assert all((a != b).any() for a, b in zip(kernels, others, strict=True))


@every_model
def test_what_cannot_be(name):
    batch, params = batch_of(), start(name)
    floats = batch["tokens"] | {"source": jnp.ones((B, S))}
    with pytest.raises(ValueError, match="are integers"):
        forward(name, params, batch | {"tokens": floats})
    if name == "transformer":
        long = batch["tokens"] | {"target": jnp.zeros((B, 17), jnp.int32)}
        with pytest.raises(ValueError, match="17 target tokens in a row; this model takes at most 16"):
            forward(name, params, batch | {"tokens": long})
        with pytest.raises(ValueError, match="sequences of 17; this model takes at most 16"):
            build(name).apply(
                {"params": params}, batch["tokens"]["source"], max_length=17, method="begin"
            )
        with pytest.raises(ValueError, match="did you mean 'relu'"):
            forward(name, params, batch, activation="rela")
        with pytest.raises(ValueError, match="kind of positions"):
            forward(name, params, batch, positions="sine")
    strange = batch["tokens"] | {"source": jnp.full((B, S), V)}
    assert np.isnan(forward(name, params, batch | {"tokens": strange})).all()


def test_own_tables_learned_positions_and_an_own_head():
    fields = {"source_vocabulary_size": 9, "positions": "learned", "tie_embeddings": False}
    batch = batch_of()
    tokens = batch["tokens"] | {"source": batch["tokens"]["source"] % 9}
    shapes = jax.eval_shape(functions("transformer", **fields)[0], KEY)[0]
    params = draw(shapes)
    assert params["source_embedding"]["embedding"].shape == (9, 8)
    assert params["head"]["kernel"].shape == (8, V)
    expected = forward("transformer", params, batch | {"tokens": tokens}, **fields)
    moved = params | {"source_positions": jax.tree.map(lambda x: x[::-1], params["source_positions"])}
    assert (
        np.abs(forward("transformer", moved, batch | {"tokens": tokens}, **fields) - expected).max()
        > 0.01
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((B, S), bool), "a mask .* is of which side"),
        ({"src": np.ones((B, S), bool)}, "masks are of source and target, not of src"),
    ],
)
@every_model
def test_masks_that_cannot_be(name, mask, message):
    model, batch = build(name), batch_of()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.apply({"params": start(name)}, batch["tokens"], mask=mask))
    jax.eval_shape(lambda: model.apply({"params": start(name)}, batch["tokens"], mask=np.ones(B, bool)))
