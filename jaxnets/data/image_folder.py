"""Images in folders, one folder for each class: `FOLDER/CLASS/IMAGE`, decoded when they are read."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxnets import errors, registry
from jaxnets.data.datasets import Dataset, data_folder, load, refuse_unknown
from jaxnets.data.progress import Progress

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder:
    """A folder of class folders as a source of `image`, uint8 `[H, W, C]`, and `label`, int32 `[]`.

    Classes are numbered in the order of their folders' names, images within a class in the order of
    theirs. Hidden files and files that aren't images by their name are passed over. An image is
    enlarged or reduced until its shorter side fits, and its middle is cut out; its orientation tag is
    not applied.

    Args:
        folder: holds a folder for each class.
        size: height and width in pixels, or one number for both.
        channels: 3 for colour, 1 for grey.
        class_names: those of another part of the same set, so that labels mean the same; by default
            the folders that there are.

    Raises:
        ConfigError: if size or channels can't be.
        DataError: if there is no such folder, it has fewer than two classes, one without images, or
            one that isn't in `class_names`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        size: int | tuple[int, int],
        channels: int = 3,
        class_names: Sequence[str] | None = None,
    ):
        height, width = (size, size) if isinstance(size, int) else size
        if height < 1 or width < 1 or channels not in (1, 3):
            raise errors.ConfigError(
                f"images of {height} x {width} x {channels} can't be; the size is at least 1, the "
                "channels are 1 or 3"
            )
        self.folder = Path(folder)
        self.image_shape = (height, width, channels)
        found = _visible(self.folder, is_folder=True)
        if class_names is None and len(found) < 2:
            raise errors.DataError(
                f"{self.folder}: has {len(found)} class folders, expected two or more "
                "(one folder of images for each class)"
            )
        self.class_names = tuple(found if class_names is None else class_names)
        if strange := sorted(set(found) - set(self.class_names)):
            raise errors.DataError(f"{self.folder}: no such class in the training part: {strange[0]}")
        self._names: list[str] = []
        labels: list[int] = []
        for name in found:
            images = _visible(self.folder / name, is_folder=False)
            images = [image for image in images if image.lower().endswith(_SUFFIXES)]
            if not images:
                raise errors.DataError(f"{self.folder / name}: holds no images ({', '.join(_SUFFIXES)})")
            self._names += [f"{name}/{image}" for image in images]
            labels += [self.class_names.index(name)] * len(images)
        if not self._names:
            raise errors.DataError(f"{self.folder}: holds no images")
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        path = self.folder / self._names[i]
        return {"image": read_image(path, self.image_shape), "label": self._labels[i]}


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image file and bring it to a size.

    Args:
        path: of the file.
        shape: height, width, and 1 or 3 channels.

    Returns:
        uint8, of that shape.

    Raises:
        DataError: if it can't be decoded, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps  # takes a while, and only image folders need it

    height, width, channels = shape
    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise errors.DataError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")
            image.draft(mode, (width, height))  # a JPEG decoder can leave out what would be thrown away
            fitted = ImageOps.fit(image.convert(mode), (width, height), Image.Resampling.BILINEAR)
            return np.asarray(fitted).reshape(shape)
    except errors.DataError:
        raise
    except Exception as error:  # decoders raise all sorts of things at damaged files
        raise errors.DataError(f"{path}: can't be read as an image ({error})") from error


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolders:
    """A set of labelled images on the disk; what `Dataset` is for those in memory.

    Attributes:
        name: of its folder.
        train: a source of images.
        test: the same, of other examples, with the same classes.
    """

    name: str
    train: ImageFolder
    test: ImageFolder

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each label."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return self.train.image_shape

    @property
    def num_train(self) -> int:
        """How many images there are to learn from."""
        return len(self.train)


def open_images(
    name: str,
    *,
    size: int,
    data_dir: str | os.PathLike[str] | None = None,
    verify: str = "warn",
    progress: Progress = True,
) -> Dataset | ImageFolders:
    """A data set of images by its name, in memory or on the disk, whichever it is.

    Args:
        name: what `jaxnets.data.load` takes, or a folder in `data_dir` with `train/CLASS/IMAGE` and
            `test/CLASS/IMAGE`.
        size: height and width in pixels to which images on the disk are brought.
        data_dir: see `jaxnets.data.load`.
        verify: the same; images on the disk have nothing to be verified by.
        progress: the same.

    Raises:
        ConfigError: if there is no such data set.
        DataError: if it is damaged.
    """
    folder = data_folder(data_dir, name) / name
    is_plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name)  # can't lead out of the data folder
    if name in registry.names("dataset") or not is_plain or not (folder / "train").is_dir():
        return load(name, data_dir=data_dir, verify=verify, progress=progress)
    refuse_unknown(folder, verify)
    train = ImageFolder(folder / "train", size=size)
    test = ImageFolder(folder / "test", size=size, class_names=train.class_names)
    return ImageFolders(name, train, test)


def _visible(folder: Path, *, is_folder: bool) -> list[str]:
    """The names in a folder, sorted, of folders or of files, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir() == is_folder
            )
    except OSError as error:
        raise errors.DataError(f"{folder}: can't be read ({error.strerror})") from error
