import dataclasses

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.data import Batches
from jaxnets.interop import parity
from jaxnets.train import optim
from tests.interop import tiny_duel as tiny

STAGES = [
    "outputs",
    "loss",
    "gradients",
    "parameters after 1 step",
    "losses of all steps",
    "parameters after all steps",
    "outputs in evaluation after all steps",
]


def load(recipe):
    from jaxnets.interop.reference import load_reference

    return load_reference(recipe.name, recipe.torch_reference, recipe.torch_arguments)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "optimizer", "options"),
    [
        ("lenet", "sgd", {"weight_decay": 0.01}),
        ("mlp", "adam", {"learning_rate": 1e-3, "weight_decay": 0.01}),
        ("convnet", "adamw", {"learning_rate": 1e-3, "weight_decay": 0.05}),
    ],
)
def test_every_model_and_optimizer_agrees_with_pytorch(model, optimizer, options):
    recipe = tiny.recipe(
        model, image_shape=(16, 16, 2), optimizer=optimizer, label_smoothing=0.1, **options
    )
    lines = []
    report = parity.check_parity(recipe, load(recipe), say=lines.append)
    assert (report["num_steps"], report["batch_size"]) == (20, 8)
    assert report["dropout_rates"] == {"lenet": [], "mlp": [0.1, 0.1], "convnet": [0.3]}[model]
    for dtype in ("float64", "float32"):
        stages = report[dtype]
        statistics = [name for name in stages if name.startswith("running")]
        assert len(statistics) == (2 if model == "convnet" else 0)
        assert [name for name in stages if name not in statistics] == STAGES
        for name, stage in stages.items():
            if dtype == "float64":
                assert stage["bound"] == 1e-9
            elif stage["bound"] is None:
                assert "all steps" in name
                assert np.isfinite(stage["error"])
                continue
            assert stage["error"] <= stage["bound"], name
    assert report["float32"]["outputs"]["bound"] <= 2e-5
    assert report["float32"]["gradients"]["bound"] < 1e-2
    assert len(report["loss_rounding"]) == 20
    assert 0 < max(report["loss_rounding"]) < 1e-3
    assert report["float32"]["outputs"]["error"] > 0  # float32, and two implementations
    assert 0 < report["float64"]["outputs"]["error"] < 1e-13
    assert [line.split(":")[0] for line in lines] == ["parity in float64", "parity in float32"]


def run_with(recipe, reference, variables, draws):
    from jaxnets.interop.sides import run_torch

    return run_torch(reference, recipe.train, variables, draws, "float64")


def mutate(reference, **changes):
    rows = [
        dataclasses.replace(row, **changes[row.linen.replace("/", "_")])
        if row.linen.replace("/", "_") in changes
        else row
        for row in reference.weights
    ]
    return dataclasses.replace(reference, weights=tuple(rows))


@pytest.mark.parity
def test_batches_are_smaller_where_their_outputs_would_not_fit(monkeypatch):
    recipe = tiny.recipe("mlp", image_shape=(4, 4, 1), optimizer="sgd")
    reference = load(recipe)
    variables = parity.initial_variables(recipe)
    (draw,) = Batches(recipe.num_examples, 8, 8)
    whole = parity.output_bytes(recipe, variables, draw)
    outputs = parity.run_jax(recipe, variables, [draw], "float64").outputs
    assert whole == sum(x.nbytes for x in outputs.values())
    for allowed, rows in ((whole, 8), (whole - 1, 7), (whole // 4, 2), (1, 1)):
        monkeypatch.setattr(parity, "MAX_OUTPUT_BYTES", allowed)
        assert parity.check_parity(recipe, reference, num_steps=1)["batch_size"] == rows


@pytest.mark.parity
def test_what_rounding_may_do_is_seen_from_other_weights():
    """It widens the bound of the gradients alone, and a gradient that is missing stays a mistake."""
    from jaxnets.interop.sides import run_torch

    recipe, reference, variables, draws, _, exact = tiny.sides("convnet")
    rough, nudged = (
        run_torch(reference, recipe.train, variables, draws, dtype) for dtype in ("float32", "float64")
    )
    name = "params/conv2/kernel"
    nudged.grads[name] = exact.grads[name] * 1.5  # as if units had switched
    nudged.outputs[""] = exact.outputs[""] * 1.5
    one = parity.compare_records(rough, rough, "float32", 1e-5, exact=exact)
    two = parity.compare_records(rough, rough, "float32", 1e-5, exact=exact, nudged=[nudged])
    assert one["gradients"]["bound"] < 1e-3
    assert two["gradients"]["bound"] == 0.3
    assert two["outputs"]["bound"] == one["outputs"]["bound"] <= 2e-5
    missing = dataclasses.replace(rough, grads=rough.grads | {name: 0 * rough.grads[name]})
    with pytest.raises(errors.ParityError, match=rf"gradients: {name} differs by 1\.00e\+00"):
        parity.compare_records(missing, rough, "float32", 1e-5, exact=exact, nudged=[nudged])


@pytest.mark.parity
def test_a_wrong_flatten_order_is_found_where_it_acts():
    recipe, _, variables, draws, ours, theirs = tiny.sides("convnet")
    parity.compare_records(ours, theirs, "float64", 1e-9)
    wrong = mutate(load(recipe), params_dense1_kernel={"flattened": None})
    with pytest.raises(errors.ParityError, match=r"float64, outputs: output of dense1 differs by"):
        parity.compare_records(ours, run_with(recipe, wrong, variables, draws), "float64", 1e-9)


@pytest.mark.parity
def test_a_transposed_kernel_is_found_where_it_acts():
    recipe, reference, variables, draws, ours, _ = tiny.sides("convnet")
    params = variables["params"]
    kernel = params["conv2"]["kernel"].transpose(1, 0, 2, 3)
    wrong = variables | {"params": params | {"conv2": {"kernel": kernel}}}
    with pytest.raises(errors.ParityError, match="output of conv2 differs by"):
        parity.compare_records(ours, run_with(recipe, reference, wrong, draws), "float64", 1e-9)
    # The message is one line with stage, tensor, error and bound.
    with pytest.raises(errors.ParityError, match=r"^[^\n]*outputs: [^\n]*[0-9]e-\d+[^\n]*1e-09$"):
        parity.compare_records(ours, run_with(recipe, reference, wrong, draws), "float64", 1e-9)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("attribute", "value", "stage"),
    [
        ("momentum", 0.2, "running statistics after 1 step: batch_stats/norm1/mean"),
        ("eps", 1e-4, "outputs: output of norm1"),
    ],
)
def test_another_batch_normalisation_is_found(attribute, value, stage):
    recipe, reference, variables, draws, ours, _ = tiny.sides("convnet")

    def make_model():
        model = reference.make_model()
        setattr(model.norm1, attribute, value)
        return model

    other = dataclasses.replace(reference, make_model=make_model)
    with pytest.raises(errors.ParityError, match=f"float64, {stage} differs"):
        parity.compare_records(ours, run_with(recipe, other, variables, draws), "float64", 1e-9)


@pytest.mark.parity
def test_another_dropout_rate_is_found_although_dropout_is_off():
    recipe, reference, variables, draws, ours, _ = tiny.sides("convnet")

    def make_model():
        model = reference.make_model()
        model.dropout1.p = 0.5
        return model

    other = dataclasses.replace(reference, make_model=make_model)
    with pytest.raises(errors.ParityError, match=r"rates are \[0.3\] in JAX and \[0.5\]"):
        parity.compare_records(ours, run_with(recipe, other, variables, draws), "float64", 1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_another_hyperparameter_of_the_optimizer_is_found(name):
    """The optimizers alone: equal as they stand, and not with other numbers."""
    import jax
    import jax.numpy as jnp
    import optax
    import torch

    from benchmarks.torch_reference.classifier import reference

    rng = np.random.default_rng(0)
    start = {"p": rng.standard_normal(7)}
    grads = [{"p": rng.standard_normal(7) * 10.0**-i} for i in range(6)]
    made = reference(
        model="mlp",
        image_shape=(2, 2, 1),
        num_classes=2,
        optimizer=name,
        learning_rate=0.01,
        momentum=0.8,
        weight_decay=0.1,
    )
    ours = {}
    with jax.enable_x64(True):
        for momentum, decay in ((0.8, 0.1), (0.7, 0.1), (0.8, 0.2)):
            tx = getattr(optim, name)(0.01, momentum=momentum, weight_decay=decay)
            params = jax.tree.map(jnp.asarray, start)
            state = tx.init(params)
            for grad in grads:
                updates, state = tx.update(jax.tree.map(jnp.asarray, grad), state, params)
                params = optax.apply_updates(params, updates)
            ours[momentum, decay] = {"p": np.asarray(params["p"])}
    expected = ours.pop((0.8, 0.1))
    for how in ({}, {"fused": True}, {"foreach": True}):
        parameter = torch.nn.Parameter(torch.tensor(start["p"]))
        optimizer = made.make_optimizer([parameter], **how)
        for grad in grads:
            parameter.grad = torch.tensor(grad["p"])
            optimizer.step()
        theirs = {"p": parameter.detach().numpy()}
        parity.compare("step", expected, theirs, 1e-12)
        for other in ours.values():
            with pytest.raises(errors.ParityError, match="step: p differs"):
                parity.compare("step", other, theirs, 1e-9)


@pytest.mark.parity
def test_gradients_are_those_of_the_training_step():
    """SGD without momentum moves by minus the learning rate times the gradient."""
    *_, variables, _, ours, theirs = tiny.sides("lenet")
    from jaxnets.interop.weights import flatten

    start = flatten({"params": variables["params"]})
    for record in (ours, theirs):
        for name, grad in record.grads.items():
            moved = (start[name].astype(np.float64) - record.after_one[name]) / 0.05
            np.testing.assert_allclose(grad, moved, atol=1e-12)
            assert np.abs(grad).max() > 0


@pytest.mark.parity
def test_a_step_of_adam_counts_where_rounding_does_not_turn_its_gradient():
    """Such an element's step is refused nowhere; that of another one is."""
    from jaxnets.interop.sides import run_torch

    recipe, reference, variables, draws, _, exact = tiny.sides("convnet")
    rough = run_torch(reference, recipe.train, variables, draws, "float32")
    name = "params/conv2/kernel"
    size = np.abs(exact.grads[name])
    change = np.abs(rough.grads[name] - exact.grads[name])
    least, greatest = (np.unravel_index(f(size), size.shape) for f in (np.argmin, np.argmax))
    for place, is_refused in ((least, False), (greatest, True)):
        grads, other = (x[name].copy() for x in (rough.grads, rough.after_one))
        other[place] += 1
        truth = exact.grads[name].copy()
        if not is_refused:
            grads[place], truth[place] = change.max(), -change.max()
        theirs = dataclasses.replace(rough, grads=rough.grads | {name: grads})
        ours = dataclasses.replace(theirs, after_one=rough.after_one | {name: other})
        truth = dataclasses.replace(exact, grads=exact.grads | {name: truth})
        if is_refused:
            with pytest.raises(errors.ParityError, match=rf"after 1 step: {name} differs"):
                parity.compare_records(ours, theirs, "float32", 1e-5, exact=truth)
        else:
            report = parity.compare_records(ours, theirs, "float32", 1e-5, exact=truth)
            count = report["parameters after 1 step"]["unsteady_elements"]
            assert 0 < count < sum(x.size for x in exact.grads.values()) / 20


def test_compare_by_hand():
    theirs = {"a": np.array([1.0, -4.0]), "b": np.array([[1.0, 2.0]])}
    close = {"a": np.array([1.0, -4.0 + 4e-10]), "b": theirs["b"]}
    report = parity.compare("here", close, theirs, 1e-9)
    assert report["tensor"] == "a"
    assert report["error"] == pytest.approx(1e-10)
    for wrong, message in (
        ({**theirs, "b": np.array([[1.0, 2.1]])}, "here: b differs by 5.00e-02"),
        ({**theirs, "b": np.array([[1.0, np.nan]])}, "b differs by nan"),
        ({**theirs, "b": np.array([1.0, 2.0])}, r"b has the shape \(2,\) in JAX"),
        ({"a": theirs["a"]}, "b is on one side only"),
    ):
        with pytest.raises(errors.ParityError, match=message):
            parity.compare("here", wrong, theirs, 1e-9)


def test_a_zero_tensor_is_held_to_the_rounding_of_its_stage():
    theirs = {"large": np.array([3.0]), "zero": np.zeros(2)}
    parity.compare("here", {**theirs, "zero": np.array([0.0, 1e-15])}, theirs, 1e-9)
    with pytest.raises(errors.ParityError, match="zero differs"):
        parity.compare("here", {**theirs, "zero": np.array([0.0, 1e-13])}, theirs, 1e-9)
    alone = {"zero": np.zeros(2)}
    parity.compare("here", alone, alone, 1e-9)
    with pytest.raises(errors.ParityError, match="zero differs"):
        parity.compare("here", {"zero": np.array([0.0, 1e-300])}, alone, 1e-9)


def test_a_table_that_loses_bits_is_found():
    from jaxnets.interop.weights import Row

    class Lossy(Row):
        def to_linen(self, array):
            return array + 0.0  # -0.0 becomes 0.0

    table = (Lossy("params/x", "x"),)
    parity.check_round_trip(table, {"params": {"x": np.array([1.0])}})
    with pytest.raises(errors.ParityError, match="params/x does not come back"):
        parity.check_round_trip(table, {"params": {"x": np.array([-0.0])}})


@pytest.mark.long
@pytest.mark.parity
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", ["resnet18", "resnet50", "speednet"])
def test_large_networks_agree_with_pytorch(model):
    made = tiny.recipe(model, image_shape=(17, 18, 3), learning_rate=0.01, weight_decay=0.001)
    # Statistics of 8 rows of 3x3 amplify rounding tenfold in a step, on both sides.
    report = parity.check_parity(made, load(made), num_steps=2)
    for dtype in ("float64", "float32"):
        assert report[dtype]["outputs"]["error"] > 0
        assert "running statistics after 1 step" in report[dtype]
