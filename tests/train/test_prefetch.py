import functools
import gc
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxnets import errors
from jaxnets.data import Arrays, Batches, Stream
from jaxnets.train import Clock, Prefetch, create_state, fit, make_strategy, make_train_step


class Counted:
    """Batches that say how far they were read."""

    def __init__(self, size=20, fault=None, seconds=0.0):
        self.size, self.fault, self.seconds = size, fault, seconds
        self.read, self.is_closed = [], False

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        time.sleep(self.seconds)
        self.read.append(i)
        if i == self.fault:
            raise OSError("gone")
        return i

    def close(self):
        self.is_closed = True


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_batches_come_in_order_from_anywhere(depth):
    with Prefetch(Counted(), lambda x: 10 * x, depth=depth) as batches:
        assert [batches[i] for i in range(20)] == [10 * i for i in range(20)]
        assert [batches[i] for i in (3, 4, 5, 18, 19, 0, 0)] == [30, 40, 50, 180, 190, 0, 0]
        for wrong in (-1, 20):
            with pytest.raises(IndexError):
                batches[wrong]
        assert batches[1] == 10
    assert not threads()


@pytest.mark.parametrize("depth", [2, 3])
def test_no_more_than_that_many_are_ahead(depth):
    counted = Counted()
    with Prefetch(counted, lambda x: x, depth=depth) as batches:
        for i in range(5):
            assert batches[i] == i
            time.sleep(0.1)
            assert counted.read == list(range(i + 1 + depth))


def test_an_error_comes_where_it_belongs():
    counted = Counted(fault=3)
    with Prefetch(counted, lambda x: x) as batches:
        assert [batches[i] for i in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="gone"):
            batches[3]
        assert batches[4] == 4
    assert counted.is_closed


def test_a_prefetch_that_nobody_closes_ends_its_thread():
    batches = Prefetch(Counted(), lambda x: x)
    assert batches[0] == 0
    assert threads()
    del batches
    gc.collect()
    time.sleep(0.5)
    assert not threads()


WHERE = [("jit", 1), ("jit", 8), ("pmap", 1), ("pmap", 4)]


@pytest.mark.parametrize(("name", "num_devices"), WHERE)
def test_the_step_sees_the_batches_that_it_sees_of_resident_data(name, num_devices):
    """To the last bit, the short last batch too."""
    strategy = make_strategy(name, num_devices=num_devices)
    arrays = {**tiny.arrays(50, size=4), "weight": np.random.default_rng(0).normal(size=50)}
    draws = Batches(50, 16, 150, seed=4)

    def make_step(*, axis_name):
        def step(state, batch):
            if axis_name is None:
                return dict(batch)
            return {k: jax.lax.all_gather(x, axis_name, tiled=True) for k, x in batch.items()}

        return step

    resident = strategy.compile_eval(make_step, arrays)
    streamed = strategy.compile_eval(make_step)
    with Prefetch(Stream(Arrays(arrays), draws), strategy.put_batch) as batches:
        for i in range(len(draws)):
            one, two = resident((), draws[i]), streamed((), batches[i])
            assert one.keys() == two.keys() == {"image", "label", "weight", "index", "position", "mask"}
            for key in one:
                assert one[key].dtype == two[key].dtype
                np.testing.assert_array_equal(one[key], two[key])
    assert not np.asarray(two["mask"]).all()


@pytest.mark.parametrize(("name", "num_devices"), [("jit", 2), ("pmap", 2)])
def test_training_is_that_on_resident_data(name, num_devices, x64):
    init_fn, loss_fn = tiny.classifier("mlp", size=4)
    data, draws = tiny.arrays(size=4), Batches(96, 16, 10 * 16 - 5, seed=3)
    where = {"strategy": name, "num_devices": num_devices, "dtype": jnp.float64}
    resident, losses = tiny.run(init_fn, loss_fn, tiny.draws(draws), data, **where)
    put = make_strategy(name, num_devices=num_devices).put_batch
    with Prefetch(Stream(Arrays(data), draws), put) as batches:
        fed = (batches[i] for i in range(len(batches)))
        streamed, others = tiny.run(init_fn, loss_fn, fed, None, **where)
    assert tiny.relative_difference(tiny.learnt(resident), tiny.learnt(streamed)) < 1e-12
    np.testing.assert_allclose(others, losses, rtol=1e-12)


def test_batches_are_placed_as_the_step_wants_them():
    """Or they would be copied again in every step."""
    batch = {"x": np.zeros((8, 3), np.float32), "mask": np.ones(8, bool)}
    placed = make_strategy(num_devices=4).put_batch(batch)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 3)}
    placed = make_strategy("pmap", num_devices=4).put_batch(batch)
    assert placed["x"].shape == (4, 2, 3)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(1, 2, 3)}
    assert len(placed["mask"].sharding.device_set) == 4


@pytest.mark.parametrize("name", ["jit", "pmap"])
def test_a_faulty_step_names_the_examples_of_a_placed_batch(name):
    def loss_fn(params, model_state, batch, *, key):
        return {"loss": batch["x"] * params["w"]}, model_state, {}

    tx = optax.sgd(float("nan"))
    strategy = make_strategy(name, num_devices=4)
    step = strategy.compile_step(functools.partial(make_train_step, loss_fn, tx))
    state = strategy.init(
        lambda: create_state(lambda key: ({"w": jnp.ones(())}, {}), tx, key=jax.random.key(0))
    )
    source = Arrays({"x": np.ones(96, np.float32)})
    stream = Stream(source, Batches(96, 16, 64, shuffle=False))
    with (
        Prefetch(stream, strategy.put_batch) as batches,
        pytest.raises(errors.NonFiniteError, match=r"the examples 16, 17, 18, .*, 23, \.\.\."),
    ):
        fit(step, state, batches)


@pytest.mark.parametrize(("data_s", "step_s", "is_limit"), [(0.05, 0.01, True), (0.01, 0.05, False)])
def test_the_clock_tells_whether_input_is_the_limit(data_s, step_s, is_limit):
    """Reading that hides behind the steps is no waiting."""

    def step(state, batch):
        time.sleep(step_s)
        return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}

    class State:
        def __init__(self, step=0):
            self.step = step

        def replace(self, step):
            return State(step)

    clock = Clock()
    with Prefetch(Counted(seconds=data_s), lambda x: x) as batches:
        fit(step, State(), batches, clock=clock)
    assert (clock.data_wait_share > 0.5) is is_limit
    assert (clock.data_wait_share < 0.1) is not is_limit
