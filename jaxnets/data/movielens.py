"""MovieLens in its official formats: ml-latest-small, ml-100k and ml-1m.

Harper & Konstan 2015, The MovieLens Datasets: History and Context;
https://grouplens.org/datasets/movielens/.
"""

import csv
import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets import errors
from jaxnets.data.archive import is_as_unpacked, unpack_zip
from jaxnets.data.download import download, locked
from jaxnets.data.progress import Progress
from jaxnets.data.ratings import Ratings

_URL = "https://files.grouplens.org/datasets/movielens/{name}.zip"
_COLUMNS = ("user id", "movie id", "rating", "timestamp")
_TESTS = tuple(f"u{k}.test" for k in range(1, 6))  # of each, the .base of that number is the rest
_LARGEST_ID = 2**53  # up to which float64 has every integer
_MAX_BYTES = 40_000_000  # of a file; the largest, ratings.dat of ml-1m, has 24.6 million
_Titles = Iterator[tuple[int, list[str]]]  # the number of a line and its columns


@dataclasses.dataclass(frozen=True)
class _Format:
    """How an edition is laid out.

    Attributes:
        size: of the official archive, in bytes.
        num_ratings: of the official edition.
        sha256: of the archive. GroupLens publishes the MD5 of ml-100k
            (0e33842e24a9c977be4e0107933c0723) and of ml-1m (c4d9eecfca2ab87c1945afe126590906), and none
            of ml-latest-small; these digests are of the archives with those, as TensorFlow Datasets pins
            all three with their sizes.
        ratings: the file of ratings.
        movies: the file of titles.
        separator: between the columns of ratings.
        header: the first line of the ratings, if there is one.
        titles: reads the file of titles.
        others: files that are read beside these.
    """

    size: int
    num_ratings: int
    sha256: str
    ratings: str
    movies: str
    separator: str
    header: str
    titles: Callable[[Path], _Titles]
    others: tuple[str, ...] = ()


def load_movielens(
    name: str, *, data_dir: Path, verify: str = "warn", progress: Progress = True
) -> Ratings:
    """An edition of MovieLens.

    Args:
        name: ml-latest-small, ml-100k or ml-1m.
        data_dir: the files are in `data_dir/movielens/NAME`; if that folder is absent, the archive is
            downloaded (1 to 6 MB) and unpacked to it.
        verify: "strict" refuses a folder that isn't as it was unpacked from the archive, whose digest
            alone is known; "warn" warns of one with another number of ratings.
        progress: of a download.

    Returns:
        the ratings; of ml-100k with the folds u1 to u5.

    Raises:
        DataError: if it can't be downloaded, files are missing, or a line is wrong: another number of
            columns, a rating that is missing, no number or not from 0.5 to 5, a pair of user and movie
            that comes twice (with both lines), a movie without a title.
    """
    form = FORMATS[name]
    folder = Path(data_dir) / "movielens" / name
    is_verified = (not folder.is_dir() and _obtain(name, form, folder, progress)) or (
        verify == "strict" and is_as_unpacked(folder)
    )
    if verify == "strict" and not is_verified:
        raise errors.DataError(
            f"{folder}: isn't as the archive was unpacked, whose digest alone is known: remove the "
            "folder, and the archive is downloaded and checked, or use verify='warn'"
        )
    wanted = (form.ratings, form.movies, *form.others)
    if missing := [file for file in wanted if not (folder / file).is_file()]:
        raise errors.DataError(
            f"{folder}: lacks {', '.join(missing)}: remove the folder and it is downloaded again"
        )
    path = folder / form.ratings
    columns = _read_ratings(path, form)
    user_ids, user = np.unique(columns[0].astype(np.int64), return_inverse=True)
    item_ids, item = np.unique(columns[1].astype(np.int64), return_inverse=True)
    check_pairs(path, user, item, (user_ids, item_ids))
    titles = _titles_of(item_ids, item, path, folder / form.movies, form)
    source = "official archive, SHA-256 verified" if is_verified else "unpacked files"
    if not is_verified and len(user) != form.num_ratings:
        source = f"NOT the official edition: {len(user):,} ratings in place of {form.num_ratings:,}"
        warnings.warn(f"{path}: {source}: used as they are", UserWarning, stacklevel=4)
    return Ratings(
        name=name,
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        rating=columns[2].astype(np.float32),
        time=columns[3].astype(np.int64),
        user_ids=user_ids,
        item_ids=item_ids,
        titles=titles,
        source=f"{folder} ({source})",
        fold=_read_folds(folder, form, columns) if form.others else None,
    )


def _obtain(name: str, form: _Format, folder: Path, progress: Progress) -> bool:
    archive = folder.with_name(f"{name}.zip")
    members = {f"{name}/{file}": _MAX_BYTES for file in (form.ratings, form.movies, *form.others)}
    members[f"{name}/{'README' if name != 'ml-latest-small' else 'README.txt'}"] = _MAX_BYTES
    with locked(folder.with_name(f"{name}-download")):
        if folder.is_dir():
            return False
        was_there = archive.exists()  # put there by hand: not ours to remove
        url = _URL.format(name=name)
        download(url, archive, size=form.size, sha256=form.sha256, progress=progress)
        unpack_zip(archive, folder, members=members)
        if not was_there:
            archive.unlink()
    return True


def _read_ratings(path: Path, form: _Format) -> np.ndarray:
    """The four columns `[4, N]` in float64, all of them checked."""
    content = path.read_bytes()
    skipped = 0
    if form.header:
        found = content.split(b"\n", 1)[0].strip()
        if found != form.header.encode():
            shown = found[:60].decode("ascii", errors="replace")
            raise errors.DataError(f"{path}: line 1 is {shown!r}, expected {form.header!r}")
        skipped = 1
    body = content.split(b"\n", skipped)[-1] if b"\n" in content or not skipped else b""
    if not body.strip():
        raise errors.DataError(f"{path}: has no ratings")
    one = "\t" if form.separator == "::" else form.separator  # NumPy splits at one character
    text = body.replace(form.separator.encode(), one.encode())
    try:
        table_NC = np.loadtxt(io.BytesIO(text), delimiter=one, comments=None, ndmin=2)
        if table_NC.shape[1] != len(_COLUMNS):
            raise ValueError(f"{table_NC.shape[1]} columns")
    except ValueError as error:
        raise _fault(path, body, form.separator, skipped, error) from error
    is_whole = np.floor(table_NC) == table_NC
    is_id = is_whole & (table_NC >= 0) & (table_NC < _LARGEST_ID)
    is_right = np.stack(
        [is_id[:, 0], is_id[:, 1], (table_NC[:, 2] >= 0.5) & (table_NC[:, 2] <= 5), is_id[:, 3]], axis=1
    )
    if not is_right.all():
        row, column = np.argwhere(~is_right)[0]
        what = "expected 0.5 to 5" if column == 2 else "expected a whole number of at least 0"
        raise errors.DataError(
            f"{path}: line {_line(path, row, skipped)}: the {_COLUMNS[column]} is "
            f"{table_NC[row, column]:g}, {what}"
        )
    return np.ascontiguousarray(table_NC.T)


def _fault(path: Path, body: bytes, separator: str, skipped: int, error: ValueError) -> errors.DataError:
    """The first line that can't be read, now that there is one."""
    for number, line in enumerate(body.split(b"\n"), start=1 + skipped):
        words = line.decode("ascii", errors="replace").rstrip("\r").split(separator)
        if words == [""]:
            continue
        where = f"{path}: line {number}"
        if len(words) != len(_COLUMNS):
            return errors.DataError(
                f"{where}: has {len(words)} columns, expected {len(_COLUMNS)} ({', '.join(_COLUMNS)})"
            )
        for name, word in zip(_COLUMNS, words, strict=True):
            if not word.strip():
                return errors.DataError(f"{where}: the {name} is missing")
            try:
                float(word)
            except ValueError:
                return errors.DataError(f"{where}: the {name} is {word[:40]!r}, which is no number")
    return errors.DataError(f"{path}: can't be read: {errors.first_line(error)}")


def check_pairs(
    path: Path, user: np.ndarray, item: np.ndarray, ids: tuple[np.ndarray, np.ndarray]
) -> None:
    """Refuse a pair of user and movie that is rated twice: nobody knows which rating counts.

    Args:
        path: of the ratings.
        user: int `[N]`.
        item: int `[N]`.
        ids: of users and items in the file.

    Raises:
        DataError: for the first one, with both lines.
    """
    pair = user.astype(np.int64) * len(ids[1]) + item
    sorted_ = np.argsort(pair, kind="stable")
    is_again = pair[sorted_][1:] == pair[sorted_][:-1]
    if not is_again.any():
        return
    again, before = sorted_[1:][is_again], sorted_[:-1][is_again]
    k = int(np.argmin(again))
    form = next(form for form in FORMATS.values() if path.name in (form.ratings, *form.others))
    lines = [_line(path, int(row), int(bool(form.header))) for row in (before[k], again[k])]
    raise errors.DataError(
        f"{path}: lines {lines[0]} and {lines[1]} both rate movie {ids[1][item[again[k]]]} by user "
        f"{ids[0][user[again[k]]]}: remove one of them"
    )


def _line(path: Path, row: int, skipped: int) -> int:
    """The number of the line that holds a row: empty lines hold none."""
    lines = path.read_bytes().split(b"\n")
    held = [number for number, line in enumerate(lines, start=1) if line.strip(b"\r")]
    return held[row + skipped]


def _read_folds(folder: Path, form: _Format, columns: np.ndarray) -> np.ndarray:
    """Which of u1.test to u5.test each rating of u.data is in."""
    width = int(columns[1].max()) + 1

    def key(part: np.ndarray) -> np.ndarray:
        is_known = part[1] < width
        return np.where(is_known, part[0].astype(np.int64) * width + part[1].astype(np.int64), -1)

    pair = key(columns)
    sorted_ = np.argsort(pair)
    fold = np.full(len(pair), -1, np.int8)
    for k, name in enumerate(form.others):
        path = folder / name
        part = _read_ratings(path, form)
        found = key(part)
        place = sorted_[np.minimum(np.searchsorted(pair, found, sorter=sorted_), len(pair) - 1)]
        is_wrong = (pair[place] != found) | (columns[2][place] != part[2])
        if is_wrong.any():
            number = _line(path, int(np.argmax(is_wrong)), 0)
            raise errors.DataError(f"{path}: line {number} is no rating of {folder / form.ratings}")
        if (is_again := fold[place] >= 0).any():
            row = int(np.argmax(is_again))
            raise errors.DataError(
                f"{path}: line {_line(path, row, 0)} is in {form.others[fold[place[row]]]}, too"
            )
        fold[place] = k
    if (fold < 0).any():
        path = folder / form.ratings
        number = _line(path, int(np.argmax(fold < 0)), 0)
        raise errors.DataError(f"{path}: line {number} is in none of {', '.join(form.others)}")
    return fold


def _titles_of(
    item_ids: np.ndarray, item: np.ndarray, ratings: Path, movies: Path, form: _Format
) -> tuple[str, ...]:
    """The title of every item that is rated."""
    titles, lines = {}, {}
    for number, words in form.titles(movies):
        where = f"{movies}: line {number}"
        if not words[0].strip().isdecimal():
            raise errors.DataError(f"{where}: the movie id is {words[0][:40]!r}, which is no number")
        if len(words[0].strip()) > 18:
            raise errors.DataError(f"{where}: the movie id has {len(words[0].strip()):,} digits")
        movie = int(words[0])
        if not words[1].strip():
            raise errors.DataError(f"{where}: movie {movie} has no title")
        if movie in lines:
            raise errors.DataError(f"{movies}: lines {lines[movie]} and {number} are both movie {movie}")
        titles[movie], lines[movie] = words[1].strip(), number
    if lost := [i for i, movie in enumerate(item_ids.tolist()) if movie not in titles]:
        row = int(np.argmax(np.isin(item, lost)))
        raise errors.DataError(
            f"{ratings}: line {_line(ratings, row, int(bool(form.header)))}: movie "
            f"{item_ids[item[row]]} has no title in {movies}"
        )
    return tuple(titles[movie] for movie in item_ids.tolist())


def _quoted(path: Path) -> _Titles:
    """movies.csv: UTF-8, with a header, titles that hold commas in quotes."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise errors.DataError(f"{path}: line {number} is not UTF-8 ({error.reason})") from None
    rows = csv.reader(io.StringIO(text, newline=""))
    for words in _checked(path, rows):
        if rows.line_num == 1 or not words:
            continue
        if len(words) != 3:
            raise _columns(path, rows.line_num, words, 3)
        yield rows.line_num, words


def _checked(path: Path, rows: Any) -> Iterator[list[str]]:
    """The rows of a CSV file."""
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise errors.DataError(f"{path}: line {rows.line_num}: {error}") from None


def _separated(separator: str, num_columns: int) -> Callable[[Path], _Titles]:
    """u.item and movies.dat: Latin-1, without a header."""

    def read(path: Path) -> _Titles:
        for number, line in enumerate(path.read_bytes().decode("latin-1").split("\n"), start=1):
            words = line.rstrip("\r").split(separator)
            if words == [""]:
                continue
            if len(words) != num_columns:
                raise _columns(path, number, words, num_columns)
            yield number, words

    return read


def _columns(path: Path, number: int, words: list[str], expected: int) -> errors.DataError:
    return errors.DataError(f"{path}: line {number}: has {len(words)} columns, expected {expected}")


FORMATS = {
    "ml-latest-small": _Format(
        size=978_202,
        num_ratings=100_836,
        sha256="696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
        ratings="ratings.csv",
        movies="movies.csv",
        separator=",",
        header="userId,movieId,rating,timestamp",
        titles=_quoted,
    ),
    "ml-100k": _Format(
        size=4_924_029,
        num_ratings=100_000,
        sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        ratings="u.data",
        movies="u.item",
        separator="\t",
        header="",
        titles=_separated("|", 24),
        others=_TESTS,
    ),
    "ml-1m": _Format(
        size=5_917_549,
        num_ratings=1_000_209,
        sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        ratings="ratings.dat",
        movies="movies.dat",
        separator="::",
        header="",
        titles=_separated("::", 3),
    ),
}


def load_latest_small(**kwargs) -> Ratings:
    """ml-latest-small, 100,836 ratings; arguments as of `load_movielens`."""
    return load_movielens("ml-latest-small", **kwargs)


def load_100k(**kwargs) -> Ratings:
    """ml-100k, 100,000 ratings; arguments as of `load_movielens`."""
    return load_movielens("ml-100k", **kwargs)


def load_1m(**kwargs) -> Ratings:
    """ml-1m, 1,000,209 ratings; arguments as of `load_movielens`."""
    return load_movielens("ml-1m", **kwargs)
