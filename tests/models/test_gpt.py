"""The language model: what the contract suite asks of the models of images, and what is its own."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import errors, losses, models, registry, train
from jaxnets.models.gpt import GPT
from tests.models.tiny_gpt import (
    KEY,
    QUICK,
    TINY,
    B,
    T,
    V,
    assert_close,
    assert_equal,
    batch_of,
    compiled,
    evaluate,
    mean_loss,
    shapes_of,
    start,
    tiny,
)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("gpt2_small", {"vocabulary_size": 50257}, 124_439_808),
        ("gpt2_small", {}, 124_475_904),
        ("gpt_100m", {}, 103_212_288),
        ("gpt_100m", {"tie_embeddings": False, "hidden": 1000, "num_layers": 3}, None),
    ],
)
def test_the_number_of_parameters(name, fields, expected):
    model = registry.get("language_model", name)(**fields)
    width, hidden = model.width, model.hidden or 4 * model.width
    block = 4 * (width * width + width) + 2 * width * hidden + hidden + width + 4 * width
    tables = model.vocabulary_size * (1 if model.tie_embeddings else 2) + model.max_length
    formula = tables * width + model.num_layers * block + 2 * width
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)))
    assert count == formula == (expected or formula)
    for size in (model.vocabulary_size, width) if expected != 124_439_808 else ():
        assert size % 8 == 0


def test_the_large_variant_splits_over_eight_devices():
    model = models.gpt_100m()
    assert model.num_heads % 8 == model.vocabulary_size % 8 == 0
    assert "gpt_100m" in registry.names("language_model")
    assert "gpt_100m" not in registry.names("model")


def test_weights_start_as_they_should():
    init_fn, _ = tiny(width=64, vocabulary_size=128, max_length=64)
    params, model_state = jax.jit(init_fn, compiler_options=QUICK)(jax.random.key(0))
    assert model_state == {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.float32
        if leaf.ndim == 1:
            assert (leaf == name.endswith("scale")).all(), name
        else:
            writes = "attention/out" in name or "mlp/down" in name
            deviation = 0.02 / np.sqrt(4) if writes else 0.02
            assert np.std(leaf) == pytest.approx(deviation, rel=0.06), name
            assert abs(np.mean(leaf)) < 0.06 * deviation, name
    same = (
        params["block1"]["attention"]["query"]["kernel"]
        == params["block2"]["attention"]["query"]["kernel"]
    )
    assert not same.any()


MODERN = {"positions": "rotary", "use_bias": False, "use_tanh": False, "chunk": 3}
every_variant = pytest.mark.parametrize("fields", [{}, MODERN], ids=["GPT-2", "rotary, in chunks"])


def test_without_biases_and_positions_there_are_fewer_parameters():
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes_of(GPT(**{**TINY, **MODERN})))
    ]
    assert not [path for path in paths if "bias" in path or "position" in path]
    assert len(paths) == 2 + 8 * TINY["num_layers"]


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, MODERN])
def test_outputs_and_gradients(fields):
    params, batch = start(**fields), batch_of()
    _, apply_fn = tiny(**fields)
    eager, _ = apply_fn(params, {}, batch["tokens"], train=False)
    assert (eager.shape, eager.dtype) == ((B, T, V), jnp.float32)
    run = evaluate(**fields)
    assert_close(run(params, batch["tokens"]), eager, 1e-5)
    # A mask of rows that fill up a batch, as models of images take it, changes nothing.
    filled = run(params, batch["tokens"], np.arange(B) < 3)
    assert_equal(filled, run(params, batch["tokens"]))
    _, grads = compiled(**fields)(params, batch)
    before, after = (jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (params, grads))
    assert before == after
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all()
        assert np.any(np.asarray(leaf) != 0), f"{jax.tree_util.keystr(path)} learns nothing"


def test_the_compute_dtype_is_not_that_of_the_parameters():
    init_fn, apply_fn = tiny(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(init_fn, KEY))} == {np.dtype("float32")}
    tokens = batch_of()["tokens"]
    rounded = evaluate(dtype=jnp.bfloat16)(start(), tokens)
    assert rounded.dtype == jnp.bfloat16
    exact = evaluate()(start(), tokens)
    assert_close(rounded.astype(np.float32), exact, 0.05)
    assert np.abs(rounded.astype(np.float32) - exact).max() > 0
    # No product runs in float32 but that of queries and keys, which gives float32.
    text = str(jax.make_jaxpr(lambda p, x: apply_fn(p, {}, x, train=False))(start(), tokens))
    dots = re.findall(r":(\w+)\[[\d,]+\] = dot_general\[.*?\] (\w+) (\w+)\n", text, re.DOTALL)
    assert {kind for kind, *_ in dots} == {"bf16", "f32"}
    assert sum(kind == "f32" for kind, *_ in dots) == TINY["num_layers"]


@every_variant
def test_nothing_of_the_future_is_seen(fields):
    run, tokens, params = evaluate(**fields), batch_of()["tokens"], start(**fields)
    logits = np.asarray(run(params, tokens))
    for t in range(T):
        other = np.array(tokens)
        other[:, t:] = (other[:, t:] + 1 + np.arange(T - t)[None]) % V
        changed = np.asarray(run(params, other))
        np.testing.assert_array_equal(changed[:, :t], logits[:, :t])
        assert (changed[:, t:] != logits[:, t:]).any(-1).all()


def test_lengths_down_to_one():
    tokens, (_, apply_fn) = batch_of()["tokens"], tiny()
    whole = evaluate()(start(), tokens)
    one = evaluate()(start(), tokens[:, :1])
    assert one.shape == (B, 1, V)
    assert_close(one, whole[:, :1], 1e-5)
    shape = jax.eval_shape(lambda x: apply_fn(start(), {}, x, train=False)[0], np.zeros((0, 3), int))
    assert shape.shape == (0, 3, V)


def test_what_padding_holds_is_without_effect():
    batch, params, step = batch_of(), start(), compiled()
    pad, real = V - 1, batch["token_mask"]
    batch["tokens"] = np.where(real, batch["tokens"] % pad, pad)
    loss, grads = step(params, batch)
    assert np.isfinite(loss)
    assert (np.asarray(grads["token_embedding"]["embedding"])[pad] != 0).any()  # by its logit alone
    other = np.random.default_rng(3).integers(0, V, (B, T))
    assert_equal(
        step(params, {**batch, "tokens": np.where(real, batch["tokens"], other)}), (loss, grads)
    )
    # Untied, a token that only fills up has no gradient, and may be huge.
    params, step = start(tie_embeddings=False), compiled(tie_embeddings=False)
    expected = step(params, batch)
    assert (expected[1]["token_embedding"]["embedding"][pad] == 0).all()
    table = np.array(params["token_embedding"]["embedding"])
    table[pad] = 1e15
    assert_equal(step({**params, "token_embedding": {"embedding": table}}, batch), expected)


def test_places_behind_a_mask_are_as_if_they_were_not_there():
    tokens, run = batch_of()["tokens"], evaluate()
    mask = np.ones((B, T), bool)
    mask[:, 5:] = False
    assert_close(run(start(), tokens, mask)[:, :5], run(start(), tokens[:, :5]), 1e-5)
    mask[:, 2] = False
    seen = run(start(), tokens, mask)
    assert np.abs(seen - run(start(), tokens))[:, 3].max() > 1e-3


def test_a_step_weights_every_token_alike(x64):
    """Micro-batches hold 19 and 9 tokens: the mean of their means would be another number."""
    params, batch = start(np.float64, num_layers=1), batch_of()
    counts = [int(batch["token_mask"][m::2].sum()) for m in (0, 1)]
    assert counts[0] != counts[1]
    expected, grads = compiled(num_layers=1)(params, batch)
    _, apply_fn = tiny(num_layers=1)

    def loss_fn(params, model_state, batch, *, key):
        mask = batch["token_mask"]
        logits, _ = apply_fn(params, model_state, batch["tokens"], train=True, key=key, mask=mask)
        return {"loss": losses.softmax_cross_entropy(logits, batch["label"])}, model_state, {}

    def weights_fn(batch):
        return {"loss": batch["token_mask"]}

    tx = optax.sgd(0.1)
    state = train.create_state(lambda key: (params, {}), tx, key=KEY)
    step = train.make_train_step(loss_fn, tx, weights_fn=weights_fn, accumulate=2)
    state, metrics = jax.jit(step, compiler_options=QUICK)(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
    assert int(metrics["guard"]) == -1
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), 1e-12)


def test_a_token_that_is_not_in_the_vocabulary_stops_training():
    for token in (V, -1):
        tokens = batch_of()["tokens"] * 0 + token
        assert np.isnan(evaluate()(start(), tokens)).all()


def test_dropout_follows_the_rows_and_differs_between_layers(x64):
    batch, params = batch_of(), start(np.float64)
    step, plain = compiled(dropout_rate=0.3), compiled()
    expected = step(params, batch)
    order = np.random.default_rng(1).permutation(B)
    moved = {name: x[order] for name, x in batch.items()}
    assert_close(step(params, moved), expected, 1e-12)
    others = {**batch, "index": batch["index"] + 1}
    assert abs(step(params, others)[0] - expected[0]) > 1e-3
    assert abs(plain(params, batch)[0] - expected[0]) > 1e-3
    assert_close(plain(params, others), plain(params, batch), 1e-12)


def test_every_place_of_dropout_has_a_key_of_its_own(monkeypatch):
    module = sys.modules["jaxnets.layers.dropout"]  # the function of the same name hides it
    tokens = batch_of()["tokens"]

    @jax.jit
    def keys_of(key, rows):
        seen = []

        def noted(x, rate, *, key, rows, places):
            assert rate == 0.3
            seen.append(jnp.append(jax.random.key_data(key), rows.astype(jnp.uint32)))
            return x

        monkeypatch.setattr(module, "dropout", noted)
        tiny(dropout_rate=0.3)[1](start(), {}, tokens, train=True, key=key, rows=rows)
        return jnp.stack(seen)

    rows = np.arange(B) + 7
    seen = np.asarray(keys_of(KEY, rows))
    assert len(np.unique(seen, axis=0)) == len(seen) == 1 + 3 * TINY["num_layers"]
    np.testing.assert_array_equal(seen[:, 2:], np.tile(rows, (len(seen), 1)))


def test_remat_computes_the_same_and_keeps_less(x64):
    params, batch = start(np.float64, num_layers=1), batch_of()
    expected = compiled(num_layers=1, dropout_rate=0.3)(params, batch)
    kept = {}
    for remat in ("none", "dots", "full"):
        fields = {"num_layers": 1, "dropout_rate": 0.3, "remat": remat}
        mean = partial(mean_loss, batch=batch, **fields)
        residuals = jax.eval_shape(lambda p, mean=mean: jax.vjp(mean, p, has_aux=True)[1], params)
        kept[remat] = {leaf.shape for leaf in jax.tree.leaves(residuals)}
        if remat != "none":
            assert_close(compiled(**fields)(params, batch), expected, 1e-12)
    weights, hidden = (B, TINY["num_heads"], T, T), (B * T, 4 * TINY["width"])
    assert {weights, hidden} <= kept["none"]
    assert weights not in kept["dots"] | kept["full"]
    assert hidden in kept["dots"] - kept["full"]


@pytest.mark.parametrize(
    ("fields", "tokens", "message"),
    [
        ({}, np.zeros((1, 11), int), "11 tokens in a row; this model takes at most 10"),
        ({}, np.zeros((1, 3)), r"integers \[B, T\], not float"),
        ({}, np.zeros(3, int), r"integers \[B, T\], not int\d+ \(3,\)"),
        ({"num_heads": 3}, np.zeros((1, 3), int), "a width of 16 doesn't split into 3 heads"),
        ({"positions": "rotated"}, np.zeros((1, 3), int), "unknown kind of positions 'rotated'"),
        ({"remat": "ful"}, np.zeros((1, 3), int), "unknown remat policy 'ful': did you mean 'full'"),
    ],
)
def test_what_cannot_be(fields, tokens, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(GPT(**{**TINY, **fields}).init, KEY, jnp.asarray(tokens))
    if "remat" in fields:
        with pytest.raises(errors.ConfigError):
            jax.eval_shape(GPT(**{**TINY, **fields}).init, KEY, jnp.asarray(tokens))


@pytest.mark.parity
def test_pytorch_agrees(x64):
    """The same model from PyTorch's parts: logits, loss and every gradient, in float64."""
    import torch
    from torch import nn
    from torch.nn import functional

    params, batch = start(np.float64), batch_of()
    ours = jax.tree.map(np.asarray, compiled()(params, {**batch, "token_mask": np.ones((B, T), bool),
                                                        "label": batch["label"] % V}))  # fmt: skip
    weights = jax.tree.map(lambda x: torch.tensor(np.asarray(x)).requires_grad_(), params)

    def norm(x, w):
        return functional.layer_norm(x, (16,), w["scale"], w["bias"])  # with the epsilon that it has

    def heads(x, w):
        y = functional.linear(x, w["kernel"].reshape(16, 16).T, w["bias"])
        return y.reshape(B, T, 4, 4).transpose(1, 2)

    tokens = torch.tensor(batch["tokens"])
    x = functional.embedding(tokens, weights["token_embedding"]["embedding"])
    x = x + weights["position_embedding"]["embedding"][:T]
    for i in (1, 2):
        block = weights[f"block{i}"]
        attention, mlp, y = block["attention"], block["mlp"], norm(x, block["norm1"])
        y = functional.scaled_dot_product_attention(
            *(heads(y, attention[name]) for name in ("query", "key", "value")), is_causal=True
        )
        out = attention["out"]
        y = y.transpose(1, 2).reshape(B, T, 16)
        x = x + functional.linear(y, out["kernel"].reshape(16, 16).T, out["bias"])
        y = functional.linear(norm(x, block["norm2"]), mlp["up"]["kernel"].T, mlp["up"]["bias"])
        y = nn.GELU(approximate="tanh")(y)
        x = x + functional.linear(y, mlp["down"]["kernel"].T, mlp["down"]["bias"])
    logits = functional.linear(norm(x, weights["norm"]), weights["token_embedding"]["embedding"])
    labels = torch.tensor(batch["label"] % V)
    loss = functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))
    loss.backward()
    expected = loss.item(), jax.tree.map(lambda w: w.grad.numpy(), weights)
    assert_close(ours, expected, 1e-12)
    assert_close(evaluate()(params, batch["tokens"]), logits.detach().numpy(), 1e-12)
