import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import errors, registry
from jaxnets.train import muon, optim


def params():
    rng = np.random.default_rng(0)
    return {
        "conv": {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32),
            "bias": jnp.array([0.5, -0.0, 0.0, 2.0]),
        },
        "head": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)},
    }


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def run(tx, steps=3, start=None):
    values = params() if start is None else start
    state = tx.init(values)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: 0.1 * jnp.cos(p + i), values)
        updates, state = tx.update(grads, state, values)
        values = optax.apply_updates(values, updates)
    return values


@pytest.mark.parametrize("name", registry.names("optimizer"))
def test_every_optimizer_goes_down_a_valley(name):
    rate = {"muon": 0.1, "muon_sgd": 0.0002}.get(name, 0.02)
    tx = registry.get("optimizer", name)(rate, momentum=0.5, weight_decay=0.0)
    start = jax.tree.map(lambda p: p * 0 + 1.0, params())

    def height(values):
        # The kernels of convolutions, whose norm muon_sgd sets, would be lower without a step.
        counted = [x for x in jax.tree.leaves(values) if name != "muon_sgd" or x.ndim <= 2]
        return sum(jnp.sum(x**2) for x in counted)

    values, state = start, tx.init(start)
    update = jax.jit(tx.update)
    for _ in range(60):
        updates, state = update(jax.grad(height)(values), state, values)
        values = optax.apply_updates(values, updates)
    assert height(values) < 0.7 * height(start)


@pytest.mark.parametrize("name", registry.names("optimizer"))
def test_the_mask_spares_biases(name):
    def moved(**options):
        tx = registry.get("optimizer", name)(0.1, momentum=0.5, weight_decay=0.3, **options)
        return run(tx)

    masked, plain = moved(decay_mask=optim.matrices_only), moved()
    without = run(registry.get("optimizer", name)(0.1, momentum=0.5, weight_decay=0.0))
    for layer in ("conv", "head"):
        np.testing.assert_array_equal(masked[layer]["bias"], without[layer]["bias"])
        np.testing.assert_array_equal(masked[layer]["kernel"], plain[layer]["kernel"])
        assert (np.asarray(plain[layer]["kernel"]) != np.asarray(without[layer]["kernel"])).any()


def test_clipping_scales_the_global_norm():
    grads = jax.tree.map(jnp.ones_like, params())
    norm = float(optax.tree.norm(grads))
    for limit in (1.0, 2 * norm):
        tx = optim.clipped(optax.sgd(1.0), limit)
        updates, _ = tx.update(grads, tx.init(grads), grads)
        np.testing.assert_allclose(optax.tree.norm(updates), min(limit, norm), rtol=1e-6)
        expected = -min(1.0, limit / norm)
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(errors.ConfigError, match="clipped to a finite norm"):
            optim.clipped(optax.sgd(1.0), limit)


def test_freezing_leaves_bits_and_the_rest_learns_as_before():
    tx = optim.adamw(0.1, weight_decay=0.1)
    before, after = params(), run(optim.frozen(tx, ["^conv/"]))
    assert bits(after["conv"]) == bits(before["conv"])  # -0 too
    np.testing.assert_array_equal(after["head"]["kernel"], run(tx)["head"]["kernel"])
    state = optim.frozen(tx, ["^conv/"]).init(before)
    kept = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (3, 3, 2, 4) not in kept  # no moments for what doesn't learn
    assert (4, 3) in kept


def test_patterns_to_freeze_may_overlap():
    start = params()
    after = run(optim.frozen(optax.sgd(0.1), ["^conv", "conv/bias", "kernel$"]))
    assert bits(after["conv"]) == bits(start["conv"])
    assert bits(after["head"]["kernel"]) == bits(start["head"]["kernel"])
    assert bits(after["head"]["bias"]) != bits(start["head"]["bias"])


def test_freezing_nothing_or_everything_is_an_error():
    with pytest.raises(errors.ConfigError, match=r"'cnv' is in none of conv/bias, conv/kernel"):
        optim.frozen(optax.sgd(0.1), ["cnv"]).init(params())
    with pytest.raises(errors.ConfigError, match="freezes every parameter"):
        optim.frozen(optax.sgd(0.1), ["conv", "head"]).init(params())


@pytest.mark.parametrize("name", registry.names("optimizer"))
def test_bad_numbers(name):
    make = registry.get("optimizer", name)
    for options, message in [
        ({"learning_rate": float("nan")}, "learning rate must be a finite"),
        ({"learning_rate": -1.0}, "learning rate must be"),
        ({"learning_rate": 0.1, "weight_decay": -0.1}, "weight decay"),
        ({"learning_rate": 0.1, "momentum": 1.0}, "momentum"),
    ]:
        with pytest.raises(errors.ConfigError, match=message):
            make(**options)


def test_muon_makes_the_update_of_a_kernel_nearly_orthogonal():
    """All singular values near one another, those of a convolution's matrix of inputs x outputs."""
    tx = muon.muon(1.0, momentum=0.0)
    grads = params()
    updates, _ = tx.update(grads, tx.init(grads), grads)
    matrix = np.asarray(updates["conv"]["kernel"]).reshape(-1, 4)
    values = np.linalg.svd(matrix, compute_uv=False)
    before = np.linalg.svd(np.asarray(grads["conv"]["kernel"]).reshape(-1, 4), compute_uv=False)
    assert values.max() / values.min() < 2.5
    assert before.max() / before.min() > values.max() / values.min()


# In letters: I and O inputs and outputs, H and W pixels, N heads and K their width, D the model's.
MATRICES = {
    "conv": ("HWIO", "OIHW", (3, 2, 4, 10)),
    "sequence": ("HIO", "OIH", (3, 2, 4)),
    "query": ("DNK", "NKD", (8, 3, 4)),
    "key": ("DNK", "NKD", (8, 2, 2)),
    "value": ("DNK", "NKD", (8, 2, 4)),
    "out": ("NKD", "DNK", (3, 4, 8)),
    "dense": ("IO", "OI", (5, 9)),
}


def as_torch(name, kernel):
    """The two axes of PyTorch's matrix, of outputs by inputs, as Jordan's Muon flattens it."""
    ours, theirs, _ = MATRICES[name]
    outputs = 2 if theirs == "NKD" else 1
    x = jnp.einsum(f"{ours}->{theirs}", kernel)
    return x.reshape(int(np.prod(x.shape[:outputs])), -1)


def newton_schulz(matrix, num_iterations):
    """As `zeropower_via_newtonschulz5` of github.com/KellerJordan/Muon, in float64."""
    x = np.asarray(matrix, np.float64)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(num_iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


@pytest.mark.parametrize("name", MATRICES)
def test_muon_takes_kernels_as_the_reference_takes_its_matrices(name, x64):
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.normal(size=MATRICES[name][2]))
    values = {"attention": {name: {"kernel": kernel}}}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), values)
    grad = as_torch(name, grads["attention"][name]["kernel"])

    tx = muon.muon(0.1, momentum=0.0)
    updates, _ = tx.update(grads, tx.init(values), values)
    expected = -0.1 * max(1, grad.shape[0] / grad.shape[1]) ** 0.5 * newton_schulz(grad, 5)
    np.testing.assert_allclose(
        as_torch(name, updates["attention"][name]["kernel"]), expected, atol=1e-6 * abs(expected).max()
    )
    if kernel.ndim == 2:
        return  # muon_sgd leaves matrices to SGD
    tx = muon.muon_sgd(0.1, momentum=0.0)
    updates, _ = tx.update(grads, tx.init(values), values)
    before = as_torch(name, kernel)
    kept = before * (len(before) ** 0.5 / np.linalg.norm(before))
    after = as_torch(name, kernel + updates["attention"][name]["kernel"])
    np.testing.assert_allclose(after, kept - 0.1 * newton_schulz(grad, 3), atol=1e-6)


@pytest.mark.parametrize("make", [muon.muon, muon.muon_sgd])
def test_biases_of_heads_are_vectors(make):
    """Though they are `[N, K]`: to Muon, and to what spares biases the decay."""
    grad = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)), jnp.float32)
    heads, flat = {"query": {"bias": grad}}, {"up": {"bias": grad.ravel()}}
    moved = []
    for grads in (heads, flat):
        params = jax.tree.map(jnp.zeros_like, grads)
        assert not any(jax.tree.leaves(optim.matrices_only(params)))
        tx = make(0.1)
        updates, _ = tx.update(grads, tx.init(params), params)
        moved.append(jax.tree.leaves(updates)[0].ravel())
    np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (12, 12)])
def test_singular_values_come_near_one_and_vectors_stay(shape, x64):
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    found = left.T @ np.asarray(muon.orthogonalize(matrix, 5)) @ right.T
    np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-12)
    assert (abs(np.diag(found) - 1) < 0.35).all()
    assert values.max() / values.min() > 1.9  # they were not so before
    spread = np.diag(np.geomspace(0.01, 1, 12)) / np.linalg.norm(np.geomspace(0.01, 1, 12))
    for iterations, low, high in ((3, 0.40, 1.21), (5, 0.68, 1.14)):
        taken = np.diag(
            muon.orthogonalize(jnp.asarray(np.maximum(spread, 0.01 * np.eye(12))), iterations)
        )
        assert low < taken.min() <= taken.max() < high


def test_muon_sgd_keeps_the_norm_of_kernels_and_descends_in_the_rest():
    start, rate = params(), 0.01
    tx = muon.muon_sgd(rate, momentum=0.6)
    grads = jax.tree.map(jnp.cos, start)
    updates, _ = tx.update(grads, tx.init(start), start)
    kernel = np.asarray(start["conv"]["kernel"]).reshape(-1, 4)
    kept = kernel * 2 / np.linalg.norm(kernel)  # sqrt(4 outputs)
    step = muon.orthogonalize(jnp.cos(kernel))
    after = optax.apply_updates(start, updates)
    np.testing.assert_allclose(
        np.asarray(after["conv"]["kernel"]).reshape(-1, 4), kept - rate * step, atol=1e-6
    )
    # Nesterov's momentum looks ahead: the first step is 1 + 0.85 times the gradient.
    for name, scale in (("kernel", 5.5), ("bias", 110.0)):
        expected = -rate * scale * 1.85 * np.asarray(grads["head"][name])
        np.testing.assert_allclose(updates["head"][name], expected, rtol=1e-5)
