"""The transformer's layers and stacks against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.interop import state_dict
from jaxnets.layers import MultiHeadAttention
from jaxnets.models.transformer import Transformer, sinusoids
from jaxnets.models.transformer_stack import Decoder, Encoder, LayerFields
from tests.models.tiny_translation import QUICK, draw

pytestmark = pytest.mark.parity
B, S, T, D, N, F = 4, 7, 5, 8, 2, 12
KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def lengths_mask(size, seed=3):
    lengths = np.random.default_rng(seed).integers(1, size, B)
    return np.arange(size) < lengths[:, None]


def loaded(module, table, params, dtype):
    """The module with our weights, read back bit for bit."""
    import torch

    arrays = state_dict.to_state_dict(table, {"params": params})
    module = module.to(dtype)
    module.load_state_dict({name: torch.tensor(x) for name, x in arrays.items()})
    back = state_dict.from_state_dict(
        table, {name: x.numpy() for name, x in module.state_dict().items()}, {"params": params}
    )
    jax.tree.map(np.testing.assert_array_equal, back["params"], params)
    return module.train()  # without dropout, but not by the fast path of evaluation


def assert_as_good(ours, theirs, bound):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


def compare(run, module, table, params, inputs, call, dtype, valid=None):
    """Outputs, and gradients of parameters and inputs, along a random direction."""
    import torch

    bound = {"float64": 1e-9, "float32": 1e-5}[dtype]
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    inputs = [jnp.asarray(x, dtype) for x in inputs]
    twin = loaded(module, table, params, getattr(torch, dtype))
    fed = [torch.tensor(np.asarray(x), requires_grad=True) for x in inputs]
    expected = call(twin, *fed)
    valid = np.ones(expected.shape[:2], bool) if valid is None else valid
    along = np.where(valid[..., None], normal(*expected.shape, seed=9), 0).astype(dtype)

    def both(params, *inputs):
        out, pull = jax.vjp(run, params, *inputs)
        return out, pull(jnp.asarray(along))

    with jax.default_matmul_precision("highest"):
        out, (grads, *of_inputs) = jax.jit(both, compiler_options=QUICK)(params, *inputs)
    assert out.dtype == dtype
    assert_as_good(np.asarray(out)[valid], expected[torch.tensor(valid)], bound)
    (expected * torch.tensor(along)).sum().backward()
    for ours, theirs in zip(of_inputs, fed, strict=True):
        assert_as_good(ours, theirs.grad, bound)
    named = dict(twin.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in named.values())
    for name, grad in state_dict.to_state_dict(table, {"params": grads}).items():
        theirs = named[name].grad.numpy()
        # Of the bias of the keys it is nothing but rounding.
        np.testing.assert_allclose(
            grad, theirs, rtol=0, atol=bound * max(np.abs(theirs).max(), largest / 8)
        )


every_dtype = pytest.mark.parametrize("dtype", ["float64", "float32"])
before_and_after = pytest.mark.parametrize("norm_first", [True, False])


@every_dtype
def test_multi_head_attention(dtype, x64):
    import torch

    layer = MultiHeadAttention(D, N)
    x, memory, mask = normal(B, T, D), normal(B, S, D, seed=1), lengths_mask(S)
    params = draw(jax.eval_shape(layer.init, KEY, x, memory)["params"], dtype=np.float64)
    table = state_dict.attention("", "", width=D, num_heads=N)
    hidden = torch.tensor(~mask)
    compare(
        lambda params, x, memory: layer.apply({"params": params}, x, memory, mask=jnp.asarray(mask)),
        torch.nn.MultiheadAttention(D, N, batch_first=True),
        table,
        params,
        (x, memory),
        lambda twin, x, memory: twin(x, memory, memory, key_padding_mask=hidden, need_weights=False)[0],
        dtype,
    )


@every_dtype
@before_and_after
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_encoder(norm_first, activation, dtype, x64):
    import torch

    fields = LayerFields(D, N, F, norm_first=norm_first, activation=activation)
    encoder = Encoder(2, fields, use_final_norm=True)
    x, mask = normal(B, S, D), lengths_mask(S)
    params = draw(jax.eval_shape(encoder.init, KEY, x)["params"], dtype=np.float64)
    table = state_dict.encoder("", "", num_layers=2, width=D, num_heads=N, use_final_norm=True)
    layer = torch.nn.TransformerEncoderLayer(
        D, N, F, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    module = torch.nn.TransformerEncoder(
        layer, 2, norm=torch.nn.LayerNorm(D), enable_nested_tensor=False
    )
    compare(
        lambda params, x: encoder.apply({"params": params}, x, mask=jnp.asarray(mask)),
        module,
        table,
        params,
        (x,),
        lambda twin, x: twin(x, src_key_padding_mask=torch.tensor(~mask)),
        dtype,
        valid=mask,
    )


@every_dtype
@before_and_after
def test_the_decoder(norm_first, dtype, x64):
    import torch

    fields = LayerFields(D, N, F, norm_first=norm_first)
    decoder = Decoder(2, fields)
    x, memory, mask = normal(B, T, D), normal(B, S, D, seed=1), lengths_mask(S)
    params = draw(jax.eval_shape(decoder.init, KEY, x, memory)["params"], dtype=np.float64)
    table = state_dict.decoder("", "", num_layers=2, width=D, num_heads=N, use_final_norm=norm_first)
    layer = torch.nn.TransformerDecoderLayer(
        D, N, F, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    module = torch.nn.TransformerDecoder(layer, 2, norm=torch.nn.LayerNorm(D) if norm_first else None)
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
    compare(
        lambda params, x, memory: decoder.apply(
            {"params": params}, x, memory, memory_mask=jnp.asarray(mask)
        ),
        module,
        table,
        params,
        (x, memory),
        lambda twin, x, memory: twin(
            x, memory, tgt_mask=future, memory_key_padding_mask=torch.tensor(~mask)
        ),
        dtype,
    )


@every_dtype
@before_and_after
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # it says that it is slow
def test_the_whole_from_tokens_to_logits(norm_first, dtype, x64):
    """`torch.nn.Transformer` between a table and positions written out by hand."""
    import torch

    size = 11
    model = Transformer(
        size,
        num_layers=2,
        width=D,
        num_heads=N,
        hidden=F,
        norm_first=norm_first,
        use_final_norm=True,
        max_length=S,
    )
    rng = np.random.default_rng(5)
    tokens = {"source": rng.integers(0, size, (B, S)), "target": rng.integers(0, size, (B, T))}
    mask = lengths_mask(S)
    params = draw(jax.eval_shape(model.init, KEY, tokens)["params"], dtype=np.float64)
    sizes = {"num_layers": 2, "width": D, "num_heads": N, "use_final_norm": True}
    table = [
        *state_dict.embedding("embedding", "embedding"),
        *state_dict.encoder("encoder", "encoder", **sizes),
        *state_dict.decoder("decoder", "decoder", **sizes),
    ]
    module = torch.nn.Transformer(D, N, 2, 2, F, dropout=0.0, batch_first=True, norm_first=norm_first)
    module.embedding = torch.nn.Embedding(size, D)
    places = torch.tensor(sinusoids(S, D), dtype=getattr(torch, dtype))
    hidden = torch.tensor(~mask)

    def logits(twin):
        source, target = (
            twin.embedding(torch.tensor(x)) * D**0.5 + places[: x.shape[1]] for x in tokens.values()
        )
        future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
        masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        return twin(source, target, tgt_mask=future, **masks) @ twin.embedding.weight.T

    compare(
        lambda params: model.apply({"params": params}, tokens, mask={"source": jnp.asarray(mask)}),
        module,
        table,
        params,
        (),
        logits,
        dtype,
    )
