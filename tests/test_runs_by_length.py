"""Training in batches by length: exact resume, and the same on any devices."""

import json

import jax
import numpy as np
import pytest

from experiments import imdb_sentiment, multi30k
from jaxnets import cli
from jaxnets.train import Checkpoints
from jaxnets.train.stored_model import read_model

pytestmark = pytest.mark.filterwarnings("ignore:.* pairs are left out", "ignore:.* pairs in validation")
_TEXTS = ("--width", "8", "--hidden", "8", "--max-length", "40", "--buckets", "20", "--batch-size", "16")
_TEXTS = (*_TEXTS, "--vocabulary-size", "200")
_PAIRS = ("--width", "8", "--hidden", "8", "--num-layers", "1", "--vocabulary-size", "300")
_PAIRS = (*_PAIRS, "--max-length", "20", "--batch-size", "16")
CASES = {
    "lstm": (imdb_sentiment, _TEXTS),
    "transformer": (multi30k, _PAIRS),
    "attention_rnn": (multi30k, ("--model", "attention_rnn", *_PAIRS)),
}
SOME = ["lstm", "transformer", pytest.param("attention_rnn", marks=pytest.mark.long)]


def run(case, folder, steps, *words, devices=1):
    experiment, flags = CASES[case]
    flags = (*flags, "--steps", str(steps), "--run-dir", str(folder), "--num-devices", str(devices))
    flags = (*flags, "--no-pictures", "--eval-every", "1000", *words)
    return cli.main(experiment.EXPERIMENT, ["train", *flags])


def found_in(folder):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        params = jax.device_get(read_model(checkpoints, checkpoints.latest())[0])
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    return named, json.loads((folder / "result.json").read_text())["eval"]


def assert_same(left, right):
    assert list(left) == list(right)
    for name, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[name], err_msg=name)


@pytest.mark.parametrize("case", SOME)
def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(case, tmp_path):
    words = ("--schedule", "constant")
    assert run(case, tmp_path / "one", 9, *words) == 0
    assert run(case, tmp_path / "two", 4, *words) == 0
    assert run(case, tmp_path / "two", 9, *words) == 0
    (left, eval_left), (right, eval_right) = (found_in(tmp_path / name) for name in ("one", "two"))
    assert_same(left, right)
    assert eval_left == eval_right


@pytest.fixture(
    scope="module",
    params=["lstm", *(pytest.param(name, marks=pytest.mark.long) for name in list(CASES)[1:])],
)
def alone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert run(request.param, folder, 4) == 0
    return request.param, found_in(folder)


@pytest.mark.parametrize(
    "strategy", ["tensor", *(pytest.param(name, marks=pytest.mark.long) for name in ("pmap", "fsdp"))]
)
def test_devices_make_no_difference(alone, tmp_path, strategy):
    case, (expected, expected_eval) = alone
    assert run(case, tmp_path / "run", 4, "--strategy", strategy, devices=4) == 0
    found, found_eval = found_in(tmp_path / "run")
    assert list(expected) == list(found)
    for name, a in expected.items():
        # Softmax doesn't see the keys' bias: its gradient is rounding, which Adam makes steps of.
        if "key']['bias" not in name:
            np.testing.assert_allclose(found[name], a, rtol=1e-4, atol=2e-5, err_msg=name)
    for name, value in expected_eval.items():
        np.testing.assert_allclose(found_eval[name], value, rtol=1e-4, err_msg=name)


def test_streamed_batches_are_the_same(alone, tmp_path):
    case, (expected, expected_eval) = alone
    assert run(case, tmp_path / "run", 4, "--stream") == 0
    found, found_eval = found_in(tmp_path / "run")
    assert_same(expected, found)
    assert found_eval == expected_eval
