"""Film reviews of IMDB and whether they are for or against the film.

Maas et al. 2011, Learning Word Vectors for Sentiment Analysis;
https://ai.stanford.edu/~amaas/data/sentiment/.
"""

import re
from pathlib import Path

from jaxnets import errors
from jaxnets.data.archive import is_as_unpacked, unpack_tar
from jaxnets.data.datasets import check_verify
from jaxnets.data.download import download, locked
from jaxnets.data.progress import Progress
from jaxnets.data.texts import Texts, read_text_folders

_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
_ARCHIVE_SIZE = 84_125_825
# The authors publish none; this is the one that TensorFlow Datasets pins.
_ARCHIVE_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
_FOLDER = "aclImdb"
_CLASSES = ("neg", "pos")
_NUM_EACH = 12_500  # reviews of each class in each part
_MOST_BYTES = 100_000  # of a review; the longest has 13,704


def load_imdb(
    *,
    data_dir: Path,
    verify: str = "warn",
    progress: Progress = True,
    num_each: int = _NUM_EACH,
) -> Texts:
    """IMDB reviews: 25,000 and 25,000, half of each "neg" and half "pos".

    Args:
        data_dir: the files are in `data_dir/imdb/aclImdb`; if that folder is absent, the archive is
            downloaded (84 MB) and its labelled part unpacked there.
        verify: "strict" refuses a folder that isn't as it was unpacked from the archive, whose digest
            alone is known.
        progress: see `jaxnets.data.load`.
        num_each: reviews that there must be of each class in each part.

    Raises:
        DataError: if it can't be downloaded, or files are missing, empty or not UTF-8.
    """
    check_verify(verify)
    folder = Path(data_dir) / "imdb" / _FOLDER
    if not folder.is_dir():
        _obtain(folder, progress)
    elif verify == "strict" and not is_as_unpacked(folder):
        raise errors.DataError(
            f"{folder}: isn't as the archive was unpacked, whose digest alone is known: remove the "
            "folder and it is downloaded"
        )
    texts = read_text_folders("imdb", folder, _CLASSES)
    for part, label in (("train", texts.train_label), ("test", texts.test_label)):
        for i, name in enumerate(_CLASSES):
            if (found := int((label == i).sum())) != num_each:
                raise errors.DataError(
                    f"{folder / part / name}: has {found:,} reviews, expected {num_each:,}: remove "
                    f"{folder} and it is downloaded again"
                )
    return texts


def _obtain(folder: Path, progress: Progress) -> None:
    archive = folder.with_name("aclImdb_v1.tar.gz")
    wanted = re.compile(rf"{_FOLDER}/(train|test)/({'|'.join(_CLASSES)})/\d+_\d+\.txt")
    # One lock over both steps: a second process must not find the archive gone and fetch it anew.
    with locked(archive.with_name("imdb")):
        if folder.is_dir():
            return
        was_there = archive.exists()  # put there by hand: not ours to remove
        download(_URL, archive, size=_ARCHIVE_SIZE, sha256=_ARCHIVE_SHA256, progress=progress)
        unpack_tar(archive, folder, members=lambda name: _MOST_BYTES if wanted.fullmatch(name) else None)
        if not was_there:
            archive.unlink()
