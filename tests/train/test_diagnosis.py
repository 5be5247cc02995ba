"""Where the first non-finite value of a step came from."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxnets import errors
from jaxnets.data import Batches
from jaxnets.recipe import Recipe
from jaxnets.train import Several, create_state, fit, make_strategy, make_train_step, replay
from jaxnets.train.diagnosis import batch_of, diagnose, report_nonfinite
from jaxnets.train.sharding import P

TX = optax.sgd(0.1, momentum=0.9)
BATCH = 16


class Net(nn.Module):
    dtype: jnp.dtype = jnp.float32
    scale: float = 1.0
    root: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="first", dtype=self.dtype)(x))
        x = nn.Dense(5, name="second", dtype=self.dtype)(x) * jnp.asarray(self.scale, self.dtype)
        if self.root:
            x = Root(name="root")(x)
        return nn.Dense(3, name="head", dtype=self.dtype)(x)


class Root(nn.Module):
    """Finite forward, infinite backward at 0."""

    @nn.compact
    def __call__(self, x):
        return jnp.sqrt(x * 0)


def problem(model=None, loss=None):
    model = model or Net()

    def loss_fn(params, model_state, batch, *, key):
        out = model.apply({"params": params}, batch["x"])
        return (loss or squares)(out, batch), model_state, {}

    def init_fn(key):
        return dict(model.init(key, jnp.zeros((1, 4)))["params"]), {}

    return init_fn, loss_fn


def squares(out, batch):
    return {"loss": jnp.sum((out.astype(jnp.float32) - 1) ** 2, -1)}


def batch(num=BATCH, seed=0):
    x = np.random.default_rng(seed).normal(size=(num, 4)).astype(np.float32)
    return {"x": x, "index": 100 + np.arange(num, dtype=np.int32), "mask": np.ones(num, bool)}


def state_of(init_fn):
    return create_state(init_fn, TX, key=jax.random.key(0))


def with_nan(state, module="second"):
    params = {**state.params, module: dict(state.params[module])}
    params[module]["kernel"] = params[module]["kernel"].at[0, 1].set(jnp.nan)
    return dataclasses.replace(state, params=params)


PLACES = [("jit", 1), ("jit", 8), ("pmap", 8)]


def stopped(loss_fn, state, rows, name, devices, **options):
    """The state that the guard leaves behind, on the devices of a strategy."""
    strategy = make_strategy(name, num_devices=devices)
    step = strategy.compile_step(functools.partial(make_train_step, loss_fn, TX, **options))
    state, metrics = step(strategy.init(lambda: state), rows)
    assert int(metrics["guard"]) == 0
    return state


def everywhere(loss_fn, state, rows, **options):
    """The report, which is the same wherever the step ran."""
    found = [
        diagnose(loss_fn, stopped(loss_fn, state, rows, *place, **options), rows, **options)
        for place in PLACES
    ]
    assert found[0] == found[1] == found[2]
    return found[0]


def test_a_weight():
    init_fn, loss_fn = problem()
    found = everywhere(loss_fn, with_nan(state_of(init_fn)), batch())
    assert (found.phase, found.module, found.kind) == ("forward", "second", "Dense")
    assert found.tensor == "params/second/kernel"
    assert (found.counts.nan, found.counts.inf, found.counts.size) == (1, 0, 30)
    assert [name for name, _ in found.state] == ["params/second/kernel"]
    assert found.layers[0][0] == "output of second"
    assert found.layers[0][1].nan == BATCH
    assert (found.examples, found.batch) == ((), tuple(range(100, 100 + BATCH)))  # all of them
    said = "the batch held examples 100, 101, 102, 103, 104, 105, 106, 107, ...; none of them can be "
    assert f"\n{said}singled out\n" in str(found)
    assert (found.step, found.last_good) == (1, 0)
    assert "first non-finite value: forward, in second (Dense): params/second/kernel, 1 NaN" in str(
        found
    )
    assert __file__ in found.source  # not a line of Flax


def test_a_pixel_names_its_example():
    init_fn, loss_fn = problem()
    rows = batch()
    rows["x"][5, 2] = np.nan
    rows["x"][11, 0] = np.inf
    found = everywhere(loss_fn, state_of(init_fn), rows)
    assert (found.phase, found.tensor, found.state) == ("forward", "batch/x", ())
    assert found.examples == (105, 111)
    assert "examples: 105, 111" in str(found)
    assert "singled out" not in str(found)
    # Without ids they are counted by their place.
    del rows["index"]
    assert diagnose(loss_fn, state_of(init_fn), rows).examples == (5, 11)


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.long), 4])
def test_an_example_in_a_micro_batch(accumulate):
    init_fn, loss_fn = problem()
    rows = batch()
    rows["x"][6] = np.nan
    state = stopped(loss_fn, state_of(init_fn), rows, "pmap", 2, accumulate=accumulate)
    found = diagnose(loss_fn, state, rows, accumulate=accumulate)
    assert (found.micro_batch, found.examples) == (6 % accumulate, (106,))
    del rows["index"]
    assert diagnose(loss_fn, state, rows, accumulate=accumulate).examples == (6,)


def test_a_logarithm_of_zero_in_one_term_of_the_loss():
    def loss(out, rows):
        return {"entropy": -jnp.log(rows["p"]) + 0 * out[:, 0], **squares(out, rows)}

    init_fn, loss_fn = problem(loss=loss)
    rows = batch() | {"p": np.ones(BATCH, np.float32)}
    rows["p"][3] = 0
    found = diagnose(loss_fn, state_of(init_fn), rows)
    assert (found.phase, found.module, found.operation) == ("forward", None, "log")
    assert (found.terms, found.tensor) == (("entropy",), "loss term entropy")
    assert found.made.inf == 1
    assert found.examples == (103,)
    assert f"{__file__}:" in found.source
    assert "loss)" in found.source
    assert found.operands == ("batch/p float32[16] from 0 to 1",)
    assert "outside of the model's modules" in str(found)


def test_a_root_whose_gradient_is_infinite():
    init_fn, loss_fn = problem(Net(root=True))
    found = everywhere(loss_fn, state_of(init_fn), batch())
    assert (found.phase, found.module, found.kind) == ("backward", "root", "Root")
    assert found.operation == "div"
    number = int(found.source.removeprefix(f"{__file__}:").split()[0])
    assert "jnp.sqrt(x * 0)" in Path(__file__).read_text().splitlines()[number - 1]
    assert found.tensor == "gradient of the input of root"
    names = [name for name, _ in found.gradients]
    assert {"first/kernel", "second/kernel"} <= set(names)
    assert not [name for name in names if name.startswith("head")]  # behind it
    assert found.terms == ("loss",)


@pytest.mark.long
def test_which_terms_gradient_it_is():
    def loss(out, rows):
        return {"fine": jnp.sum(out**2, -1), "norm": jnp.sqrt(jnp.sum((out * 0) ** 2, -1))}

    init_fn, loss_fn = problem(loss=loss)
    rows = batch()
    found = diagnose(loss_fn, state_of(init_fn), rows)
    assert (found.phase, found.terms, found.module) == ("backward", ("norm",), None)
    assert found.operation == "div"


def test_only_one_rows_gradient():
    def loss(out, rows):
        return {"loss": jnp.sqrt(jnp.abs(jnp.sum(out * rows["p"][:, None], -1)))}

    init_fn, loss_fn = problem(loss=loss)
    rows = batch() | {"p": np.ones(BATCH, np.float32)}
    rows["p"][9] = 0
    found = diagnose(loss_fn, state_of(init_fn), rows)
    assert (found.phase, found.examples) == ("backward", (109,))


def test_a_row_of_a_parameter_as_long_as_the_batch_is_no_example():
    init_fn, plain = problem()

    def loss_fn(params, model_state, batch, *, key):
        terms, *rest = plain(params, model_state, batch, key=key)
        length = jnp.sqrt(jnp.sum((params["second"]["kernel"][2] * 0) ** 2))
        return {"loss": terms["loss"] + length}, *rest

    found = diagnose(loss_fn, state_of(init_fn), batch(6))
    assert (found.phase, found.gradients[0][1].rows) == ("backward", ())
    assert found.counts.rows == (2,)
    assert found.examples == ()


@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.float16, 6e4), pytest.param(jnp.bfloat16, 3e38, marks=pytest.mark.long)]
)
def test_an_overflow_in_half_precision(dtype, scale):
    init_fn, loss_fn = problem(Net(dtype=dtype, scale=scale))
    rows = batch()
    rows["x"] *= 100
    found = diagnose(loss_fn, state_of(init_fn), rows)
    assert (found.phase, found.module, found.operation) == ("forward", "", "mul")
    assert found.made.inf
    assert not found.made.nan
    assert str(jnp.dtype(dtype)) in found.made.array
    assert found.tensor == "input of head"
    assert found.operands[1] == f"{jnp.dtype(dtype)}[] = {float(jnp.asarray(scale, dtype)):.3g}"


@pytest.mark.long
def test_a_gradient_that_overflows_float16():
    def loss(out, rows):
        return {"loss": 1e6 * out.astype(jnp.float32)[:, 0]}

    init_fn, loss_fn = problem(Net(dtype=jnp.float16), loss=loss)
    options = {"coefficients": {"loss": 10.0}}
    state = stopped(loss_fn, state_of(init_fn), batch(), "jit", 8, **options)
    found = diagnose(loss_fn, state, batch(), **options)
    assert found.phase == "backward"
    assert found.made.inf
    assert (found.operation, found.tensor) == (
        "convert_element_type",
        "gradient of the output of the model",
    )
    assert "6.25e+05" in found.operands[0]


def test_a_norm_that_overflows():
    def loss(out, rows):
        return {"loss": 1e25 * out[:, 0]}

    init_fn, loss_fn = problem(loss=loss)
    found = diagnose(loss_fn, state_of(init_fn), batch())
    assert (found.phase, found.tensor) == ("norm", "norm of the gradients")
    assert found.operands[0].startswith("gradient of params/")
    assert found.gradients == ()


def test_without_linen_and_through_scans_and_checkpoints():
    """Plain functions; a loop whose third round divides by zero; an infinity on purpose."""

    def loss_fn(params, model_state, batch, *, key):
        @jax.checkpoint
        def layer(x, w):
            return jnp.sin(x) / w, None

        masked = jnp.where(batch["x"] > -9, batch["x"], -jnp.inf)
        x, _ = jax.lax.scan(layer, jax.nn.softmax(masked), params["layers"])
        total = jax.lax.while_loop(lambda c: c[1] < 2, lambda c: (c[0] * 2, c[1] + 1), (0.0, 0))[0]
        x = jax.lax.cond(total < 1, lambda x: x * params["gain"], jnp.zeros_like, x)
        return {"loss": jnp.sum(x, -1)}, model_state, {}

    layers = jnp.asarray([1.0, 2.0, 0.0, 1.0])
    rows = batch()
    rows["x"][2, 2] = -10
    state = state_of(lambda key: ({"layers": layers, "gain": jnp.ones(())}, {}))
    found = diagnose(loss_fn, state, rows)
    assert (found.phase, found.module, found.operation) == ("forward", None, "div")
    assert found.source.endswith("layer)")
    assert found.operands[1] == "params/layers float32[] = 0"
    assert found.layers == ()
    # Backward too.
    state = dataclasses.replace(state, params={**state.params, "layers": layers.at[2].set(1e-25)})
    found = diagnose(loss_fn, state, rows)
    assert (found.phase, found.tensor) == ("backward", "gradient of params/layers")


def test_an_infinity_on_purpose_is_not_blamed():
    def loss_fn(params, model_state, batch, *, key):
        large = jnp.exp(params["scale"] * batch["x"])
        return {"loss": jnp.max(jnp.where(batch["x"] > -9, large, -jnp.inf), -1)}, model_state, {}

    state = state_of(lambda key: ({"scale": jnp.asarray(1e3)}, {}))
    rows = batch()
    rows["x"][2:] = -10
    rows["x"][:2] = [[1], [0]]
    rows["mask"][2:] = False  # they have no finite loss
    found = diagnose(loss_fn, state, rows)
    assert (found.operation, found.made.inf, found.examples) == ("exp", 4, (100,))
    # Where nothing else is there to blame, it is.
    rows["x"][0] = 0
    found = diagnose(loss_fn, state, rows | {"mask": np.ones(BATCH, bool)})
    assert found.tensor == "a constant"


def test_a_loss_that_cannot_be_tapped():
    """It takes a derivative forward itself, which the names of modules have none of."""
    model = Net()

    def loss_fn(params, model_state, batch, *, key):
        out, tangent = jax.jvp(
            lambda x: model.apply({"params": params}, x), (batch["x"],), (jnp.ones_like(batch["x"]),)
        )
        return {"loss": jnp.sum(out * tangent, -1)}, model_state, {}

    state = with_nan(state_of(problem()[0]))
    found = diagnose(loss_fn, state, batch())
    assert (found.phase, found.tensor) == ("forward", "params/second/kernel")
    assert (found.module, found.operation, found.layers) == ("second", "dot_general", ())


def test_what_cannot_be_replayed_one_by_one_is_still_told(monkeypatch):
    def refuse(*args):
        raise NotImplementedError("no such thing\nat all")

    monkeypatch.setattr(replay.Walk, "run", refuse)
    init_fn, loss_fn = problem()
    found = diagnose(loss_fn, with_nan(state_of(init_fn)), batch())
    assert (found.phase, found.tensor, found.module) == ("forward", "loss term loss", None)
    assert found.notes == ("the operations could not be replayed one by one: no such thing",)
    assert "params/second/kernel: 1 NaN" in str(found)
    assert "outside" not in str(found)


def test_a_step_that_is_finite_is_said_to_be():
    init_fn, loss_fn = problem()
    found = diagnose(loss_fn, state_of(init_fn), batch())
    assert found.phase == ""
    assert "finite in the replay" in str(found)


def test_a_state_that_is_spread_over_devices():
    init_fn, loss_fn = problem()
    rules = ((r"params/first/kernel", P("data")), (".*", P()))
    strategy = make_strategy("jit", num_devices=4, rules=rules)
    state = strategy.init(lambda: with_nan(state_of(init_fn)))
    rows = strategy.put_batch(batch())
    assert diagnose(loss_fn, state, rows) == diagnose(loss_fn, with_nan(state_of(init_fn)), batch())


def data():
    arrays = batch(48)
    arrays.pop("mask"), arrays.pop("index")
    return arrays


@pytest.mark.parametrize(("name", "num_steps"), [("jit", 1), ("jit", 4), ("pmap", 1)])
def test_after_a_run_from_what_the_error_carries(tmp_path, name, num_steps):
    """The loop is a step, or a call of several, ahead; the state is still the right one."""
    init_fn, loss_fn = problem()
    arrays = data()
    draws = Batches(48, BATCH, 48 * 4, seed=1)
    bad = draws[5]["index"][3]
    seen = [i for i in range(len(draws)) if bad in draws[i]["index"]]
    arrays["x"][bad] = np.nan
    strategy = make_strategy(name, num_devices=2)
    make_step = functools.partial(make_train_step, loss_fn, TX)
    step, several = strategy.compile_step(make_step, arrays), None
    if num_steps > 1:
        program = strategy.compile_step(make_step, arrays, num_steps=num_steps)
        several = Several(num_steps, {0: program}, lambda step: False)
    first = strategy.init(lambda: state_of(init_fn))
    with pytest.raises(errors.NonFiniteError) as raised:
        fit(step, first, draws, several=several)
    error = raised.value
    assert error.step == seen[0]
    text = report_nonfinite(tmp_path, error, recipe(loss_fn, arrays), draws)
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (found["step"], found["last_good"]) == (seen[0] + 1, seen[0])
    assert (found["tensor"], found["examples"]) == ("batch/x", [bad])
    assert found["counts"] == {"nan": 4, "inf": 0, "size": 64, "array": "float32[16, 4]"}
    assert f"examples: {bad}" in text
    assert found["batch"] == error.index.tolist()
    assert str(error).startswith(f"step {seen[0] + 1} was not applied")


def test_after_skipped_steps():
    init_fn, loss_fn = problem()
    strategy = make_strategy(num_devices=2)
    make_step = functools.partial(make_train_step, loss_fn, TX, on_nonfinite="skip")
    step = strategy.compile_step(make_step)
    state = strategy.init(lambda: create_state(init_fn, TX, key=jax.random.key(0), use_health=True))
    rows = batch()
    rows["x"][7] = np.nan
    for one in (batch(), rows, rows):
        state, _ = step(state, one)
    found = diagnose(loss_fn, state, rows, step=int(state.step) - 1)
    assert (found.step, found.last_good, found.examples) == (3, 1, (107,))
    assert diagnose(loss_fn, state, rows).last_good == 1


def recipe(loss_fn, arrays):
    def nothing(key):
        raise AssertionError

    return Recipe("test", nothing, loss_fn, nothing, TX, arrays, arrays, 48 * 4, BATCH)


def test_a_report_never_hides_what_stopped_the_run(tmp_path):
    init_fn, loss_fn = problem()
    draws = Batches(48, BATCH, 48)
    error = errors.NonFiniteError("stop", step=1, state=state_of(init_fn))
    for wrong in ({"x": np.zeros((48, 9))}, {"y": np.zeros(48)}):
        text = report_nonfinite(tmp_path, error, recipe(loss_fn, wrong), draws)
        assert text.startswith("the step could not be replayed: ")
        assert "\n" not in text
    text = report_nonfinite(tmp_path, errors.NonFiniteError("stop"), recipe(loss_fn, data()), draws)
    assert text == "the step could not be replayed: its state is not at hand"
    assert not list(tmp_path.iterdir())


def test_the_batch_of_a_draw_from_arrays_and_from_a_source():
    arrays = {"x": np.arange(12.0).reshape(6, 2)}
    draw = {"index": np.array([4, 1]), "mask": np.array([True, False]), "partner": np.array([0, 5])}
    found = batch_of(arrays, draw)
    np.testing.assert_array_equal(found["x"], arrays["x"][[4, 1]])
    np.testing.assert_array_equal(found["partner"]["x"], arrays["x"][[0, 5]])
    source = [{"x": x} for x in arrays["x"]]
    jax.tree.map(np.testing.assert_array_equal, found, batch_of(source, draw))
