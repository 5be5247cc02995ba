"""Recommenders: what the contract suite asks of the models of images, and parity with PyTorch."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import losses, models, registry
from tests.models.eight_devices import QUICK, assert_close, assert_eight_equal_one, sums_and_gradients

NAMES = registry.names("recommender")
every_model = pytest.mark.parametrize("name", NAMES)
U, M, B, J = 9, 13, 16, 3  # users, items, rows, items for each
TINY = {
    "matrix_factorization": {"width": 4, "mean": 0.5, "init_scale": 0.5},
    "embedding_dot": {"width": 4, "init_scale": 0.5},
    "neumf": {"width": 4, "hidden": (8, 6, 4), "init_scale": 0.5},
    "two_tower": {"width": 4, "hidden": (6, 5), "init_scale": 0.5},
}
NUM_PARAMS = {  # 1,000 users and items
    "matrix_factorization": 66_000,
    "embedding_dot": 64_000,
    "neumf": 2 * 1000 * (8 + 32) + (64 * 32 + 32) + (32 * 16 + 16) + (16 * 8 + 8) + 17,
    "two_tower": 2 * (32_000 + 32 * 64 + 64 + 64 * 32 + 32),
}


def tiny(name, **fields):
    model = registry.get("recommender", name)(U, M, **TINY[name], **fields)
    return model, *models.functional(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))


@cache
def start(name):
    """Parameters drawn by NumPy, biases too."""
    rng = np.random.default_rng(2)
    shapes, _ = jax.eval_shape(tiny(name)[1], jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.5, shapes)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def batch_of(dtype=np.float32):
    rng = np.random.default_rng(0)
    users = np.broadcast_to(rng.integers(0, U, (B, 1)), (B, J))
    return {
        "pairs": jnp.asarray(np.stack([users, rng.integers(0, M, (B, J))], -1).astype(np.int32)),
        "label": jnp.asarray(rng.integers(0, 2, (B, J)).astype(dtype)),
        "index": jnp.asarray(rng.permutation(1000)[:B]),
        "mask": jnp.asarray(rng.random(B) < 0.8),
    }


def train(name, params, batch, axis_name=None):
    """The loss and gradients over the global batch, and this part's logits."""

    def loss_fn(params):
        logits, _ = tiny(name)[2](
            params, {}, batch["pairs"], train=True, rows=batch["index"], mask=batch["mask"]
        )
        loss = losses.sigmoid_cross_entropy(logits, batch["label"])
        return jnp.where(batch["mask"][:, None], loss, 0).sum(), logits

    return sums_and_gradients(loss_fn, params, axis_name)


@every_model
def test_outputs_gradients_and_the_number_of_traces(name):
    traces = []

    def step(params, batch):
        traces.append(None)
        return train(name, params, batch)

    step = jax.jit(step, compiler_options=QUICK)
    params, batch = cast(start(name), np.float32), batch_of()
    loss, grads, logits = step(params, batch)
    assert logits.shape == (B, J)
    assert logits.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all()
        assert np.any(np.asarray(leaf) != 0), f"{jax.tree_util.keystr(path)} learns nothing"
    step(jax.tree.map(jnp.subtract, params, grads), jax.tree.map(lambda x: x[::-1], batch))
    assert len(traces) == 1
    assert_close(train(name, params, batch), (loss, grads, logits), rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_eight_devices_equal_one(name, strategy, x64):
    params, batch = cast(start(name), np.float64), batch_of(np.float64)
    assert_eight_equal_one(partial(train, name), params, batch, strategy)


@every_model
def test_every_item_is_scored_as_its_pair_is(name):
    model, _, apply_fn = tiny(name)
    params = cast(start(name), np.float32)
    users = jnp.array([3, 0, 8])
    found = jax.jit(lambda user: model.apply({"params": params}, user, method="all_items"))(users)
    shape = (3, M)
    pairs = np.stack([np.broadcast_to(users[:, None], shape), np.broadcast_to(np.arange(M), shape)], -1)
    expected, _ = apply_fn(params, {}, jnp.asarray(pairs), train=False)
    assert found.shape == shape
    some = model.apply({"params": params}, users, jnp.asarray(pairs[..., 1]), method="some_items")
    np.testing.assert_allclose(some, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@every_model
def test_a_row_does_not_depend_on_the_others(name):
    _, _, apply_fn = tiny(name)
    params, pairs = cast(start(name), np.float32), batch_of()["pairs"]
    evaluate = jax.jit(lambda pairs: apply_fn(params, {}, pairs, train=False)[0])
    expected = np.asarray(evaluate(pairs))
    for other in (0, 1, -1, 10**6):
        others = jnp.full_like(pairs, other).at[3].set(pairs[3])
        found = evaluate(others)
        np.testing.assert_array_equal(found[3], expected[3])
        assert np.isnan(found[4]).all() == (other not in (0, 1))
    with pytest.raises(AssertionError):
        apply_fn(params, {}, pairs[..., :1], train=False)


@every_model
def test_the_compute_dtype_is_not_that_of_the_parameters(name):
    _, init_fn, apply_fn = tiny(name, dtype=jnp.bfloat16)
    shapes, _ = jax.eval_shape(init_fn, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    params, pairs = cast(start(name), np.float32), batch_of()["pairs"]
    rounded, _ = apply_fn(params, {}, pairs, train=True)
    exact, _ = tiny(name)[2](params, {}, pairs, train=True)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), exact, atol=0.05 * np.abs(exact).max())


@every_model
def test_the_number_of_parameters_and_their_start(name):
    model = registry.get("recommender", name)()
    init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    params, _ = init_fn(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == NUM_PARAMS[name]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        last = jax.tree_util.keystr(path, simple=True, separator="/")
        if "_bias/" in last or last.endswith("bias"):
            assert not np.any(leaf), last
        elif last.endswith("embedding"):
            scale = {"neumf": 0.01, "two_tower": 0.1}.get(name, 0.05)
            assert np.std(leaf) == pytest.approx(scale, rel=0.05), last


def test_squared_norms_are_of_vectors_and_biases():
    model, _, _ = tiny("matrix_factorization")
    params = cast(start("matrix_factorization"), np.float32)
    pairs = batch_of()["pairs"]
    found = model.apply({"params": params}, pairs, method="squared_norms")
    user, item = np.asarray(pairs[..., 0]), np.asarray(pairs[..., 1])
    for suffix, value in zip(("", "_bias"), found, strict=True):
        left, right = (np.asarray(params[f"{n}{suffix}"]["embedding"]) for n in ("user", "item"))
        expected = (left[user] ** 2).sum(-1) + (right[item] ** 2).sum(-1)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    plain = tiny("embedding_dot")[0]
    norms = plain.apply(
        {"params": cast(start("embedding_dot"), np.float32)}, pairs, method="squared_norms"
    )
    assert not np.any(norms[1])


def torch_scores(name, params, pairs):
    """The model written plainly in PyTorch, and its parameters by Linen's paths."""
    import torch

    leaves = jax.tree_util.tree_leaves_with_path(params)
    weights = {
        jax.tree_util.keystr(path, simple=True, separator="/"): torch.tensor(
            np.asarray(leaf), requires_grad=True
        )
        for path, leaf in leaves
    }
    user, item = (torch.tensor(np.asarray(pairs[..., k])).long() for k in (0, 1))

    def rows(path, index):
        return torch.nn.functional.embedding(index, weights[f"{path}/embedding"])

    def dense(path, x):
        return torch.nn.functional.linear(x, weights[f"{path}/kernel"].T, weights[f"{path}/bias"])

    def tower(path, index):
        x = dense(f"{path}/dense_0", rows(f"{path}/table", index))
        return torch.nn.functional.normalize(dense(f"{path}/dense_1", torch.relu(x)), dim=-1)

    if name == "two_tower":
        return (tower("user", user) * tower("item", item)).sum(-1) / 0.1, weights
    product = rows("user", user) * rows("item", item)
    if name == "neumf":
        x = torch.cat([rows("mlp_user", user), rows("mlp_item", item)], -1)
        for i in range(2):
            x = torch.relu(dense(f"dense_{i}", x))
        return dense("head", torch.cat([product, x], -1))[..., 0], weights
    if name == "embedding_dot":
        return product.sum(-1), weights
    biases = rows("user_bias", user) + rows("item_bias", item)
    return product.sum(-1) + biases[..., 0] + 0.5, weights


@pytest.mark.parity
@every_model
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-5)])
def test_scores_and_gradients_equal_pytorch_s(name, dtype, bound):
    import torch

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        params, batch = cast(start(name), dtype), batch_of(dtype)
        _, grads, logits = train(name, params, batch)
        scores, weights = torch_scores(name, params, batch["pairs"])
        assert str(scores.dtype).endswith(dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            scores, torch.tensor(np.asarray(batch["label"])), reduction="none"
        )
        loss[torch.tensor(np.asarray(batch["mask"]))].sum().backward()
        found = {"logits": (logits, scores.detach().numpy())}
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            found[path] = grad, weights[path].grad.numpy()
        for path, (ours, theirs) in found.items():
            assert np.abs(np.asarray(ours) - theirs).max() <= bound * np.abs(theirs).max(), path
