import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.data import pad_batch
from jaxnets.train import ShapeGuard, create_state, make_strategy, make_train_step, shapes


def batch_of(rows=4, width=8, dtype=np.float32):
    return {"x": np.zeros((rows, width), dtype), "mask": np.ones(rows, bool)}


def guarded(**options):
    """A compiled step that counts its traces, its guard, and what the guard said."""
    said, traces = [], []

    @jax.jit
    def step(state, batch):
        traces.append(1)
        return jax.tree.map(lambda x: x + 1, state), {"loss": batch["x"].sum()}

    return ShapeGuard(step, warn=said.append, **options), said, traces


def start():
    return {"params": {"w": jnp.zeros(3)}, "step": jnp.int32(0)}


def test_one_signature_is_no_news():
    step, said, traces = guarded()
    state = start()
    for _ in range(5):
        state, _ = step(state, batch_of())
    assert said == []
    assert (step.num_signatures, len(traces)) == (1, 1)
    assert int(state["step"]) == 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (batch_of(rows=3), "batch['x'] float32[4,8] -> float32[3,8]; batch['mask'] bool[4] -> bool[3]"),
        (batch_of(dtype=np.float16), "batch['x'] float32[4,8] -> float16[4,8]"),
        ({**batch_of(), "more": np.int32(1)}, "batch['more'] absent -> int32[]"),
        ({"x": batch_of()["x"]}, "batch['mask'] bool[4] -> absent"),
        ({**batch_of(), "x": jnp.zeros((4, 9))}, "batch['x'] float32[4,8] -> float32[4,9]"),
    ],
)
def test_each_new_signature_is_told_once_with_the_leaf_that_changed(change, text):
    step, said, traces = guarded()
    state, _ = step(start(), batch_of())
    for batch in (change, batch_of(), change, change):
        state, _ = step(state, batch)
    where = text.split("; ")
    assert len(said) == 1
    assert said[0].startswith("the step is compiled again for its signature no. 2: ")
    for part in where:
        assert part in said[0]
    assert said[0].count("->") == len(where)
    assert len(traces) == step.num_signatures == 2


def test_a_state_that_changes():
    step, said, traces = guarded(name="the training step")
    state, _ = step(start(), batch_of())
    state = {"params": {"w": jnp.zeros(3, jnp.float16)}, "step": state["step"]}
    step(state, batch_of())
    assert said == [
        "the training step is compiled again for its signature no. 2: "
        "state['params']['w'] float32[3] -> float16[3]"
    ]
    assert len(traces) == 2


def test_a_dtype_that_is_only_weak_is_another():
    step, said, traces = guarded()
    step({"rate": jnp.float32(1)}, batch_of())
    step({"rate": 1.0}, batch_of())
    (text,) = said
    assert text.endswith("state['rate'] float32[] -> float32[], weakly typed")
    assert len(traces) == step.num_signatures == 2


def test_what_compiles_to_the_same_is_the_same():
    """NumPy's 64 bits become 32, and a number of Python's is a weakly typed array."""
    step, said, traces = guarded()
    for rate, count in [(1.0, np.int64(1)), (jnp.asarray(1.0), jnp.int32(1)), (2.0, np.int32(1))]:
        step({"rate": rate, "count": count}, batch_of())
        step({"rate": rate, "count": count}, {**batch_of(), "x": np.zeros((4, 8))})
    assert (said, len(traces), step.num_signatures) == ([], 1, 1)


def test_64_bits_count_where_they_are_kept(x64):
    step, said, traces = guarded()
    step(start(), batch_of())
    step(start(), batch_of(dtype=np.float64))
    assert said[0].endswith("batch['x'] float32[4,8] -> float64[4,8]")
    assert len(traces) == 2


def test_as_many_signatures_as_there_are_buckets_are_no_news():
    step, said, _ = guarded(num_expected=2)
    state = start()
    for width in (8, 16, 8, 16, 32, 16):
        state, _ = step(state, batch_of(width=width))
    (text,) = said
    assert "no. 3: batch['x'] float32[4," in text
    assert text.endswith("-> float32[4,32]")


def test_a_step_that_failed_may_be_tried_again():
    calls = []

    def step(state, batch):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError
        return state, {}

    guard = ShapeGuard(step, warn=pytest.fail)
    with pytest.raises(RuntimeError):
        guard(start(), batch_of())
    state, _ = guard(start(), batch_of())
    guard(state, batch_of())


def test_by_default_it_is_a_warning():
    step = ShapeGuard(lambda state, batch: (state, {}))
    state, _ = step(start(), batch_of())
    with pytest.warns(UserWarning, match=r"batch\['x'\] float32\[4,8\] -> float32\[2,8\]"):
        step(state, batch_of(rows=2))


def test_the_size_of_the_state_costs_nothing(monkeypatch):
    """Only the batch's leaves are looked at where the state is the one that the step returned."""
    looked = []
    look = shapes._kind_of_leaf
    monkeypatch.setattr(shapes, "_kind_of_leaf", lambda leaf: looked.append(None) or look(leaf))
    state = {"params": [jnp.zeros(1) for _ in range(500)]}
    step = ShapeGuard(lambda state, batch: (dict(state), {}))
    for _ in range(2):
        state, _ = step(state, batch_of())
    looked.clear()
    step(state, batch_of())
    assert len(looked) == len(jax.tree.leaves(batch_of()))


def test_training_on_sentences_compiles_once_for_each_bucket():
    """Three lengths and more, two buckets: two compilations, and the loss is that of what was there."""
    rng = np.random.default_rng(0)
    buckets, said = (4, 8), []

    def loss_fn(params, model_state, batch, *, key):
        return {"loss": (params * batch["x"] - batch["y"]) ** 2}, model_state, {}

    strategy, tx = make_strategy(num_devices=1), optax.sgd(0.1)
    make_step = functools.partial(
        make_train_step, loss_fn, tx, weights_fn=lambda batch: {"loss": batch["there"]}
    )
    step = ShapeGuard(strategy.compile_step(make_step), num_expected=len(buckets), warn=said.append)
    state = strategy.init(
        lambda: create_state(lambda key: (jnp.float32(1), {}), tx, key=jax.random.key(0))
    )
    params = 1.0
    for lengths in [(2, 3), (4, 1), (7, 2), (3, 3), (8, 8), (1, 5)]:
        examples = [
            {name: rng.standard_normal(n).astype(np.float32) for name in ("x", "y")} for n in lengths
        ]
        x, y = (np.concatenate([e[name] for e in examples]) for name in ("x", "y"))
        # What is filled up is made to matter, if the mask didn't keep it out.
        batch = pad_batch(examples, buckets, varying=["x", "y"], mask="there", fill={"y": 100})
        state, values = step(state, batch)
        np.testing.assert_allclose(values["loss"], np.mean((params * x - y) ** 2), rtol=1e-5)
        params -= 0.1 * np.mean(2 * x * (params * x - y))
        np.testing.assert_allclose(float(state.params), params, rtol=1e-5)
    assert step.num_signatures == len(buckets)
    assert said == []
