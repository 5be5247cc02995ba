import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from jaxnets import errors, registry
from jaxnets.data import datasets
from jaxnets.data.datasets import Dataset, data_folder, load

IMAGE = np.zeros((3, 4, 4, 1), np.uint8)
LABEL = np.array([0, 1, 1], np.int32)
PART = {"image": IMAGE, "label": LABEL}


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def registered():
    """A data set of the test's own; gives back the arguments that its loader was called with."""
    calls = []

    def loader(**arguments):
        calls.append(arguments)
        return Dataset("tiny", PART, PART, ("no", "yes"), "made up")

    registry.register("dataset", "tiny", loader)
    yield calls
    registry.unregister("dataset", "tiny")


def test_a_registered_set_is_loaded_with_the_options(registered, tmp_path):
    dataset = load("tiny", data_dir=tmp_path, verify="strict", progress=False)
    assert dataset.num_classes == 2
    assert registered == [{"data_dir": tmp_path, "verify": "strict", "progress": False}]


def test_the_names_that_are_always_there():
    assert {"cifar10", "digits", "mnist", "random_images"} <= set(registry.names("dataset"))
    for name in ("cifar10", "digits", "mnist", "random_images"):
        assert callable(registry.get("dataset", name))


def test_a_registered_name_wins_over_a_folder(registered, tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "tiny")
    assert load("tiny", data_dir=tmp_path).source == "made up"


def test_a_folder_of_idx_files_is_a_set(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "fashion-mnist")
    dataset = load("fashion-mnist", data_dir=str(tmp_path))
    assert dataset.name == "fashion-mnist"
    assert dataset.train["image"].shape == (7, 5, 4, 1)


def test_an_incomplete_folder_of_idx_files_says_what_it_lacks(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "fashion-mnist")
    (tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(errors.DataError, match="lacks train-images-idx3-ubyte"):
        load("fashion-mnist", data_dir=tmp_path)


def test_an_unknown_name_lists_the_nearest(tmp_path, write_idx_folder):
    with pytest.raises(errors.ConfigError, match="did you mean 'mnist'") as error:
        load("mnits", data_dir=tmp_path)
    message(error)
    write_idx_folder(tmp_path / "fashion-mnist")
    (tmp_path / "not-a-set").mkdir()
    with pytest.raises(errors.ConfigError, match="did you mean 'fashion-mnist'") as error:
        load("fashion-mnits", data_dir=tmp_path)
    assert "not-a-set" not in message(error)
    with pytest.raises(errors.ConfigError, match="unknown dataset"):
        load("cifar11", data_dir=tmp_path / "absent")


@pytest.mark.parametrize(
    "name", ["../outside", "..", ".", "", "a/b", "/etc", "a\\b", "a\nb", "mnist/", ".hidden", "~"]
)
def test_a_name_cannot_lead_out_of_the_data_folder(tmp_path, write_idx_folder, name):
    write_idx_folder(tmp_path / "outside")
    write_idx_folder(tmp_path / "data")  # what "." would find
    write_idx_folder(tmp_path / "data" / "a" / "b")
    with pytest.raises(errors.ConfigError, match="no name of a data set") as error:
        load(name, data_dir=tmp_path / "data")
    message(error)


def test_the_path_of_a_set_is_told_in_flags(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "sets" / "mine")
    with pytest.raises(errors.ConfigError, match="no name") as error:
        load(str(tmp_path / "sets" / "mine"), data_dir=tmp_path)
    assert message(error).endswith(f": for that folder say --data-dir {tmp_path}/sets --dataset mine")


def test_an_unknown_mode_is_refused(registered, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"unknown verify mode 'strickt'.*'strict'"):
        load("tiny", data_dir=tmp_path, verify="strickt")
    assert registered == []


def test_a_data_folder_that_is_a_file(registered, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.DataError, match=r"is a file: .*--data-dir") as error:
        load("tiny", data_dir=tmp_path / "file")
    message(error)


def test_where_the_data_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAXNETS_DATA", raising=False)
    assert data_folder() == tmp_path / ".cache" / "jaxnets" / "data"
    monkeypatch.setenv("JAXNETS_DATA", "~/elsewhere")
    assert data_folder() == tmp_path / "elsewhere"
    assert data_folder("/given") == data_folder(data_folder("/given"))
    assert str(data_folder("/given")) == "/given"


def test_what_a_loader_cannot_read_is_one_line(tmp_path):
    def loader(**_):
        raise PermissionError(13, "Permission denied", "/some/file")

    registry.register("dataset", "locked", loader)
    try:
        with pytest.raises(errors.DataError, match="can't read /some/file: Permission denied"):
            load("locked", data_dir=tmp_path)
    finally:
        registry.unregister("dataset", "locked")


def test_a_data_folder_without_the_right_to_read(tmp_path, write_idx_folder, as_nobody):
    write_idx_folder(tmp_path / "data" / "set")
    (tmp_path / "data").chmod(0o700)
    tmp_path.chmod(0o755)
    report = as_nobody(
        f"""
        from jaxnets import data, errors
        for name in ("set", "cifar10", "mnist"):
            try:
                data.load(name, data_dir={str(tmp_path / "data")!r})
            except errors.DataError as error:
                print(error)
        """
    )
    assert len(report.splitlines()) == 3
    assert report.count("Permission denied") == 3


BAD_PARTS = {
    "keys": ({"image": IMAGE}, r"has \['image'\]"),
    "rank": (PART | {"image": IMAGE[..., 0]}, r"uint8 \(3, 4, 4\), expected uint8 \[N, H, W, C\]"),
    "image type": (PART | {"image": IMAGE.astype(np.float32)}, "images are float32"),
    "label type": (PART | {"label": LABEL.astype(np.int64)}, "labels are int64"),
    "label count": (PART | {"label": LABEL[:2]}, r"expected int32 \(3,\)"),
    "label range": (PART | {"label": LABEL + 1}, "from 1 to 2, expected 0..1"),
    "negative": (PART | {"label": LABEL - 1}, "from -1 to 0"),
    "none": ({"image": IMAGE[:0], "label": LABEL[:0]}, "no examples"),
    "shape": (PART | {"image": np.zeros((3, 5, 4, 1), np.uint8)}, "train images are"),
}


@pytest.mark.parametrize("kind", BAD_PARTS)
def test_a_data_set_that_does_not_fit_together(kind):
    part, why = BAD_PARTS[kind]
    with pytest.raises(errors.DataError, match=why):
        Dataset("tiny", PART, part, ("no", "yes"), "made up")


def test_a_data_set_is_frozen():
    dataset = Dataset("tiny", PART, PART, ("no", "yes"), "made up")
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "other"  # pyright: ignore


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, jaxnets.data, jaxnets.data.digits, jaxnets.data.cifar, jaxnets.data.idx\n"
        "heavy = {'jax', 'torch', 'tensorflow', 'sklearn', 'flax', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names():
    from jaxnets import data

    assert {"Batches", "Dataset", "index", "load", "take"} <= set(dir(data))
    assert data.load is datasets.load


def test_random_images_have_the_shape_of_cifar10_and_is_the_same_each_time():
    first, second = load("random_images"), load("random_images")
    assert (first.num_train, first.image_shape, first.num_classes) == (10_000, (32, 32, 3), 10)
    assert len(first.test["label"]) == 2_000
    assert (first.train["image"] == second.train["image"]).all()
    assert (first.train["image"][:2_000] != first.test["image"]).any()
    assert set(first.train["label"]) == set(range(10))
