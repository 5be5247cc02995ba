import re

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.interop import weights
from jaxnets.interop.sides import initial_variables
from tests.interop import tiny_duel as tiny

TABLE = (
    *weights.conv("conv1", use_bias=False),
    *weights.batch_norm("norm1"),
    *weights.dense("block/dense1", flattened=(2, 3, 4)),
    *weights.dense("head", "classifier.last"),
)


def variables_of(rng, dtype=np.float32):
    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "params": {
            "conv1": {"kernel": draw(3, 5, 2, 4)},
            "norm1": {"scale": draw(4), "bias": draw(4)},
            "block": {"dense1": {"kernel": draw(24, 7), "bias": draw(7)}},
            "head": {"kernel": draw(7, 3), "bias": draw(3)},
        },
        "batch_stats": {"norm1": {"mean": draw(4), "var": draw(4)}},
    }


@pytest.fixture
def variables():
    return variables_of(np.random.default_rng(0))


def test_layouts_are_those_of_pytorch(variables):
    state = weights.to_torch(TABLE, variables)
    params = variables["params"]
    assert state["conv1.weight"].shape == (4, 2, 3, 5)
    assert state["conv1.weight"][3, 1, 2, 4] == params["conv1"]["kernel"][2, 4, 1, 3]
    assert state["classifier.last.weight"][2, 6] == params["head"]["kernel"][6, 2]
    # Pixel (1, 0) of channel 2 in an image of 2x3x4: its place in NHWC and in NCHW.
    kernel = params["block"]["dense1"]["kernel"]
    assert state["block.dense1.weight"][5, 2 * 6 + 1 * 3 + 0] == kernel[(1 * 3 + 0) * 4 + 2, 5]
    assert state["norm1.running_var"] is variables["batch_stats"]["norm1"]["var"]
    assert state["norm1.num_batches_tracked"] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_ways_bit_for_bit(dtype):
    variables = variables_of(np.random.default_rng(1), dtype)
    state = weights.to_torch(TABLE, variables)
    back = weights.flatten(weights.to_linen(TABLE, state))
    given = weights.flatten(variables)
    assert sorted(back) == sorted(given)
    for name, array in given.items():
        assert back[name].dtype == array.dtype
        assert back[name].tobytes() == array.tobytes(), name
    again = weights.to_torch(TABLE, weights.to_linen(TABLE, state))
    assert list(again) == list(state)
    for name, array in state.items():
        assert again[name].tobytes() == array.tobytes(), name


def test_every_array_is_used_exactly_once(variables):
    missing = [row for row in TABLE if row.linen != "params/head/bias"]
    with pytest.raises(errors.ParityError, match="no row for params/head/bias of Linen"):
        weights.to_torch(missing, variables)
    state = weights.to_torch(TABLE, variables)
    with pytest.raises(errors.ParityError, match=r"no row for classifier\.last\.bias of PyTorch"):
        weights.to_linen(missing, state)
    with pytest.raises(errors.ParityError, match="names params/head/bias of Linen twice"):
        weights.to_torch([*TABLE, weights.Row("params/head/bias", "other")], variables)
    with pytest.raises(errors.ParityError, match=r"conv1\.weight of PyTorch twice"):
        weights.to_torch(
            [*TABLE, weights.Row("params/extra", "conv1.weight")],
            {**variables, "params": {**variables["params"], "extra": np.zeros(1)}},
        )
    more = [*TABLE, *weights.conv("conv9")]
    with pytest.raises(errors.ParityError, match="Linen has no params/conv9/bias, params/conv9/k"):
        weights.to_torch(more, variables)
    with pytest.raises(errors.ParityError, match=r"PyTorch has no conv9\.bias, conv9\.weight"):
        weights.to_linen(more, state)


def test_a_wrong_shape_is_named(variables):
    with pytest.raises(ValueError, match=re.escape("params/head/kernel = head.weight: a conv")):
        weights.Row("params/head/kernel", "head.weight", "conv").to_torch(np.zeros((3, 2)))
    row = weights.dense("d", flattened=(2, 2, 2))[0]
    with pytest.raises(ValueError, match="has 9 inputs"):
        row.to_torch(np.zeros((9, 2)))
    with pytest.raises(ValueError, match="has 9 inputs"):
        row.to_linen(np.zeros((2, 9)))
    with pytest.raises(errors.ConfigError, match="did you mean 'conv'"):
        weights.Row("params/x", "x", "convv")


@pytest.mark.parity
@pytest.mark.parametrize("model", ["lenet", "convnet", "mlp"])
def test_the_models_tables_fit_both_sides(model):
    from jaxnets.interop.parity import check_round_trip
    from jaxnets.interop.reference import load_reference
    from jaxnets.interop.sides import load_weights

    made = tiny.recipe(model, image_shape=(24, 16, 3))
    reference = load_reference("tiny", made.torch_reference, made.torch_arguments)
    variables = initial_variables(made)
    check_round_trip(reference.weights, variables)
    pytorch = reference.make_model()
    state = weights.to_torch(reference.weights, variables)
    load_weights(pytorch, state)
    for name, tensor in pytorch.state_dict().items():
        assert tensor.numpy().tobytes() == state[name].tobytes(), name
