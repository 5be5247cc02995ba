"""The weights of GPT-2, both ways, against `transformers` with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import errors
from jaxnets.interop.gpt2 import from_gpt2, to_gpt2
from jaxnets.models.gpt import GPT
from tests.interop.tiny_duel import _draw

SIZES = {"vocabulary_size": 24, "max_length": 10, "num_layers": 2, "num_heads": 4, "width": 16}


def draw(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    return _draw(shapes)


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize(
    "fields", [{}, {"use_bias": False}, {"tie_embeddings": False}, {"num_heads": 2, "hidden": 24}]
)
def test_both_ways_bit_for_bit(fields, is_linear):
    model = GPT(**{**SIZES, **fields})
    params = draw(model)
    state = to_gpt2(model, params, is_linear=is_linear)
    qkv = state["transformer.h.1.attn.c_attn.weight"]
    assert qkv.shape == ((48, 16) if is_linear else (16, 48))
    values = qkv[32:].T if is_linear else qkv[:, 32:]
    kernel = params["block2"]["attention"]["value"]["kernel"]
    np.testing.assert_array_equal(values.reshape(kernel.shape), kernel)
    back = from_gpt2(model, state, is_linear=is_linear)["params"]
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # Without the head, and with masks among the weights, as GPT2Model and old files have it.
    bare = {name.removeprefix("transformer."): x for name, x in state.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 10, 10))
    if model.tie_embeddings:
        del bare["lm_head.weight"]
    back = from_gpt2(model, bare, is_linear=is_linear)["params"]
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_weights_of_a_compiled_module():
    model = GPT(**SIZES)
    params = draw(model)
    state = {f"_orig_mod.{name}": x for name, x in to_gpt2(model, params).items()}
    jax.tree.map(np.testing.assert_array_equal, from_gpt2(model, state)["params"], params)


def test_all_that_is_wrong_is_said_at_once():
    model = GPT(**SIZES)
    state = to_gpt2(model, draw(model))
    wrong = {name: x for name, x in state.items() if "ln_1" not in name} | {"extra": np.zeros(1)}
    with pytest.raises(errors.ParityError) as error:
        from_gpt2(model, wrong)
    for name in ("h.0.ln_1.weight", "h.1.ln_1.bias", "unexpected transformer.extra"):
        assert name in str(error.value)
    others = {
        "transformer.wpe.weight": np.zeros((12, 16)),
        "transformer.ln_f.bias": np.zeros(3),
        "transformer.h.0.attn.c_attn.weight": np.zeros((17, 48)),
        "transformer.h.0.attn.c_attn.bias": np.zeros(47),
        "lm_head.weight": np.zeros((24, 16)),
    }
    with pytest.raises(errors.ParityError) as error:
        from_gpt2(model, {**wrong, **others})
    for text in (
        "missing transformer.h.0.ln_1.weight",
        "transformer.wpe.weight is (12, 16), expected (10, 16)",
        "transformer.ln_f.bias is (3,), expected (16,)",
        "transformer.h.0.attn.c_attn.weight is (17, 48), expected (16, 48)",
        "transformer.h.0.attn.c_attn.bias is (47,), expected (48,)",
        "lm_head.weight isn't the table of tokens",
    ):
        assert text in str(error.value)
    with pytest.raises(errors.ParityError, match="isn't the table of tokens"):
        from_gpt2(model, {**state, "lm_head.weight": np.zeros((24, 16))})
    with pytest.raises(errors.ConfigError, match="learned positions, not rotary"):
        from_gpt2(GPT(**SIZES, positions="rotary"), state)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gpt2_of_transformers_agrees(x64, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "n_positions": 10, "n_embd": 16, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for name, x in theirs.named_parameters():  # which are 0, or 1, at the start
        if name.endswith("bias") or ".ln_" in name:
            torch.nn.init.normal_(x, mean=float("weight" in name), std=0.2)
    tokens = np.random.default_rng(0).integers(0, 24, (3, 9))
    for dtype, bound in (("float64", 1e-9), ("float32", 1e-5)):
        theirs.to(getattr(torch, dtype)).zero_grad()
        model = GPT(**SIZES)
        state = theirs.state_dict()
        params = jax.tree.map(jnp.asarray, from_gpt2(model, state)["params"])
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}

        def loss_fn(params, model=model):
            logits = model.apply({"params": params}, tokens)
            shares = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(shares, tokens[:, 1:, None], -1)), logits

        with jax.default_matmul_precision("highest"):
            (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        out = theirs(torch.tensor(tokens))  # its own loss is in float32 whatever the logits are
        expected = out.logits[:, :-1].flatten(0, 1)
        their_loss = torch.nn.functional.cross_entropy(expected, torch.tensor(tokens[:, 1:]).flatten())
        their_loss.backward()
        expected = out.logits.detach().numpy()
        np.testing.assert_allclose(logits, expected, atol=bound * np.abs(expected).max(), rtol=0)
        np.testing.assert_allclose(loss, their_loss.item(), rtol=bound)
        found = to_gpt2(model, grads)
        for name, x in theirs.named_parameters():
            expected = x.grad.numpy()
            np.testing.assert_allclose(
                found[name], expected, atol=bound * np.abs(expected).max() + 1e-18, rtol=0, err_msg=name
            )
