from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import errors
from jaxnets.interop import state_dict
from jaxnets.layers import GRU, LSTM
from jaxnets.models.transformer_stack import Encoder, LayerFields
from tests.models.tiny_translation import draw

B, T, D, H = 3, 5, 4, 6
KEY = jax.random.key(0)
TABLE = state_dict.encoder("", "", num_layers=1, width=4, num_heads=2, use_final_norm=True)


def params_of(layer, dtype=np.float64):
    return draw(jax.eval_shape(layer.init, KEY, jnp.zeros((1, 2, 4)))["params"], dtype=dtype)


@pytest.fixture
def encoder():
    return {"params": params_of(Encoder(1, LayerFields(4, 2, 6)), np.float32)}


def test_all_errors_at_once(encoder):
    given = state_dict.to_state_dict(TABLE, encoder)
    del given["norm.weight"]
    given["layers.0.linear1.weight"] = np.zeros((2, 2))
    given["layers.0.norm2.bias"] = np.zeros(5)
    given["head.weight"] = np.zeros(3)
    with pytest.raises(errors.ParityError) as error:
        state_dict.from_state_dict(TABLE, given, encoder)
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "missing norm.weight",
        "unexpected head.weight",
        "layers.0.linear1.weight is (2, 2), expected (6, 4)",
        "layers.0.norm2.bias is (5,), expected (4,)",
    ):
        assert part in text


def test_all_arrays_that_do_not_fit_their_rows_at_once(encoder):
    other = {"params": params_of(Encoder(1, LayerFields(4, 1, 6)), np.float32)}
    given = state_dict.to_state_dict(TABLE, encoder)
    for convert in (
        lambda: state_dict.to_state_dict(TABLE, other),
        lambda: state_dict.from_state_dict(TABLE, given, other),
    ):
        with pytest.raises(errors.ParityError) as error:
            convert()
        for part in ("query/kernel is (4, 1, 4)", "key/kernel is (4, 1, 4)", "out/kernel is (1, 4, 4)"):
            assert part in str(error.value)


def test_both_ways_bit_for_bit(encoder):
    given = state_dict.to_state_dict(TABLE, encoder)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), encoder)
    back = state_dict.from_state_dict(TABLE, given, shapes)
    jax.tree.map(np.testing.assert_array_equal, back, encoder)
    query = np.asarray(encoder["params"]["layer1"]["attention"]["query"]["kernel"])
    assert given["layers.0.self_attn.in_proj_weight"][2, 1] == query[1, 1, 0]


@pytest.mark.parity
def test_tensors_keep_their_dtype(encoder):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1, norm=torch.nn.LayerNorm(4)
    )
    theirs.bfloat16()
    back = state_dict.from_state_dict(TABLE, dict(theirs.named_parameters()), encoder)
    kernel = back["params"]["layer1"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    expected = theirs.layers[0].linear1.weight.float().detach().numpy().T
    np.testing.assert_array_equal(kernel.astype(np.float32), expected)


def test_safetensors(encoder, tmp_path):
    pytest.importorskip("safetensors")
    given = state_dict.to_state_dict(TABLE, encoder)
    path = tmp_path / "encoder.safetensors"
    given["half"] = np.ones((2, 3), jnp.bfloat16)
    given["counter"] = np.array(3)  # which has no axis
    given |= {f"of {t}": np.array([1, 0], t) for t in ("bool", "int8", "uint16", "float16", "complex64")}
    state_dict.save_safetensors(path, given)
    found = state_dict.read_safetensors(path)
    assert {name: (x.dtype, x.shape) for name, x in found.items()} == {
        name: (x.dtype, x.shape) for name, x in given.items()
    }
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(errors.DataError, match=r"other\.safetensors can't be read: No such file"):
        state_dict.read_safetensors(tmp_path / "other.safetensors")
    header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "eight.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(errors.DataError, match=r"eight\.safetensors: x is of dtype F8_E4M3; known are"):
        state_dict.read_safetensors(tmp_path / "eight.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(errors.DataError, match=r"encoder\.safetensors is no safetensors file"):
        state_dict.read_safetensors(path)


@pytest.mark.parity
def test_safetensors_as_pytorch_writes_them(encoder, tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    given = state_dict.to_state_dict(TABLE, encoder)
    library.save_file({k: torch.tensor(v) for k, v in given.items()}, tmp_path / "theirs.safetensors")
    back = state_dict.from_state_dict(
        TABLE, state_dict.read_safetensors(tmp_path / "theirs.safetensors"), encoder
    )
    jax.tree.map(np.testing.assert_array_equal, back, encoder)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_recurrent_layers_of_pytorch(kind, is_bidirectional, dtype, x64):
    """Both of its biases are drawn, and ours gives the same outputs and gradients."""
    import torch

    bound = {"float64": 1e-9, "float32": 1e-5}[dtype]

    def assert_as_good(ours, theirs):
        assert ours.dtype == theirs.dtype == dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())

    layer = {"lstm": LSTM, "gru": GRU}[kind](H, 2, is_bidirectional)
    twin = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](
        D, H, 2, batch_first=True, bidirectional=is_bidirectional, dtype=getattr(torch, dtype)
    )
    table = state_dict.recurrent("", "", kind=kind, num_layers=2, is_bidirectional=is_bidirectional)
    like = {"params": params_of(layer, dtype)}
    given = {name: x.numpy() for name, x in twin.state_dict().items()}
    params = state_dict.from_state_dict(table, given, like)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, T, D)).astype(dtype)
    along = rng.normal(size=(B, T, H * (1 + is_bidirectional))).astype(dtype)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, x):
        y, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        return y, *pull(along)

    with jax.default_matmul_precision("highest"):
        y, dparams, dx = run(params, x)
    fed = torch.tensor(x, requires_grad=True)
    expected = twin(fed)[0]
    expected.backward(torch.tensor(along))
    assert_as_good(y, expected.detach().numpy())
    assert_as_good(dx, fed.grad.numpy())
    named = dict(twin.named_parameters())
    for name, grad in state_dict.to_state_dict(table, dparams).items():
        theirs = named[name].grad.numpy()
        # One bias is the sum of both; the second is 0 on the way out, but for the GRU's new gate.
        if name.startswith("bias_hh"):
            if kind == "lstm":
                continue
            grad, theirs = grad[2 * H :], theirs[2 * H :]
        assert_as_good(grad, theirs)
    # And out again: other arrays, since there is one bias, but the same layer.
    arrays = state_dict.to_state_dict(table, params)
    twin.load_state_dict({name: torch.tensor(a) for name, a in arrays.items()})
    with torch.no_grad():
        assert_as_good(twin(torch.tensor(x))[0].numpy(), expected.detach().numpy())
    del given["bias_hh_l0"]
    given["weight_hh_l1"] = np.zeros((1, 1))
    with pytest.raises(errors.ParityError, match=r"missing bias_hh_l0; weight_hh_l1 is \(1, 1\)"):
        state_dict.from_state_dict(table, given, like)
    with pytest.raises(errors.ConfigError, match="did you mean"):
        state_dict.recurrent("", "", kind="lstn")
