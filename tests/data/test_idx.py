import gzip
import hashlib
import shutil
import warnings

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.data import idx
from jaxnets.data.idx import load_idx_folder, load_mnist, read_idx

IMAGES = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)


def header(*shape, kind=8, zeros=0):
    lengths = np.array(shape, ">u4").tobytes()
    return bytes([zeros, 0, kind, len(shape)]) + lengths


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["images", "images.gz"])  # browsers unzip and keep the name
def test_reads_what_was_written(tmp_path, zipped, name):
    content = header(3, 5, 4) + IMAGES.tobytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if zipped else content)
    read = read_idx(path, 3)
    assert read.dtype == np.uint8
    assert np.array_equal(read, IMAGES)


GOOD = header(3, 5, 4) + IMAGES.tobytes()
ZIPPED = gzip.compress(GOOD, mtime=0)
BAD = {
    "empty": (b"", "is empty"),
    "zeros": (header(3, 5, 4, zeros=1) + IMAGES.tobytes(), "starts with 01 00 08 03, expected 00"),
    "type": (header(3, 5, 4, kind=13) + IMAGES.tobytes(), "starts with 00 00 0d 03"),
    "axes": (header(60) + IMAGES.tobytes(), "starts with 00 00 08 01.*3 axes"),
    "little endian": (GOOD[:4] + np.array([3, 5, 4], "<u4").tobytes() + IMAGES.tobytes(), "holds"),
    "header cut": (GOOD[:10], "ends within its header"),
    "magic cut": (GOOD[:3], "starts with"),
    "cut": (GOOD[:-1], "holds 59 bytes after its header, expected 60"),
    "longer": (GOOD + b"x", "holds more than 60 bytes"),
    "none": (header(0, 5, 4), "holds no examples"),
    "vast": (header(2**32 - 1, 2**32 - 1, 2**32 - 1) + IMAGES.tobytes(), "holds 60 bytes"),
    "text": (b"<html>Not found</html>", "starts with 3c"),
    "zip of nothing": (gzip.compress(b""), "is empty"),
    "zip cut": (ZIPPED[:-20], "can't be read"),
    "zip flipped": (ZIPPED[:30] + bytes([ZIPPED[30] ^ 255]) + ZIPPED[31:], "can't be read"),
    "zip checksum": (ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], "can't be read"),
    "zip and more": (ZIPPED + b"more", "can't be read"),
    "zip header only": (ZIPPED[:5], "can't be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refuses_a_damaged_file(tmp_path, kind):
    content, why = BAD[kind]
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(errors.DataError, match=why) as error:
        read_idx(path, 3)
    assert message(error).startswith(f"{path}: ")


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(errors.DataError, match="can't be read"):
        read_idx(tmp_path / "nothing", 3)


@pytest.mark.parametrize("zipped", [True, False])
def test_loads_a_folder(tmp_path, write_idx_folder, zipped):
    arrays = write_idx_folder(tmp_path / "fashion", num_train=7, num_test=3, zipped=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_idx_folder(tmp_path / "fashion")
    assert dataset.name == "fashion"
    assert dataset.num_classes == 4
    assert dataset.class_names == ("0", "1", "2", "3")
    assert "not verified" in dataset.source
    assert dataset.train["image"].shape == (7, 5, 4, 1)
    assert np.array_equal(dataset.train["image"][..., 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(dataset.test["image"][..., 0], arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(dataset.train["label"], arrays["train-labels-idx1-ubyte"])
    assert np.array_equal(dataset.test["label"], arrays["t10k-labels-idx1-ubyte"])
    assert dataset.train["image"].flags.writeable  # torch.from_numpy warns of arrays that aren't


def test_strict_refuses_a_folder_that_nothing_vouches_for(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "fashion")
    with pytest.raises(errors.DataError, match="no official SHA-256"):
        load_idx_folder(tmp_path / "fashion", verify="strict")
    with pytest.raises(errors.ConfigError, match="verify mode"):
        load_idx_folder(tmp_path / "fashion", verify="maybe")


def test_a_folder_that_lacks_files(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "set")
    (tmp_path / "set" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(errors.DataError, match=r"lacks t10k-labels-idx1-ubyte \(") as error:
        load_idx_folder(tmp_path / "set")
    message(error)


def test_counts_must_agree(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "set", num_train=7)
    write_idx_folder(tmp_path / "other", num_train=8)
    name = "train-labels-idx1-ubyte.gz"
    shutil.copy(tmp_path / "other" / name, tmp_path / "set" / name)
    with pytest.raises(errors.DataError, match=r"7 images in .* and 8 labels"):
        load_idx_folder(tmp_path / "set")


@pytest.fixture
def mnist_server(tmp_path, write_idx_folder, monkeypatch):
    """Local mirrors of a tiny "MNIST" whose digests stand for the official ones."""
    import functools
    import http.server
    import threading

    write_idx_folder(tmp_path / "web")
    official = {}
    for path in (tmp_path / "web").iterdir():
        content = path.read_bytes()
        official[path.stem] = idx._Official(
            len(content),
            hashlib.sha256(content).hexdigest(),
            hashlib.sha256(gzip.decompress(content)).hexdigest(),
        )
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(idx, "_MNIST", official)
    monkeypatch.setattr(idx, "_MNIST_MIRRORS", (f"{here}/absent/", f"{here}/"))
    yield asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_mnist_is_downloaded_once_from_a_mirror(tmp_path, mnist_server):
    dataset = load_mnist(data_dir=tmp_path, verify="strict", progress=False)
    assert dataset.name == "mnist"
    assert "verified" in dataset.source
    assert dataset.train["image"].shape == (7, 5, 4, 1)
    assert any("absent" in path for path in mnist_server)
    mnist_server.clear()
    load_mnist(data_dir=tmp_path, verify="strict", progress=False)
    assert mnist_server == []


def test_mnist_fetches_only_what_is_missing(tmp_path, mnist_server):
    load_mnist(data_dir=tmp_path, progress=False)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
    mnist_server.clear()
    load_mnist(data_dir=tmp_path, progress=False)
    assert {path.rpartition("/")[2] for path in mnist_server if "absent" not in path} == {
        "train-labels-idx1-ubyte.gz"
    }


def test_mnist_unpacked_or_packed_anew_is_still_official(tmp_path, mnist_server):
    folder = tmp_path / "mnist"
    shutil.copytree(tmp_path / "web", folder)
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(gzip.decompress(packed.read_bytes()), 1, mtime=5))
    labels = folder / "train-labels-idx1-ubyte.gz"
    (folder / labels.stem).write_bytes(gzip.decompress(labels.read_bytes()))
    labels.unlink()
    assert "(official" in load_mnist(data_dir=tmp_path, verify="strict").source
    assert mnist_server == []


def test_mnist_with_another_content(tmp_path, mnist_server, write_idx_folder):
    write_idx_folder(tmp_path / "mnist", num_train=9)
    with pytest.warns(UserWarning, match="for 3 of 4 files") as caught:
        dataset = load_mnist(data_dir=tmp_path)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert "NOT verified" in dataset.source
    with pytest.raises(errors.DataError, match=r"\(train-images-idx3-ubyte, train-labels") as error:
        load_mnist(data_dir=tmp_path, verify="strict")
    message(error)


def test_the_official_files_are_listed_whole():
    assert set(idx._MNIST) == set(idx._NAMES)
    for official in idx._MNIST.values():
        assert len(bytes.fromhex(official.gz_sha256)) == len(bytes.fromhex(official.sha256)) == 32
    assert sum(official.gz_size for official in idx._MNIST.values()) == 11_594_722
