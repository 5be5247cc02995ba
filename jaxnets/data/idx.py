"""IDX files, the form of MNIST and of the sets made after it (Fashion-MNIST, KMNIST, ...).

A big-endian header (two zero bytes, the type, the number of axes, the length of each axis as
uint32) and then the values, row-major; http://yann.lecun.com/exdb/mnist. Only unsigned bytes are
read here. LeCun, Bottou, Bengio and Haffner 1998, Gradient-Based Learning Applied to Document
Recognition.
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxnets import errors
from jaxnets.data.datasets import Dataset, check_digests, check_verify
from jaxnets.data.download import download
from jaxnets.data.progress import Progress

_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_NAMES = _TRAIN + _TEST
_UBYTE = 0x08
_CHUNK_BYTES = 1 << 20


class _Official(NamedTuple):
    gz_size: int  # bytes, of the file as it is offered
    gz_sha256: str
    sha256: str  # of what is in it, however it was packed


_MNIST_MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
_MNIST = {
    "train-images-idx3-ubyte": _Official(
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": _Official(
        28_881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": _Official(
        1_648_877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": _Official(
        4_542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def load_mnist(*, data_dir: Path, verify: str = "warn", progress: Progress = True) -> Dataset:
    """MNIST: 60,000 and 10,000 handwritten digits, 28 x 28, grey.

    Args:
        data_dir: the files are in, or are downloaded to, its folder `mnist`.
        verify: "warn" or "strict", for files that aren't the official ones.
        progress: see `jaxnets.data.load`.

    Returns:
        The data set, images `[N, 28, 28, 1]`.

    Raises:
        DataError: if a file can't be downloaded, or is damaged.
    """
    check_verify(verify)
    folder = Path(data_dir) / "mnist"
    # File by file: a download that was interrupted goes on with those it hadn't come to.
    for name in _NAMES:
        if _find(folder, name) is None:
            official = _MNIST[name]
            download(
                [f"{mirror}{name}.gz" for mirror in _MNIST_MIRRORS],
                folder / f"{name}.gz",
                size=official.gz_size,
                sha256=official.gz_sha256,
                progress=progress,
            )
    official = {name: file.sha256 for name, file in _MNIST.items()}
    return _load(folder, verify=verify, official=official)


def load_idx_folder(folder: Path, *, verify: str = "warn") -> Dataset:
    """Any set in the form of MNIST: four IDX files in a folder, plain or gzipped.

    Args:
        folder: its name becomes the data set's; its files are called as MNIST's are.
        verify: "strict" refuses, since there is nothing to verify such files by.

    Returns:
        The data set, images `[N, H, W, 1]`; there are as many classes as the largest label says,
        named "0", "1", ...

    Raises:
        DataError: if a file is missing or damaged, or the counts disagree.
    """
    check_verify(verify)
    folder = Path(folder)
    if verify == "strict":
        raise errors.DataError(
            f"{folder}: no official SHA-256 is known for this set, so it can't be verified: "
            "use verify='warn'"
        )
    return _load(folder, verify=verify, official=None)


def is_idx_folder(folder: Path) -> bool:
    """Whether any of the four files is there."""
    return any(_find(folder, name) for name in _NAMES)


def read_idx(path: Path, num_axes: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzipped (told apart by content, not by name).

    Args:
        path: the file.
        num_axes: how many axes it must have.

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        DataError: if it isn't such a file, or not exactly as long as its header says.
    """
    return _read(path, num_axes)[0]


def _read(path: Path, num_axes: int) -> tuple[np.ndarray, str]:
    """The array and the SHA-256 of the file's (unpacked) content."""
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if is_gzip else file
            header, shape, payload = _parse(path, stream, num_axes)
    except (OSError, EOFError, zlib.error) as error:  # gzip's errors are OSErrors
        raise errors.DataError(
            f"{path}: can't be read ({error}): remove it and download it again"
        ) from error
    digest = hashlib.sha256(header)
    digest.update(payload)
    return np.frombuffer(payload, np.uint8).reshape(shape), digest.hexdigest()


def _parse(
    path: Path, file: BinaryIO | gzip.GzipFile, num_axes: int
) -> tuple[bytes, tuple[int, ...], bytearray]:
    header = file.read(4 + 4 * num_axes)
    if not header:
        raise errors.DataError(f"{path}: is empty, expected an IDX file: download it again")
    expected = bytes([0, 0, _UBYTE, num_axes])
    if header[:4] != expected:
        raise errors.DataError(
            f"{path}: starts with {header[:4].hex(' ')}, expected {expected.hex(' ')} "
            f"(an IDX file of unsigned bytes with {num_axes} axes)"
        )
    if len(header) < 4 + 4 * num_axes:
        raise errors.DataError(f"{path}: ends within its header: download it again")
    shape = struct.unpack(f">{num_axes}I", header[4:])
    size = math.prod(shape)
    if size == 0:
        raise errors.DataError(f"{path}: its header says {shape}, so it holds no examples")
    payload = _read_up_to(file, size + 1)
    if len(payload) != size:
        found = f"more than {size:,}" if len(payload) > size else f"{len(payload):,}"
        raise errors.DataError(
            f"{path}: holds {found} bytes after its header, expected {size:,} for {shape}: "
            "download it again"
        )
    return header, shape, payload


def _read_up_to(file: BinaryIO | gzip.GzipFile, limit: int) -> bytearray:
    """At most `limit` bytes, in chunks: a wrong header can't make it allocate what isn't there."""
    content = bytearray()  # an array over it is writable, unlike one over bytes
    while len(content) < limit and (chunk := file.read(min(limit - len(content), _CHUNK_BYTES))):
        content += chunk
    return content


def _find(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _load(folder: Path, *, verify: str, official: dict[str, str] | None) -> Dataset:
    found = {name: _find(folder, name) for name in _NAMES}
    paths = {name: path for name, path in found.items() if path is not None}
    if missing := [name for name in _NAMES if name not in paths]:
        raise errors.DataError(f"{folder}: lacks {', '.join(missing)} (plain or .gz)")
    digests, parts = {}, []
    for images_name, labels_name in (_TRAIN, _TEST):
        image_NHW, digests[images_name] = _read(paths[images_name], 3)
        label, digests[labels_name] = _read(paths[labels_name], 1)
        if len(image_NHW) != len(label):
            raise errors.DataError(
                f"{folder}: {len(image_NHW):,} images in {images_name} and {len(label):,} labels "
                f"in {labels_name}, expected as many"
            )
        parts.append({"image": image_NHW[..., None], "label": label.astype(np.int32)})
    if official is None:
        source = f"{folder} (not verified: no official SHA-256 known)"
    else:
        mend = "remove them to download the official ones"
        place = str(folder)
        source = check_digests(folder.name, place, digests, official, verify=verify, mend=mend)
    train, test = parts
    num_classes = 1 + max(int(part["label"].max()) for part in parts)
    names = tuple(str(label) for label in range(num_classes))
    return Dataset(folder.name, train=train, test=test, class_names=names, source=source)
