import hashlib
import sys
import warnings

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.data import digits
from jaxnets.data.digits import enlarge, load_digits

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def test_the_set_and_its_split():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_digits(verify="strict")
    assert dataset.train["image"].shape == (1438, 32, 32, 1)
    assert dataset.test["image"].shape == (359, 32, 32, 1)
    assert dataset.num_classes == 10
    assert "verified" in dataset.source
    # Every image is in one part, once.
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    both = {key: np.concatenate([dataset.train[key], dataset.test[key]]) for key in ("image", "label")}
    small = both["image"][:, ::4, ::4, 0].reshape(-1, 64)
    rows = sorted(zip(map(bytes, small), both["label"].tolist(), strict=True))
    expected = np.rint(images * 255 / 16).astype(np.uint8)
    assert rows == sorted(zip(map(bytes, expected), labels.tolist(), strict=True))


def test_the_split_never_changes():
    dataset = load_digits()
    assert dataset.test["label"][:12].tolist() == TEST_LABELS
    digest = hashlib.sha256(dataset.test["image"].tobytes()).hexdigest()
    assert digest[:16] == TEST_DIGEST


TEST_LABELS = [5, 9, 0, 9, 3, 4, 6, 7, 9, 5, 5, 0]
TEST_DIGEST = "b677ef7562e33737"


def test_every_class_is_in_both_parts():
    dataset = load_digits()
    assert np.bincount(dataset.train["label"]).min() > 100
    assert np.bincount(dataset.test["label"]).min() > 20


def test_enlarge():
    image = np.array([[[0, 16], [8, 1]]], np.uint8)
    large = enlarge(image)
    assert large.shape == (1, 8, 8, 1)
    assert large.dtype == np.uint8
    assert (large[0, :4, :4] == 0).all()
    assert (large[0, :4, 4:] == 255).all()
    assert (large[0, 4:, :4] == 128).all()  # 127.5, rounded to even
    assert (large[0, 4:, 4:] == 16).all()  # 15.94


def test_without_scikit_learn(monkeypatch):
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it weren't installed
    with pytest.raises(errors.DataError, match=r"pip install 'jaxnets\[datasets\]'") as error:
        load_digits()
    assert "\n" not in str(error.value)


def test_scikit_learn_is_not_imported_but_where_its_file_is_elsewhere(monkeypatch):
    expected = load_digits()
    monkeypatch.setattr(sklearn_datasets, "load_digits", None)
    np.testing.assert_array_equal(load_digits().train["image"], expected.train["image"])
    monkeypatch.undo()
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    assert load_digits(verify="strict").source == expected.source


def test_another_edition_is_noticed(monkeypatch):
    monkeypatch.setattr(digits, "_SHA256", "0" * 64)
    with pytest.warns(UserWarning, match="not the official SHA-256"):
        assert "NOT verified" in load_digits().source
    with pytest.raises(errors.DataError, match="another version of scikit-learn"):
        load_digits(verify="strict")
