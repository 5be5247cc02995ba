"""LSTM and GRU against PyTorch's, in all their forms, and what a mask and dropout mean to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.layers import GRU, LSTM

B, T, D, H = 4, 13, 6, 5
KINDS = {"lstm": LSTM, "gru": GRU}
every_kind = pytest.mark.parametrize("kind", KINDS)
FORMS = [(1, False), (1, True), (2, False), (3, True)]
every_form = pytest.mark.parametrize(("num_layers", "is_bidirectional"), FORMS)
every_dtype = pytest.mark.parametrize("dtype", ["float64", "float32"])
QUICK = {"xla_backend_optimization_level": 0}


def inputs(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array([13, 1, 7, 13])
    mask = np.arange(T) < lengths[:, None]
    return jnp.asarray(rng.normal(size=(B, T, D)), dtype), jnp.asarray(mask), lengths


def filled(layer, x, dtype=np.float64):
    """Parameters that are all different, biases too."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, dtype), shapes)


def torch_twin(kind, params, num_layers, is_bidirectional, dtype):
    """PyTorch's layer with the same weights."""
    import torch

    twin = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](
        D, H, num_layers, batch_first=True, bidirectional=is_bidirectional, dtype=getattr(torch, dtype)
    )
    with torch.no_grad():
        for i in range(num_layers):
            for name, suffix in (("forward", ""), ("backward", "_reverse")):
                if f"{name}{i + 1}" not in params:
                    continue
                ours = {k: torch.tensor(np.asarray(v)) for k, v in params[f"{name}{i + 1}"].items()}
                place = f"l{i}{suffix}"
                getattr(twin, f"weight_ih_{place}").copy_(ours["kernel"].T)
                getattr(twin, f"weight_hh_{place}").copy_(ours["recurrent_kernel"].T)
                getattr(twin, f"bias_ih_{place}").copy_(ours["bias"])
                getattr(twin, f"bias_hh_{place}").zero_()
                if kind == "gru":
                    getattr(twin, f"bias_hh_{place}")[2 * H :] = ours["recurrent_bias"]
    return twin


def assert_as_good(ours, theirs, dtype, name=""):
    theirs, bound = theirs.detach().numpy(), {"float64": 1e-9, "float32": 1e-5}[dtype]
    assert ours.dtype == theirs.dtype == dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parity
@every_dtype
@every_kind
@every_form
@pytest.mark.parametrize("has_mask", [False, True])
def test_pytorch_agrees(kind, num_layers, is_bidirectional, has_mask, dtype, x64):
    """Outputs, last states, and the gradients of input and weights; with lengths as packed sequences."""
    import torch

    x, mask, lengths = inputs(dtype)
    layer = KINDS[kind](H, num_layers, is_bidirectional)
    params = filled(layer, x, dtype)
    rng = np.random.default_rng(3)
    count = num_layers * (1 + is_bidirectional)
    first = [rng.normal(size=(count, B, H)).astype(dtype) for _ in range(2 if kind == "lstm" else 1)]
    weights = [
        rng.normal(size=shape).astype(dtype)
        for shape in ((B, T, H * (1 + is_bidirectional)), *(f.shape for f in first))
    ]

    def run(params, x):
        start = tuple(map(jnp.asarray, first)) if kind == "lstm" else jnp.asarray(first[0])
        y, end = layer.apply({"params": params}, x, start, mask=mask if has_mask else None)
        outs = (y, *end) if kind == "lstm" else (y, end)
        return sum(jnp.sum(a * w) for a, w in zip(outs, weights, strict=True)), outs

    step = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True), compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        (_, outs), (dparams, dx) = step(params, x)
    twin = torch_twin(kind, params, num_layers, is_bidirectional, dtype)
    x_torch = torch.tensor(np.asarray(x), requires_grad=True)
    fed = x_torch
    if has_mask:
        fed = torch.nn.utils.rnn.pack_padded_sequence(
            fed, lengths, batch_first=True, enforce_sorted=False
        )
    start = tuple(map(torch.tensor, first)) if kind == "lstm" else torch.tensor(first[0])
    y, end = twin(fed, start)
    if has_mask:
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=T)
    expected = (y, *end) if kind == "lstm" else (y, end)
    sum((a * torch.tensor(w)).sum() for a, w in zip(expected, weights, strict=True)).backward()
    for found, value in zip(outs, expected, strict=True):
        assert_as_good(found, value, dtype)
    assert_as_good(dx, x_torch.grad, dtype)
    for i in range(num_layers):
        for name, suffix in (("forward", ""), ("backward", "_reverse"))[: 1 + is_bidirectional]:
            ours, place = dparams[f"{name}{i + 1}"], f"l{i}{suffix}"
            pairs = {
                "kernel": getattr(twin, f"weight_ih_{place}").grad.T,
                "recurrent_kernel": getattr(twin, f"weight_hh_{place}").grad.T,
                "bias": getattr(twin, f"bias_ih_{place}").grad,
            }
            if kind == "gru":
                pairs["recurrent_bias"] = getattr(twin, f"bias_hh_{place}").grad[2 * H :]
            for key, value in pairs.items():
                assert_as_good(ours[key], value, dtype, f"{name}{i + 1} {key}")


@every_kind
def test_padding_changes_no_number(kind):
    x, mask, lengths = inputs(np.float32)
    layer = KINDS[kind](H, 2, True)
    params = {"params": filled(layer, x, np.float32)}
    y, end = layer.apply(params, x, mask=mask)
    spoiled = jnp.where(mask[..., None], x, 1e9)
    again, end_again = layer.apply(params, spoiled, mask=mask)
    jax.tree.map(np.testing.assert_array_equal, (y, end), (again, end_again))
    for b, length in enumerate(lengths):
        alone, end_alone = layer.apply(params, x[b : b + 1, :length])
        np.testing.assert_allclose(y[b, :length], alone[0], rtol=1e-5, atol=1e-6)
        for one, two in zip(jax.tree.leaves(end), jax.tree.leaves(end_alone), strict=True):
            np.testing.assert_allclose(one[:, b], two[:, 0], rtol=1e-5, atol=1e-6)


@every_kind
def test_dropout_is_the_examples_own_and_the_same_at_all_steps(kind):
    x = jnp.ones((B, T, D))
    layer = KINDS[kind](H, dropout_rate=0.5, recurrent_dropout_rate=0.5)
    params = {"params": filled(layer, x, np.float32)}
    rows = jnp.array([5, 2, 9, 4])

    def run(x, rows, seed=0):
        return layer.apply(params, x, train=True, rows=rows, rngs={"dropout": jax.random.key(seed)})[0]

    y = run(x, rows)
    # Not bit for bit: a product of other rows may be computed in another way, as the machine has it.
    np.testing.assert_allclose(run(x[:2], rows[1:3]), y[1:3], rtol=0, atol=1e-6)
    assert np.abs(run(x, rows, seed=1) - y).max() > 0.01
    assert np.abs(y[0] - y[1]).max() > 0.01
    np.testing.assert_array_equal(layer.apply(params, x)[0], layer.apply(params, x, train=False)[0])
    # An input that dropout has set to 0 is so at every step: the first steps' gradient shows which.
    grad = jax.grad(lambda x: jnp.sum(run(x, rows) ** 2))(x)
    is_zero = np.asarray(grad == 0)
    assert 0 < is_zero[:, 0].sum() < is_zero[:, 0].size
    np.testing.assert_array_equal(is_zero, np.repeat(is_zero[:, :1], T, axis=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda layer: layer.init(jax.random.key(0), jnp.ones((B, D))),
            r"takes \[B, T, D\], not \(4, 6\)",
        ),
        (
            lambda layer: layer.init(jax.random.key(0), jnp.ones((B, T, D)), mask=jnp.ones(B, bool)),
            r"is \[B, T\], not \(4,\)",
        ),
        (
            lambda layer: layer.init(jax.random.key(0), jnp.ones((B, T, D)), (jnp.ones((2, B, H)),) * 2),
            r"first state is \(1, 4, 5\)",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(LSTM(H))


@every_kind
@pytest.mark.parametrize("content", [np.nan, np.inf])
def test_what_padding_holds_need_not_be_finite(kind, content):
    """Neither values nor the kernels' gradients see it."""
    x, mask, _ = inputs(np.float32)
    layer = KINDS[kind](H, is_bidirectional=True)
    params = filled(layer, x, np.float32)

    @jax.jit
    def loss_and_grads(params, x):
        def loss(params, x):
            return jnp.sum(layer.apply({"params": params}, x, mask=mask)[0] ** 2)

        return jax.value_and_grad(loss, (0, 1))(params, x)

    clean = loss_and_grads(params, x)
    dirty = loss_and_grads(params, jnp.where(mask[..., None], x, content))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
