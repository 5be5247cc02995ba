"""Data sets by name: what every loader returns, and how a name finds its loader."""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxnets import errors, registry
from jaxnets.data.progress import Progress
from jaxnets.remote import as_path, is_remote


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, all of them in memory.

    Args:
        name: the name it was loaded by.
        train: `image`, uint8 `[N, H, W, C]`, and `label`, int32 `[N]`.
        test: the same, of other examples.
        class_names: one for each label.
        source: where it came from and whether its bytes were verified, for the log.

    Raises:
        DataError: if shapes, types or labels don't fit together.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        for part, arrays in (("train", self.train), ("test", self.test)):
            what = f"{self.name}, {part}"
            if sorted(arrays) != ["image", "label"]:
                raise errors.DataError(f"{what}: has {sorted(arrays)}, expected image and label")
            image, label = arrays["image"], arrays["label"]
            if image.ndim != 4 or image.dtype != np.uint8:
                raise errors.DataError(
                    f"{what}: images are {image.dtype} {image.shape}, expected uint8 [N, H, W, C]"
                )
            if label.shape != image.shape[:1] or label.dtype != np.int32:
                raise errors.DataError(
                    f"{what}: labels are {label.dtype} {label.shape}, expected int32 "
                    f"({image.shape[0]},), one for each image"
                )
            if image.shape[0] == 0:
                raise errors.DataError(f"{what}: no examples")
            if label.min() < 0 or label.max() >= self.num_classes:
                raise errors.DataError(
                    f"{what}: labels reach from {label.min()} to {label.max()}, "
                    f"expected 0..{self.num_classes - 1}"
                )
        train_HWC, test_HWC = self.train["image"].shape[1:], self.test["image"].shape[1:]
        if train_HWC != test_HWC:
            raise errors.DataError(
                f"{self.name}: train images are {train_HWC} and test images {test_HWC}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return self.train["image"].shape[1:]

    @property
    def num_train(self) -> int:
        """How many images there are to learn from."""
        return len(self.train["image"])


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    verify: str = "warn",
    progress: Progress = True,
) -> Dataset:
    """Load a data set, downloading it first if it isn't there.

    Args:
        name: a registered data set, or the name of a folder in `data_dir` with the four IDX files
            of MNIST's form (train-images-idx3-ubyte and so on, plain or .gz).
        data_dir: each set lies in `data_dir/name`; default $JAXNETS_DATA, else
            ~/.cache/jaxnets/data. Of gs://bucket/path/name a copy is made in ~/.cache/jaxnets/remote.
        verify: what to do with files whose SHA-256 isn't the official one: "warn" and use them,
            or "strict", refuse them. Downloads are always checked.
        progress: of a download: True shows it on stderr, False doesn't, a function is called
            with (bytes done, bytes in all).

    Returns:
        The data set.

    Raises:
        ConfigError: if there is no such data set or mode.
        DataError: if it can't be downloaded, or is damaged.
    """
    check_verify(verify)
    folder = data_folder(data_dir, name)
    registered = registry.names("dataset")
    try:
        if name in registered:
            loader = registry.get("dataset", name)
            return loader(data_dir=folder, verify=verify, progress=progress)
        return _load_folder(name, folder, registered, verify)
    except OSError as error:  # whatever a loader doesn't explain better itself
        place = error.filename or folder
        raise errors.DataError(f"{name}: can't read {place}: {error.strerror or error}") from error


def data_folder(data_dir: str | os.PathLike[str] | None = None, name: str = "") -> Path:
    """The folder that holds the data sets, whether or not it exists yet.

    Args:
        data_dir: see `load`.
        name: the data set that is to be read; of an object store a copy of it is made first.

    Raises:
        DataError: if something there isn't a folder, or can't be read.
    """
    given = data_dir or os.environ.get("JAXNETS_DATA") or "~/.cache/jaxnets/data"
    folder = as_path(given).expanduser()
    if is_remote(folder):
        from jaxnets.data.mirror import mirrored  # needs this module, and only stores need it

        return mirrored(folder, name)
    try:
        is_other = folder.exists() and not folder.is_dir()
    except OSError as error:
        raise errors.DataError(f"can't read {folder}: {error.strerror}") from error
    if is_other:
        raise errors.DataError(
            f"the data folder {folder} is a file: give another with --data-dir or JAXNETS_DATA"
        )
    return folder


def refuse_unknown(path: Path, verify: str) -> None:
    """Refuse to verify strictly what is somebody's own, with no digest to verify it by.

    Raises:
        DataError: if it should be.
    """
    if verify == "strict":
        raise errors.DataError(f"{path}: nothing is known to verify it by: use verify='warn'")


def check_verify(verify: str) -> None:
    """Refuse a mode of verification that isn't there.

    Raises:
        ConfigError: if it is neither "warn" nor "strict".
    """
    if verify not in ("warn", "strict"):
        raise errors.unknown("verify mode", str(verify), ("warn", "strict"))


def check_digests(
    name: str,
    place: str,
    found: Mapping[str, str],
    official: Mapping[str, str],
    *,
    verify: str,
    mend: str,
) -> str:
    """Compare SHA-256 digests with the official ones.

    Args:
        name: the data set.
        place: where its files are, for the message.
        found: hexadecimal digest by file.
        official: the same, as published; every file of `found` is in it.
        verify: "warn" or "strict".
        mend: how to get the official ones, for the message.

    Returns:
        The `source` of the data set: the place and the outcome.

    Raises:
        DataError: if a digest differs and `verify` is "strict".
    """
    check_verify(verify)
    differ = [file for file, digest in found.items() if digest != official[file]]
    if not differ:
        return f"{place} (official files, SHA-256 verified)"
    what = (
        f"{name}: not the official SHA-256 for {len(differ)} of {len(found)} files in {place} "
        f"({', '.join(differ)})"
    )
    if verify == "strict":
        raise errors.DataError(f"{what}: {mend}, or use verify='warn'")
    warnings.warn(f"{what}: used as they are", UserWarning, stacklevel=4)
    return f"{place} (NOT verified: {len(differ)} of {len(found)} files aren't the official ones)"


def _load_folder(name: str, folder: Path, registered: list[str], verify: str) -> Dataset:
    from jaxnets.data import idx  # here, because idx needs Dataset

    # The name becomes a path: one plain component, so that it can't lead out of the data folder.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        path = Path(name).absolute()
        advice = "letters, digits, '.', '_' and '-' only"
        if "/" in name and path.is_dir():
            advice = f"for that folder say --data-dir {path.parent} --dataset {path.name}"
        raise errors.ConfigError(f"{name!r} is no name of a data set: {advice}")
    if idx.is_idx_folder(folder / name):
        return idx.load_idx_folder(folder / name, verify=verify)
    beside = folder.iterdir() if folder.is_dir() else ()
    others = [path.name for path in beside if idx.is_idx_folder(path) or (path / "train").is_dir()]
    if name in others:
        raise errors.ConfigError(f"{name} is a folder of image files: use data.open_images")
    raise errors.unknown("dataset", name, {*registered, *others})
