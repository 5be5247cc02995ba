"""Sentences in two languages: two text files, of which line i of one translates line i of the other.

A corpus is a folder with `train`, `val` and `test` of each language, such as `train.de` and `train.en`,
plain or as `.gz`, in UTF-8.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxnets import errors
from jaxnets.data.datasets import check_verify, data_folder, refuse_unknown
from jaxnets.data.lines import read_lines
from jaxnets.data.progress import Progress

PARTS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sentences and their translations.

    Attributes:
        source: M sentences.
        target: the translation of each.
        places: where each side's first line is, as (file, line), for messages; "" where it is made.
    """

    source: Sequence[str]
    target: Sequence[str]
    places: tuple[str, str] = ("", "")

    def __len__(self) -> int:
        return len(self.source)


@dataclasses.dataclass(frozen=True)
class ParallelCorpus:
    """Sentences in two languages.

    Attributes:
        name: of the corpus.
        parts: to learn from, to choose by, and to test on: "train", "val" and "test".
        source: where it came from and whether its bytes were verified, for the log.
    """

    name: str
    parts: Mapping[str, Pairs]
    source: str


def load_parallel(
    name: str,
    *,
    source: str,
    target: str,
    data_dir: str | os.PathLike[str] | None = None,
    verify: str = "warn",
    progress: Progress = True,
) -> ParallelCorpus:
    """A corpus by name.

    Args:
        name: "phrases", which is made here and needs no file; "multi30k"; or a folder in the data
            folder.
        source: the ending of the files of what is translated, such as "de".
        target: that of the translations.
        data_dir: see `jaxnets.data.load`.
        verify: "warn" or "strict", for files of Multi30k that aren't the official ones.
        progress: of a download, see `jaxnets.data.load`.

    Raises:
        ConfigError: if there is no such corpus.
        DataError: if a file is missing or damaged.
    """
    check_verify(verify)
    if source == target:
        raise errors.ConfigError(f"source and target are both {source!r}: nothing to translate")
    if name == "phrases":
        from jaxnets.data.phrases import load_phrases

        return load_phrases(source=source, target=target)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise errors.ConfigError(f"{name!r} is no name of a folder in the data folder")
    root = data_folder(data_dir, name)
    if name == "multi30k":
        from jaxnets.data.multi30k import load_multi30k

        return load_multi30k(
            source=source, target=target, data_dir=root, verify=verify, progress=progress
        )
    folder = root / name
    if not folder.is_dir():
        raise errors.unknown("corpus", name, ("phrases", "multi30k"), advice=f"{folder} is no folder")
    refuse_unknown(folder, verify)
    parts = {
        part: read_pairs(*(find(folder, f"{part}.{x}") for x in (source, target))) for part in PARTS
    }
    return ParallelCorpus(name, parts, f"{folder} (not an official set)")


def find(folder: Path, name: str) -> Path:
    """A file, plain or packed.

    Raises:
        DataError: if it isn't there.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise errors.DataError(f"{folder} has neither {name} nor {name}.gz")


def read_pairs(source: Path, target: Path) -> Pairs:
    """Two text files as pairs of sentences.

    Args:
        source: one sentence a line.
        target: the translation of each, as many.

    Raises:
        DataError: if a line isn't UTF-8 or is empty, or one file has more lines than the other.
    """
    sides = [read_sentences(path) for path in (source, target)]
    counts = [len(side) for side in sides]
    if counts[0] != counts[1]:
        raise errors.DataError(
            f"{source} has {counts[0]:,} lines and {target} has {counts[1]:,}: line i of one must be "
            f"the translation of line i of the other; there is no pair from line {min(counts) + 1:,} on"
        )
    if not counts[0]:
        raise errors.DataError(f"{source}: no sentences")
    return Pairs(*sides, places=(str(source), str(target)))


def read_sentences(path: Path) -> list[str]:
    """The lines of a text file, without blanks at their ends.

    Args:
        path: plain, or packed if it ends in .gz.

    Raises:
        DataError: if it can't be read, or a line isn't UTF-8 or is empty.
    """
    sentences = [line.strip() for line in read_lines(path)]
    for number, text in enumerate(sentences, 1):
        if not text:
            raise errors.DataError(f"{path}, line {number:,}: empty")
    return sentences
