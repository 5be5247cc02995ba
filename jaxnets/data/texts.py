"""Labelled texts: what every loader of them returns, folders of text files, and some made ones."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets import errors, registry
from jaxnets.data.datasets import check_verify, data_folder, refuse_unknown
from jaxnets.data.progress import Progress

_READERS = 8  # threads: files on a disk are waited for


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Labelled texts, all of them in memory.

    Args:
        name: the name it was loaded by.
        train: N texts to learn from.
        train_label: int32 `[N]`, their classes.
        test: M other texts.
        test_label: int32 `[M]`.
        class_names: one for each label.
        source: where it came from, for the log.

    Raises:
        DataError: if numbers or labels don't fit together.
    """

    name: str
    train: Sequence[str]
    train_label: np.ndarray
    test: Sequence[str]
    test_label: np.ndarray
    class_names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        parts = (("train", self.train, self.train_label), ("test", self.test, self.test_label))
        for part, texts, label in parts:
            what = f"{self.name}, {part}"
            if not texts or label.shape != (len(texts),) or label.dtype != np.int32:
                raise errors.DataError(
                    f"{what}: {len(texts)} texts and labels {label.dtype} {label.shape}"
                )
            if label.min() < 0 or label.max() >= len(self.class_names):
                raise errors.DataError(f"{what}: labels beyond the {len(self.class_names)} classes")


def load_texts(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    verify: str = "warn",
    progress: Progress = True,
) -> Texts:
    """Load labelled texts, downloading them first if they aren't there.

    Args:
        name: a registered set, or a folder in `data_dir` of `train/CLASS/*.txt` and `test/CLASS/*.txt`.
        data_dir: as of `jaxnets.data.load`.
        verify: the same.
        progress: the same.

    Raises:
        ConfigError: if there is no such set.
        DataError: if it can't be downloaded, or is damaged.
    """
    check_verify(verify)
    folder = data_folder(data_dir, name)
    known = registry.names("text_dataset")
    if name in known:
        loader = registry.get("text_dataset", name)
        return loader(data_dir=folder, verify=verify, progress=progress)
    beside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [other for other in beside if _is_text_folder(folder / other)]
    if name not in others:
        raise errors.unknown("text data set", name, {*known, *others})
    refuse_unknown(folder / name, verify)
    return read_text_folders(name, folder / name)


def read_text_folders(name: str, folder: Path, class_names: Sequence[str] | None = None) -> Texts:
    """Read `train/CLASS/*.txt` and `test/CLASS/*.txt`, one text in each file, UTF-8.

    Args:
        name: of the set.
        folder: holds both.
        class_names: of the folders, in the order of the labels; by default those there are, sorted.

    Raises:
        DataError: if a folder isn't there or is empty, or a file is empty or not UTF-8, naming it.
    """
    train = folder / "train"
    names = class_names or sorted(p.name for p in _listed(train) if p.is_dir() and p.name[0] != ".")
    if len(names) < 2:
        raise errors.DataError(f"{train}: has {len(names)} class folders, expected two or more")
    parts = [_read_part(folder / part, names) for part in ("train", "test")]
    tested = {p.name for p in _listed(folder / "test") if p.is_dir() and p.name[0] != "."}
    if class_names is None and (unknown := sorted(tested.difference(names))):
        raise errors.DataError(
            f"{folder / 'test'}: nothing to learn {', '.join(unknown)} from in {train}"
        )
    return Texts(name, *parts[0], *parts[1], tuple(names), str(folder))


def _read_part(folder: Path, names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    texts, labels = [], []
    with ThreadPoolExecutor(_READERS) as pool:
        for label, name in enumerate(names):
            paths = sorted(
                path
                for path in _listed(folder / name)
                if path.suffix.lower() == ".txt" and not path.name.startswith(".")
            )
            if not paths:
                raise errors.DataError(f"{folder / name}: holds no .txt files")
            texts += pool.map(read_text, paths)
            labels += [label] * len(paths)
    return texts, np.array(labels, np.int32)


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        DataError: if it can't be read, isn't UTF-8, or has nothing in it.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise errors.DataError(f"{path}: line {line} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise errors.DataError(f"{path}: can't be read: {error.strerror or error}") from None
    if not text.strip():
        raise errors.DataError(f"{path}: there is no text in it")
    return text


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise errors.DataError(f"{folder}: can't be read: {error.strerror or error}") from None


def _is_text_folder(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in ("train", "test"))


_GOOD = [
    "wonderful",
    "moving",
    "funny",
    "clever",
    "gripping",
    "charming",
    "brilliant",
    "honest",
    "lively",
    "memorable",
]
_BAD = [
    "dull",
    "tedious",
    "clumsy",
    "shallow",
    "pointless",
    "noisy",
    "predictable",
    "wooden",
    "dreary",
    "confused",
]
_PARTS = ["plot", "cast", "music", "script", "ending", "camera", "dialogue", "pace", "lead", "editing"]
_FRAMES = (
    "the {part} is {word}",
    "i found the {part} {word}",
    "what a {word} {part}",
    "not a {other} {part} at all",
    "the {part} was never {other}",
)


def load_made_reviews(
    *, data_dir: Path | None = None, verify: str = "warn", progress: Progress = True
) -> Texts:
    """Made reviews: 2,000 and 500 texts of phrases with praise or blame, some of them denied.

    One in seven phrases of a review, about, is of the other opinion.

    Args:
        data_dir: not used; there for the sake of one signature.
        verify: not used, but checked.
        progress: not used.
    """
    del data_dir, progress
    check_verify(verify)
    rng = np.random.default_rng(0)

    def review(label: int) -> str:
        phrases = []
        for _ in range(rng.integers(3, 16)):
            is_good = bool(label) == (rng.random() >= 0.15)
            words = (_GOOD, _BAD) if is_good else (_BAD, _GOOD)
            word, other = (group[rng.integers(len(group))] for group in words)
            frame = _FRAMES[rng.integers(len(_FRAMES))]
            phrases.append(frame.format(part=_PARTS[rng.integers(len(_PARTS))], word=word, other=other))
        return ". ".join(phrases) + "."

    parts: list[Any] = []
    for count in (2000, 500):
        label = rng.permutation(np.arange(count, dtype=np.int32) % 2)
        parts += [[review(int(x)) for x in label], label]
    train, train_label, test, test_label = parts
    return Texts("made_reviews", train, train_label, test, test_label, ("neg", "pos"), "generated")


def load_random_texts(
    *, data_dir: Path | None = None, verify: str = "warn", progress: Progress = True
) -> Texts:
    """Random texts: 4,000 and 1,000 of 200 words each, of 20,000 words, for measuring speed.

    Args:
        data_dir: not used; there for the sake of one signature.
        verify: not used, but checked.
        progress: not used.
    """
    del data_dir, progress
    check_verify(verify)
    rng = np.random.default_rng(0)
    parts: list[Any] = []
    for count in (4000, 1000):
        numbers = rng.integers(0, 20_000, (count, 200))
        parts += [[" ".join(f"w{n}" for n in row) for row in numbers]]
        parts += [rng.integers(0, 2, count, dtype=np.int32)]
    train, train_label, test, test_label = parts
    return Texts("random_texts", train, train_label, test, test_label, ("neg", "pos"), "generated")
