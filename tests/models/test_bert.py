"""BERT: its own contract, and the one of the library transformers with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.interop import state_dict
from jaxnets.models import BERT, functional
from tests.models.tiny_translation import KEY, draw

B, S, V, D = 4, 7, 30, 8
SIZES = {"num_layers": 2, "width": D, "num_heads": 2}
TINY = BERT(V, max_length=10, hidden=12, **SIZES)
# Of token 0, which is padding, transformers has no gradient.
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, V, (B, S)).astype(np.int32))
MASK = jnp.asarray(np.arange(S) < np.array([[3], [7], [1], [5]]))


def start(dtype=np.float32):
    return draw(jax.eval_shape(TINY.init, KEY, TOKENS)["params"], dtype=dtype)


def test_padding_changes_no_number():
    params = start()
    init_fn, apply_fn = functional(TINY, jax.ShapeDtypeStruct((1, S), jnp.int32))
    assert jax.eval_shape(init_fn, KEY)[1] == {}
    out, _ = apply_fn(params, {}, TOKENS, train=False, mask=MASK)
    assert out.shape == (B, S, D)
    other, _ = apply_fn(params, {}, jnp.where(MASK, TOKENS, 3), train=False, mask=MASK)
    np.testing.assert_allclose(np.asarray(other)[MASK], np.asarray(out)[MASK], atol=1e-6)
    shown, _ = apply_fn(params, {}, jnp.where(MASK, TOKENS, 3), train=False, mask=jnp.ones(B, bool))
    assert np.abs(np.asarray(shown - out)[MASK]).max() > 1e-3


def test_what_cannot_be():
    with pytest.raises(ValueError, match="are integers"):
        TINY.apply({"params": start()}, jnp.ones((B, S)))
    with pytest.raises(ValueError, match="11 tokens in a row; this model takes at most 10"):
        TINY.apply({"params": start()}, jnp.ones((B, 11), jnp.int32))


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-5)])
def test_bert_of_transformers(dtype, bound, x64):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    twin = transformers.BertModel(config, add_pooling_layer=False).to(getattr(torch, dtype)).train()
    given = {name: x.numpy() for name, x in twin.state_dict().items()}
    table = state_dict.bert(**SIZES)
    params = state_dict.from_state_dict(table, given, {"params": start()})["params"]
    types = np.random.default_rng(1).integers(0, 2, (B, S))
    expected = twin(
        torch.tensor(np.asarray(TOKENS)).long(),
        attention_mask=torch.tensor(np.asarray(MASK)).long(),
        token_type_ids=torch.tensor(types),
    ).last_hidden_state

    def run(params):
        return TINY.apply({"params": params}, TOKENS, mask=MASK, types=jnp.asarray(types))

    out, pull = jax.vjp(run, params)
    theirs = expected.detach().numpy()
    mask = np.asarray(MASK)
    np.testing.assert_allclose(
        np.asarray(out)[mask], theirs[mask], rtol=0, atol=bound * np.abs(theirs).max()
    )
    along = np.where(mask[..., None], np.random.default_rng(2).normal(size=out.shape), 0).astype(dtype)
    (expected * torch.tensor(along)).sum().backward()
    (grads,) = pull(jnp.asarray(along))
    named = dict(twin.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in named.values())
    for name, grad in state_dict.to_state_dict(table, {"params": grads}).items():
        of_theirs = named[name].grad.numpy()
        # Of the bias of the keys it is nothing but rounding.
        size = max(np.abs(of_theirs).max(), largest / 8)
        np.testing.assert_allclose(grad, of_theirs, rtol=0, atol=bound * size)
    back = state_dict.to_state_dict(table, {"params": params})
    for name, array in given.items():
        np.testing.assert_array_equal(back[name], array)
