import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import models
from jaxnets.models.text_classifier import LSTMClassifier, WeightedNaiveBayes

V, C = 12, 3
KINDS = {
    "tutorial": {},
    "both ways": {"is_bidirectional": True},
    "stacked, max": {"is_bidirectional": True, "num_layers": 2, "pooling": "max"},
}


def made(**fields):
    return LSTMClassifier(V, C, width=5, hidden=4, **fields)


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_number(kind):
    model = made(**KINDS[kind])
    tokens, lengths = tokens_of(3, 7), np.array([7, 4, 1])
    mask = np.arange(7) < lengths[:, None]
    variables = model.init(jax.random.key(0), tokens)
    whole = model.apply(variables, tokens, mask=mask)
    other = np.where(mask, tokens, (tokens + 3) % V)  # whatever padding holds
    none = np.where(mask, tokens, 10 * V)  # no word at all
    longer = np.pad(other, ((0, 0), (0, 5)), constant_values=1)
    for text, its_mask in ((other, mask), (none, mask), (longer, np.pad(mask, ((0, 0), (0, 5))))):
        found = model.apply(variables, text, mask=its_mask)
        np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-7)
    for row, length in enumerate(lengths):  # each by itself, without padding
        alone = model.apply(variables, tokens[row : row + 1, :length])
        np.testing.assert_allclose(alone[0], whole[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [11, -1, 10 * V])
def test_gradients_of_padding_are_zero(kind, padding):
    model = made(**KINDS[kind])
    tokens = np.array([[2, 3, 11, 11], [2, 4, 5, 11]])
    mask = tokens != 11
    tokens = np.where(mask, tokens, padding)
    variables = model.init(jax.random.key(0), tokens)

    def loss(params):
        rows = jnp.arange(2)
        return jnp.sum(
            model.apply(
                {"params": params}, tokens, mask=mask, train=True, rows=rows,
                rngs={"dropout": jax.random.key(1)},
            )
            ** 2
        )  # fmt: skip

    grads = jax.grad(loss)(variables["params"])
    table = np.asarray(grads["embedding"]["embedding"])
    assert np.all(table[11] == 0)
    assert np.all(np.any(table[[2, 3, 4, 5]] != 0, axis=1))
    assert all(np.all(np.isfinite(x)) and np.any(x) for x in jax.tree.leaves(grads))


def test_a_text_without_words():
    model = made(pooling="max")
    tokens, mask = tokens_of(2, 3), np.array([[True, True, True], [False] * 3])
    variables = model.init(jax.random.key(0), tokens)
    logits = model.apply(variables, tokens, mask=mask)
    np.testing.assert_array_equal(logits[1], variables["params"]["head"]["bias"])


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_parity_with_pytorch(dtype):
    import torch

    model = made(dropout_rate=0.0, recurrent_dropout_rate=0.0)
    tokens, lengths = tokens_of(4, 9), np.array([9, 5, 2, 7])
    mask = np.arange(9) < lengths[:, None]
    with jax.enable_x64(dtype == "float64"):
        params = model.init(jax.random.key(0), tokens)["params"]
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, C)), dtype)

        def loss(params):
            logits = model.apply({"params": params}, tokens, mask=mask)
            return jnp.sum(weights * logits), logits

        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    cell = params["lstm"]["forward1"]
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    table = torch.nn.Embedding(V, 5, dtype=kind)
    lstm = torch.nn.LSTM(5, 4, batch_first=True, dtype=kind)
    head = torch.nn.Linear(4, C, dtype=kind)
    copies = {
        table.weight: params["embedding"]["embedding"],
        lstm.weight_ih_l0: cell["kernel"].T,
        lstm.weight_hh_l0: cell["recurrent_kernel"].T,
        lstm.bias_ih_l0: cell["bias"],
        lstm.bias_hh_l0: np.zeros(16),
        head.weight: params["head"]["kernel"].T,
        head.bias: params["head"]["bias"],
    }
    with torch.no_grad():
        for target, value in copies.items():
            target.copy_(torch.tensor(np.asarray(value)))
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        table(torch.tensor(tokens)), torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    theirs = head(lstm(packed)[1][0][-1])
    (theirs * torch.tensor(np.asarray(weights))).sum().backward()
    bound = 1e-9 if dtype == "float64" else 1e-5

    def assert_close(ours, other):
        other = other.detach().numpy()
        assert np.abs(np.asarray(ours) - other).max() <= bound * max(np.abs(other).max(), 1e-3)

    assert_close(logits, theirs)
    assert_close(grads["embedding"]["embedding"], table.weight.grad)
    assert_close(grads["lstm"]["forward1"]["recurrent_kernel"], lstm.weight_hh_l0.grad.T)
    assert_close(grads["lstm"]["forward1"]["kernel"], lstm.weight_ih_l0.grad.T)
    assert_close(grads["lstm"]["forward1"]["bias"], lstm.bias_ih_l0.grad)
    assert_close(grads["head"]["kernel"], head.weight.grad.T)


def test_naive_bayes_by_hand():
    texts, label = np.array([[1, 2], [1, 3], [1, 0]]), np.array([0, 1, 1])
    mask = texts > 0
    init_fn, apply_fn = models.functional(
        WeightedNaiveBayes(4, 2, scale=1.0), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )
    init_fn = models.with_ratios(init_fn, texts, mask, label, vocabulary_size=4, num_classes=2)
    params, model_state = init_fn(jax.random.key(0))
    # Each feature counted once more than it was seen: of class 0 (1, 2, 2, 1), of class 1 (1, 3, 1, 2).
    first, second = np.array([1, 2, 2, 1]) / 6, np.array([1, 3, 1, 2]) / 7
    ratio = np.log(first / second)
    np.testing.assert_allclose(model_state["statistics"]["ratio"][:, 0], ratio, rtol=1e-6)
    np.testing.assert_allclose(model_state["statistics"]["ratio"][:, 1], -ratio, rtol=1e-6)
    logits, _ = apply_fn(params, model_state, texts, train=False, mask=mask)
    expected = np.array([ratio[[1, 2]].sum(), ratio[[1, 3]].sum(), ratio[1]])
    np.testing.assert_allclose(logits[:, 0] - logits[:, 1], 2 * expected, rtol=1e-5)
    weights = jax.grad(lambda p: apply_fn(p, model_state, texts, train=True, mask=mask)[0][2, 0])(params)
    np.testing.assert_allclose(weights["weight"], [0, ratio[1], 0, 0], rtol=1e-6)
