"""Steps on the rows of tables equal steps on whole tables, PyTorch's sparse ones, and each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import errors, losses, models, registry
from jaxnets.data import Batches
from jaxnets.train import create_state, make_strategy, make_train_step, row_optim
from jaxnets.train.row_updates import Tables, make_row_step, step_maker

U, M, D, N = 40, 300, 4, 64  # users, items, width, ratings: fewer than items, more than users
ENTRIES = {
    "user/embedding": "user",
    "user_bias/embedding": "user",
    "item/embedding": "item",
    "item_bias/embedding": "item",
}
TABLES = Tables(ENTRIES)
OPTIMIZERS = {
    "sgd": row_optim.sgd(0.5),
    "adagrad": row_optim.adagrad(0.1),
    "lazy_adam": row_optim.lazy_adam(0.01),
}
every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def factorization(num_users=U, num_items=M, width=D):
    model = models.matrix_factorization(num_users, num_items, width=width, mean=3.0, init_scale=0.5)
    return models.functional(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))


def loss_of(apply_fn):
    def loss_fn(params, model_state, batch, *, key):
        del key
        pairs = jnp.stack([batch["user"], batch["item"]], axis=-1)
        ratings, model_state = apply_fn(params, model_state, pairs, train=True)
        loss = losses.squared_error(ratings, batch["rating"].astype(ratings.dtype))
        return {"loss": loss}, model_state, {}

    return loss_fn


def ratings(seed=0, num_users=U, num_items=M):
    rng = np.random.default_rng(seed)
    return {
        # Squared, so that some come often.
        "user": (num_users * rng.random(N) ** 2).astype(np.int32),
        "item": (num_items * rng.random(N) ** 2).astype(np.int32),
        "rating": rng.integers(1, 6, N).astype(np.float32),
    }


DRAWS = tiny.draws(Batches(N, 16, 100, seed=1))  # the last one short


def run(
    name,
    *,
    tables=TABLES,
    strategy="jit",
    num_devices=1,
    dtype=jnp.float64,
    draws=DRAWS,
    data=None,
    **options,
):
    """Train over the draws; the states after each step, the losses and the norms of gradients."""
    init_fn, apply_fn = factorization()
    tx = OPTIMIZERS[name] if isinstance(name, str) else name
    where = make_strategy(strategy, num_devices=num_devices)
    make_step = partial(step_maker(tables), loss_of(apply_fn), tx, **options)
    step = where.compile_step(make_step, ratings() if data is None else data)
    state = where.init(lambda: tiny.to_float(create_state(init_fn, tx, key=jax.random.key(1)), dtype))
    states, seen = [jax.device_get(state.params)], []
    for draw in draws:
        state, values = step(state, draw)
        seen.append([float(values["loss"]), float(values["grad_norm"])])
        states.append(jax.device_get(state.params))
    return state, states, np.asarray(seen)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_rows_equal_whole_tables(name, x64):
    state, _, seen = run(name)
    dense, _, expected = run(name, tables=None)
    assert tiny.relative_difference(tiny.learnt(state), tiny.learnt(dense)) < 1e-12
    np.testing.assert_allclose(seen, expected, rtol=1e-12)
    assert seen[:, 0].min() < seen[0, 0]


def test_lazy_adam_is_adam_on_the_rows_that_are_used(x64):
    """A table of which every step uses every row is updated as by Adam; elsewhere nothing moves."""
    once = tiny.draws(Batches(N, N, 5 * N, seed=1))
    # The two add epsilon at different places, so here it is next to nothing.
    state, states, _ = run(row_optim.lazy_adam(0.01, epsilon=1e-30), draws=once)
    dense, _, _ = run(optax.adam(0.01, eps=1e-30), tables=None, draws=once)
    used = {name: np.zeros(size, bool) for name, size in (("user", U), ("item", M))}
    for name, array in used.items():
        array[ratings()[name]] = True
    for name in ("user", "item"):
        found, adam = state.params[name]["embedding"], dense.params[name]["embedding"]
        np.testing.assert_allclose(found[used[name]], adam[used[name]], rtol=1e-5)
        np.testing.assert_array_equal(found[~used[name]], states[0][name]["embedding"][~used[name]])
    assert not used["item"].all()


@every_optimizer
def test_a_row_moves_when_it_is_used_and_not_otherwise(name):
    _, states, _ = run(name, dtype=jnp.float32)
    for draw, before, after in zip(DRAWS, states[:-1], states[1:], strict=True):
        real = draw["index"][draw["mask"]]
        for entry in ("user", "item"):
            is_used = np.isin(np.arange(U if entry == "user" else M), ratings()[entry][real])
            moved = np.any(before[entry]["embedding"] != after[entry]["embedding"], axis=1)
            # What only fills up a batch has a gradient of 0, which moments may still move.
            padding = np.isin(np.arange(len(moved)), ratings()[entry][draw["index"]]) & ~is_used
            np.testing.assert_array_equal(moved[~padding], is_used[~padding])


@pytest.mark.parity
@every_optimizer
def test_rows_equal_pytorch_s_sparse_optimizers(name, x64):
    import torch

    _, states, seen = run(name)
    tables = {
        path: torch.nn.Embedding.from_pretrained(
            torch.tensor(states[0][path.split("/")[0]]["embedding"]), freeze=False, sparse=True
        )
        for path in ENTRIES
    }
    weights = [table.weight for table in tables.values()]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(weights, lr=0.5),
        "adagrad": lambda: torch.optim.Adagrad(weights, lr=0.1),
        "lazy_adam": lambda: torch.optim.SparseAdam(weights, lr=0.01),
    }[name]()
    torch.sparse.check_sparse_tensor_invariants.disable()  # or it warns that it is not on
    data = {key: torch.tensor(x) for key, x in ratings().items()}
    for i, draw in enumerate(DRAWS):
        index = torch.tensor(draw["index"][draw["mask"]])
        batch = {key: x[index].long() if key != "rating" else x[index] for key, x in data.items()}
        vectors = {path: table(batch[ENTRIES[path]]) for path, table in tables.items()}
        product = (vectors["user/embedding"] * vectors["item/embedding"]).sum(-1)
        biases = vectors["user_bias/embedding"] + vectors["item_bias/embedding"]
        loss = ((3.0 + product + biases[:, 0] - batch["rating"]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(seen[i, 0], loss.item(), rtol=1e-9)
        for path, table in tables.items():
            found = states[i + 1][path.split("/")[0]]["embedding"]
            expected = table.weight.detach().numpy()
            assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max(), (path, i)


@every_optimizer
@pytest.mark.parametrize(
    ("strategy", "options"), [("jit", {}), ("pmap", {}), ("fsdp", {}), ("jit", {"accumulate": 2})]
)
def test_eight_devices_equal_one(name, strategy, options, x64):
    one, _, expected = run(name)
    eight, _, seen = run(name, strategy=strategy, num_devices=8, **options)
    assert tiny.relative_difference(tiny.learnt(one), tiny.learnt(eight)) < 1e-9
    np.testing.assert_allclose(seen, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_indices_of_few_bits_find_the_rows_of_a_larger_table(dtype, x64):
    data = ratings()
    data["item"] = data["item"] % 128
    narrow = {**data, "item": data["item"].astype(dtype)}
    expected, found = (run("sgd", data=each, draws=DRAWS[:3])[1:] for each in (data, narrow))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_several_steps_in_a_call_are_the_same():
    init_fn, apply_fn = factorization()
    tx = OPTIMIZERS["lazy_adam"]
    where = make_strategy("jit", num_devices=1)
    make_step = partial(make_row_step, TABLES, loss_of(apply_fn), tx)
    program = where.compile_step(make_step, ratings(), num_steps=3)
    state = where.init(lambda: create_state(init_fn, tx, key=jax.random.key(1)))
    stacked = {name: np.stack([draw[name] for draw in DRAWS[:3]]) for name in DRAWS[0]}
    state, _ = program(state, stacked)
    one, _, _ = run("lazy_adam", dtype=jnp.float32, draws=DRAWS[:3])
    assert tiny.relative_difference(tiny.learnt(one), tiny.learnt(state)) < 1e-6


def step_once(batch, state=None, **options):
    init_fn, apply_fn = factorization()
    tx = OPTIMIZERS["lazy_adam"]
    step = jax.jit(make_row_step(TABLES, loss_of(apply_fn), tx, **options))
    if state is None:
        use_health = options.get("on_nonfinite") == "skip"
        state = create_state(init_fn, tx, key=jax.random.key(0), use_health=use_health)
    return state, step(state, batch)


def a_batch(**changes):
    return {name: jnp.asarray(x[:16]) for name, x in (ratings() | changes).items()}


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("entry", ["user", "item"])
@pytest.mark.parametrize("wrong", [-1, M, 2**31 - 1, -(2**31)])
def test_an_index_that_is_no_row_stops_the_run_with_nothing_applied(entry, wrong):
    index = ratings()[entry].copy()
    index[3] = wrong
    state, (after, metrics) = step_once(a_batch(**{entry: index}))
    assert int(metrics["guard"]) == 0
    assert np.isnan(metrics["loss"])
    assert_same((state.params, state.opt_state), (after.params, after.opt_state))
    _, (later, _) = step_once(a_batch(), after)
    assert_same(state.params, later.params)


def test_a_step_that_is_skipped_changes_no_row():
    rating = ratings()["rating"].copy()
    rating[2] = np.inf
    state, (after, metrics) = step_once(a_batch(rating=rating), on_nonfinite="skip")
    assert int(metrics["skipped"]) == 1
    assert_same(state.params, after.params)
    _, (later, _) = step_once(a_batch(), after, on_nonfinite="skip")
    assert not np.array_equal(later.params["item"]["embedding"], state.params["item"]["embedding"])


def test_entries_may_be_added_to_the_batch():
    """Sampled negatives: three items for each user, of which the last two aren't data."""
    init_fn, apply_fn = factorization()

    def complete(batch):
        if "items" in batch:
            return batch
        others = (batch["item"][:, None] + jnp.array([[7, 11]])) % M
        return {**batch, "items": jnp.concatenate([batch["item"][:, None], others], axis=1)}

    def loss_fn(params, model_state, batch, *, key):
        del key
        batch = complete(batch)
        users = jnp.broadcast_to(batch["user"][:, None], batch["items"].shape)
        logits, _ = apply_fn(params, model_state, jnp.stack([users, batch["items"]], -1), train=True)
        labels = jnp.broadcast_to((jnp.arange(3) == 0)[None], logits.shape)
        return {"loss": losses.sigmoid_cross_entropy(logits, labels)}, model_state, {}

    entries = {path: {"user": "user", "item": "items"}[entry] for path, entry in ENTRIES.items()}
    tables, tx = Tables(entries, complete), OPTIMIZERS["adagrad"]
    state = create_state(init_fn, tx, key=jax.random.key(0))
    found, _ = jax.jit(make_row_step(tables, loss_fn, tx))(state, a_batch())
    dense, _ = jax.jit(make_train_step(loss_fn, tx))(state, a_batch())
    assert tiny.relative_difference(found.params, dense.params) < 1e-5


def test_parameters_without_a_table_are_trained_beside_it():
    model = models.neumf(U, M, hidden=(8, 4))
    init_fn, apply_fn = models.functional(model, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    entries = {f"{prefix}{e}/embedding": e for prefix in ("", "mlp_") for e in ("user", "item")}
    tx = OPTIMIZERS["adagrad"]
    state = create_state(init_fn, tx, key=jax.random.key(0))
    found, _ = jax.jit(make_row_step(Tables(entries), loss_of(apply_fn), tx))(state, a_batch())
    dense, _ = jax.jit(make_train_step(loss_of(apply_fn), tx))(state, a_batch())
    # A unit that is all but 0 may have another sign after rounding, of which Adagrad makes a whole step.
    assert tiny.relative_difference(found.params, dense.params) < 1e-3
    assert np.any(found.params["dense_0"]["kernel"] != state.params["dense_0"]["kernel"])


def compiled(num_rows, name="lazy_adam"):
    init_fn, apply_fn = factorization(num_users=num_rows, num_items=num_rows, width=16)
    tx = OPTIMIZERS[name]
    step = jax.jit(make_row_step(TABLES, loss_of(apply_fn), tx), donate_argnums=0)
    state = jax.eval_shape(lambda: create_state(init_fn, tx, key=jax.random.key(0)))
    return step.lower(state, jax.eval_shape(a_batch)).compile()


@every_optimizer
def test_memory_beside_the_tables_does_not_grow_with_them(name):
    """Of ten million rows nothing is allocated; the program says what it would take."""
    sizes = []
    for num_rows in (10_000, 10_000_000):
        memory = compiled(num_rows, name).memory_analysis()
        # All of the state is updated in place.
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[0] == sizes[1] < 200_000


@every_optimizer
def test_operations_do_not_grow_with_the_tables(name):
    few, many = (compiled(n, name).cost_analysis() for n in (10_000, 10_000_000))
    assert many["flops"] == few["flops"]


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ({"users/embedding": "user"}, "no table users/embedding: the parameters are item/embedding, "),
        ({"user/embedding": "who"}, "indexed by 'who', which no batch has"),
        ({"user/embedding": "user", "item/embedding": "user"}, "has 300 rows, and another .* 40"),
    ],
)
def test_tables_that_can_t_be(tables, match):
    init_fn, apply_fn = factorization()
    tx = OPTIMIZERS["sgd"]
    state = create_state(init_fn, tx, key=jax.random.key(0))
    with pytest.raises(errors.ConfigError, match=match):
        make_row_step(Tables(tables), loss_of(apply_fn), tx)(state, a_batch())


def test_an_average_of_tables_is_refused():
    with pytest.raises(errors.ConfigError, match="no moving average"):
        make_row_step(TABLES, lambda: None, OPTIMIZERS["sgd"], ema_decay=0.9)


@every_optimizer
def test_row_optimizers_are_registered_and_check_their_numbers(name):
    make = registry.get("row_optimizer", name)
    with pytest.raises(errors.ConfigError, match="learning rate"):
        make(-1.0)
    decayed = make(0.1, weight_decay=0.3)
    params = {"table": jnp.ones((2, 3))}
    updates, _ = decayed.update({"table": jnp.zeros((2, 3))}, decayed.init(params), params)
    assert np.all(np.asarray(updates["table"]) < 0)
