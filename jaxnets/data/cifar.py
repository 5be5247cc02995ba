"""CIFAR-10 in its binary form: records of one label byte and 3,072 pixel bytes; no pickles.

Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images;
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
from pathlib import Path

import numpy as np

from jaxnets import errors
from jaxnets.data.archive import unpack_tar
from jaxnets.data.datasets import Dataset, check_digests, check_verify
from jaxnets.data.download import download, locked
from jaxnets.data.progress import Progress

_FOLDER = "cifar-10-batches-bin"
_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_ARCHIVE_SIZE = 170_052_171
_ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

# The authors publish the archive's MD5 only. These are the digests of the files in it, as
# torchvision-ruby pins them next to the archive's; two more projects give test_batch's.
_OFFICIAL = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_TEST = "test_batch.bin"
_META = "batches.meta.txt"

_NUM_CLASSES = 10
_NUM_RECORDS = 10_000  # in each file
_RECORD_BYTES = 1 + 3 * 32 * 32


def load_cifar10(*, data_dir: Path, verify: str = "warn", progress: Progress = True) -> Dataset:
    """CIFAR-10: 50,000 and 10,000 colour photographs, 32 x 32, ten classes.

    Args:
        data_dir: the files are in `data_dir/cifar10/cifar-10-batches-bin`; if that folder is
            absent, the archive is downloaded (170 MB) and unpacked to it.
        verify: "warn" or "strict", for files that aren't the official ones.
        progress: see `jaxnets.data.load`.

    Returns:
        The data set, images `[N, 32, 32, 3]`, red, green and blue.

    Raises:
        DataError: if it can't be downloaded, or files are missing or damaged.
    """
    check_verify(verify)
    folder = Path(data_dir) / "cifar10" / _FOLDER
    if not folder.is_dir():
        _obtain(folder, progress)
    return _load(folder, verify=verify, num_records=_NUM_RECORDS)


def _obtain(folder: Path, progress: Progress) -> None:
    archive = folder.with_name("cifar-10-binary.tar.gz")
    sizes = dict.fromkeys(_OFFICIAL, _NUM_RECORDS * _RECORD_BYTES)
    sizes |= {_META: 1_000, "readme.html": 100_000}
    # One lock over both steps: a second process must not find the archive gone and fetch it anew.
    with locked(archive.with_name("cifar10")):
        if folder.is_dir():
            return
        was_there = archive.exists()  # put there by hand: not ours to remove
        download(_URL, archive, size=_ARCHIVE_SIZE, sha256=_ARCHIVE_SHA256, progress=progress)
        members = {f"{_FOLDER}/{name}": size for name, size in sizes.items()}
        unpack_tar(archive, folder, members=members)
        if not was_there:
            archive.unlink()


def _load(folder: Path, *, verify: str, num_records: int) -> Dataset:
    if missing := [name for name in (*_OFFICIAL, _META) if not (folder / name).is_file()]:
        raise errors.DataError(
            f"{folder}: lacks {', '.join(missing)}: remove the folder and it is downloaded again"
        )
    class_names = _read_class_names(folder / _META)
    train_names = [name for name in _OFFICIAL if name != _TEST]
    train, train_digests = _read_part(folder, train_names, num_records)
    test, test_digests = _read_part(folder, [_TEST], num_records)
    digests = train_digests | test_digests
    mend = "remove the folder to download them"
    source = check_digests("cifar10", str(folder), digests, _OFFICIAL, verify=verify, mend=mend)
    return Dataset("cifar10", train=train, test=test, class_names=class_names, source=source)


def _read_part(
    folder: Path, names: list[str], num_records: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The images and labels of some files, one after the other, and each file's SHA-256."""
    image_FNHWC = np.empty((len(names), num_records, 32, 32, 3), np.uint8)  # F: the file
    labels, digests = [], {}
    for name, image_NHWC in zip(names, image_FNHWC, strict=True):
        content = _read_exactly(folder / name, num_records)
        digests[name] = hashlib.sha256(content).hexdigest()
        records = np.frombuffer(content, np.uint8).reshape(num_records, _RECORD_BYTES)
        labels.append(_checked_labels(folder / name, records[:, 0]))
        image_NCHW = records[:, 1:].reshape(num_records, 3, 32, 32)
        image_NHWC[...] = image_NCHW.transpose(0, 2, 3, 1)
    image = image_FNHWC.reshape(-1, 32, 32, 3)
    return {"image": image, "label": np.concatenate(labels).astype(np.int32)}, digests


def _read_exactly(path: Path, num_records: int) -> bytes:
    expected = num_records * _RECORD_BYTES
    size = path.stat().st_size
    content = path.read_bytes() if size == expected else b""
    if len(content) != expected:
        raise errors.DataError(
            f"{path}: has {size:,} bytes, expected {expected:,} ({num_records:,} records of "
            f"{_RECORD_BYTES:,}): remove its folder and it is downloaded again"
        )
    return content


def _checked_labels(path: Path, label: np.ndarray) -> np.ndarray:
    if label.max() >= _NUM_CLASSES:
        row = int(label.argmax())
        raise errors.DataError(
            f"{path}: record {row} has the label {label[row]}, expected 0..9: "
            "remove its folder and it is downloaded again"
        )
    return label


def _read_class_names(path: Path) -> tuple[str, ...]:
    """One name on each line, and an empty line at the end."""
    names = tuple(path.read_text("ascii", errors="replace").split())
    if len(names) != _NUM_CLASSES:
        raise errors.DataError(
            f"{path}: has {len(names)} class names, expected {_NUM_CLASSES}: "
            "remove its folder and it is downloaded again"
        )
    return names
