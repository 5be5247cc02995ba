import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.data import Batches
from jaxnets.train import create_state, make_strategy
from jaxnets.train.predict import make_predict_step, predict, save_predictions

RNG = np.random.default_rng(0)
X = RNG.standard_normal((11, 3)).astype(np.float32)
W = RNG.standard_normal((3, 4)).astype(np.float32)
LABEL = RNG.integers(0, 4, 11).astype(np.int32)


def predict_fn(params, model_state, batch):
    return batch["x"] @ params["w"]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_row_once_and_in_order(num_devices):
    """Eleven rows in batches of eight: the second batch is filled up, and that must not show."""
    strategy = make_strategy("jit", num_devices=num_devices)
    state = strategy.init(
        lambda: create_state(
            lambda key: ({"w": jnp.asarray(W)}, {}), optax.sgd(0.1), key=jax.random.key(0)
        )
    )
    make_step = functools.partial(make_predict_step, predict_fn)
    step = strategy.compile_eval(make_step, {"x": X, "label": LABEL})
    found = predict(step, state, Batches(11, 8, 11, shuffle=False))
    logits = X @ W
    np.testing.assert_array_equal(found["label"], LABEL)
    np.testing.assert_array_equal(found["prediction"], logits.argmax(1))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found["probability"], shares.max(1), rtol=1e-5)


def test_a_mapped_axis_is_refused():
    with pytest.raises(ValueError, match="compile them with jit"):
        make_predict_step(predict_fn, axis_name="data")


def test_the_file_holds_no_objects(tmp_path):
    path = tmp_path / "predictions.npz"
    rows = {"label": LABEL, "prediction": LABEL, "probability": np.ones(11, np.float32)}
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    save_predictions(path, rows, class_names=("ä", "b"), samples={0: image, 10: image + 1})
    with np.load(path, allow_pickle=False) as file:
        found = dict(file)
    assert found["class_names"].tolist() == ["ä", "b"]
    assert found["sample_index"].tolist() == [0, 10]
    np.testing.assert_array_equal(found["sample_image"][1], image + 1)
    np.testing.assert_array_equal(found["label"], LABEL)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.npz"]
