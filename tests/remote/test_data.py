"""Data sets are read from a store by way of a copy on this host."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxnets import data, errors
from jaxnets.data import cifar, mirror
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
    monkeypatch.setattr(
        type(folder), "read_bytes", lambda self, *part, **more: read(self, *part, **more)[:-1] + b"x"
    )
    with pytest.raises(errors.DataError, match="what arrived is not what the store has"):
        data.load("noise", data_dir=folder)
    assert not list(cache.rglob("*ubyte"))


def pack(monkeypatch, seed):
    """An archive as CIFAR-10's, of two records a file, which is what the loader expects then."""
    rng, packed = np.random.default_rng(seed), io.BytesIO()
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {name: rng.integers(0, 10, 2 * 3073, np.uint8).tobytes() for name in names}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    others = {"batches.meta.txt": b"name\n" * 10, "readme.html": b""}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in (files | others).items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cifar, "_NUM_RECORDS", 2)
    monkeypatch.setattr(cifar, "_OFFICIAL", digests)
    monkeypatch.setattr(cifar, "_ARCHIVE_SIZE", len(packed.getvalue()))
    monkeypatch.setattr(cifar, "_ARCHIVE_SHA256", hashlib.sha256(packed.getvalue()).hexdigest())
    return packed.getvalue()


def test_what_a_loader_unpacks_stays_until_the_archive_changes(store, folder, cache, monkeypatch):
    archive = folder / "cifar10" / "cifar-10-binary.tar.gz"
    archive.write(pack(monkeypatch, seed=0))
    first = data.load("cifar10", data_dir=folder, verify="strict")
    (unpacked,) = cache.rglob("test_batch.bin")
    locks = {path: path.stat().st_ino for path in cache.rglob(".*.lock")}
    made = unpacked.stat()
    (folder / "cifar10" / "README").write(b"one more, which changes nothing of the others")
    for num_reads in (1, 0):
        store.requests.clear()
        again = data.load("cifar10", data_dir=folder, verify="strict")
        assert reads(store) == num_reads
        np.testing.assert_array_equal(again.train["image"], first.train["image"])
    assert unpacked.stat() == made
    archive.write(pack(monkeypatch, seed=1))
    other = data.load("cifar10", data_dir=folder, verify="strict")  # its files are the official ones now
    assert (other.train["image"] != first.train["image"]).any()
    assert {path: path.stat().st_ino for path in cache.rglob(".*.lock")} == locks


@pytest.mark.parametrize("num_answers", [1, 3, 5])
def test_a_copy_that_was_broken_off_goes_on(store, folder, cache, monkeypatch, num_answers):
    """Of two objects in three pieces each."""
    monkeypatch.setattr(mirror, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(mirror, "_THREADS", 1)
    contents = {name: np.random.default_rng(i).bytes(2500) for i, name in enumerate("ab")}
    for name, content in contents.items():
        (folder / "set" / name).write(content)
    store.requests.clear()
    store.fault = lambda method, name: 403 if reads(store) > num_answers else None
    with pytest.raises(errors.DataError, match="the store refuses it"):
        mirror.mirrored(folder, "set")
    store.fault = lambda method, name: None
    store.requests.clear()
    here = mirror.mirrored(folder, "set") / "set"
    assert reads(store) == 6 - num_answers
    assert {path.name: path.read_bytes() for path in here.glob("[ab]")} == contents
    assert not (here / ".arriving").exists()
    store.requests.clear()
    mirror.mirrored(folder, "set")
    assert reads(store) == 0


def test_an_object_that_changes_while_it_is_copied(store, folder, monkeypatch):
    monkeypatch.setattr(mirror, "_PIECE_BYTES", 1000)
    path = folder / "set" / "a"
    path.write(bytes(2500))
    store.requests.clear()

    def change(method, name):
        if method == "GET" and reads(store) == 2:
            store.put(path.bucket, path.key, b"x" * 2500)

    store.fault = change
    with pytest.raises(errors.DataError, match="was changed while it was copied; try again"):
        mirror.mirrored(folder, "set")
    assert (mirror.mirrored(folder, "set") / "set" / "a").read_bytes() == b"x" * 2500


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
    (folder / "pets" / "test" / "dog" / "1.png").unlink()
    last = data.open_images("pets", size=8, data_dir=folder)
    assert (len(last.train), len(last.test)) == (2, 1)


def test_what_is_not_there_and_what_cannot_be_read(store, folder):
    with pytest.raises(errors.ConfigError, match="unknown dataset 'noise'"):
        data.load("noise", data_dir=folder)
    with pytest.raises(errors.DataError, match="there is no bucket nowhere"):
        data.load("noise", data_dir=as_path("gs://nowhere/data"))
    with pytest.raises(errors.ConfigError, match="no name of a data set"):
        data.load("../x", data_dir=folder)
