"""Data sets are read from a store by way of a copy on this host."""

import numpy as np
import pytest
from PIL import Image

from jaxnets import data, errors
from jaxnets.remote import as_path
from tests.test_kill import write_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def upload(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source).as_posix()).write(path.read_bytes())


def reads(store):
    return sum(method == "GET" for method, _ in store.requests)


def test_idx_files_are_read_once_and_again_when_they_change(store, folder, tmp_path):
    here = write_data(tmp_path / "data")
    upload(here, folder)
    expected = data.load("noise", data_dir=here)
    for num_reads in (4, 0):
        store.requests.clear()
        found = data.load("noise", data_dir=str(folder))
        assert reads(store) == num_reads
        np.testing.assert_array_equal(found.train["image"], expected.train["image"])
    labels = folder / "noise" / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] ^= 1
    labels.write(bytes(content))
    store.requests.clear()
    found = data.load("noise", data_dir=folder)
    assert reads(store) == 1
    assert found.train["label"][-1] == expected.train["label"][-1] ^ 1


def test_a_copy_that_was_changed_here_is_mended(store, folder, tmp_path, cache):
    upload(write_data(tmp_path / "data"), folder)
    expected = data.load("noise", data_dir=folder)
    (copy,) = cache.rglob("train-images-idx3-ubyte")
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    found = data.load("noise", data_dir=folder)
    np.testing.assert_array_equal(found.train["image"], expected.train["image"])


def test_what_arrives_damaged_is_refused(store, folder, tmp_path, cache, monkeypatch):
    upload(write_data(tmp_path / "data"), folder)
    read = type(folder).read_bytes
    monkeypatch.setattr(type(folder), "read_bytes", lambda self: read(self)[:-1] + b"x")
    with pytest.raises(errors.DataError, match="what arrived is not what the store has"):
        data.load("noise", data_dir=folder)
    assert not list(cache.rglob("*ubyte"))


def test_folders_of_images(store, folder, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            place = tmp_path / "data" / "pets" / part / name
            place.mkdir(parents=True)
            image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(image).save(place / "1.png")
    upload(tmp_path / "data", folder)
    here = data.open_images("pets", size=8, data_dir=tmp_path / "data")
    there = data.open_images("pets", size=8, data_dir=folder)
    assert there.class_names == ("cat", "dog")
    np.testing.assert_array_equal(there.train[1]["image"], here.train[1]["image"])
    (folder / "pets" / "train" / "dog" / "2.png").write((folder / "pets/test/dog/1.png").read_bytes())
    assert len(data.open_images("pets", size=8, data_dir=folder).train) == 3
    (folder / "pets" / "train" / "dog" / "1.png").unlink()
    assert len(data.open_images("pets", size=8, data_dir=folder).train) == 2


def test_what_is_not_there_and_what_cannot_be_read(store, folder):
    with pytest.raises(errors.ConfigError, match="unknown dataset 'noise'"):
        data.load("noise", data_dir=folder)
    with pytest.raises(errors.DataError, match="there is no bucket nowhere"):
        data.load("noise", data_dir=as_path("gs://nowhere/data"))
    with pytest.raises(errors.ConfigError, match="no name of a data set"):
        data.load("../x", data_dir=folder)
