"""The official formats of MovieLens, what is said of damaged files, and the splits."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import errors
from jaxnets.data import load_ratings, movielens, ratings
from jaxnets.data.generated_ratings import generate_ratings
from jaxnets.data.movielens import FORMATS

# Of the small tables below, which stand for whole editions.
pytestmark = pytest.mark.filterwarnings("ignore:.*NOT the official edition")
NUM_RATINGS = {"ml-latest-small": "100,836", "ml-100k": "100,000", "ml-1m": "1,000,209"}

# user id, movie id, stars, time: ids with gaps, not in order.
TABLE = [
    (7, 10, 4.0, 400), (2, 30, 0.5, 100), (7, 30, 5.0, 300), (2, 20, 3.5, 200), (9, 10, 1.0, 50),
    (9, 20, 2.0, 60), (2, 10, 3.0, 70), (9, 30, 4.0, 80), (7, 20, 2.0, 90), (11, 10, 5.0, 95),
]  # fmt: skip
TITLES = {10: "Café, The (1995)", 20: 'He said "no" (1990)', 30: "M (1931)", 40: "Not rated (2000)"}
ITEM = "|01-Jan-1995||http://example.org" + "|0" * 19


def write(folder, name, *, table=TABLE, titles=TITLES):
    folder = folder / "movielens" / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == "ml-latest-small":
        rows = [f"{u},{i},{r},{t}" for u, i, r, t in table]
        text = "\n".join(["userId,movieId,rating,timestamp", *rows]) + "\n"
        (folder / "ratings.csv").write_text(text)
        quoted = {i: f'"{title}"' for i, title in ((i, t.replace('"', '""')) for i, t in titles.items())}
        lines = ["movieId,title,genres", *(f"{i},{title},Drama" for i, title in quoted.items())]
        (folder / "movies.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif name == "ml-100k":
        rows = [f"{u}\t{i}\t{r:g}\t{t}" for u, i, r, t in table]
        (folder / "u.data").write_text("\n".join(rows) + "\n")
        text = "".join(f"{i}|{title}{ITEM}\n" for i, title in titles.items())
        (folder / "u.item").write_bytes(text.encode("latin-1"))
        for k in range(5):
            (folder / f"u{k + 1}.test").write_text("\n".join(rows[k::5]) + "\n")
    else:
        text = "".join(f"{u}::{i}::{r:g}::{t}\n" for u, i, r, t in table)
        (folder / "ratings.dat").write_text(text)
        text = "".join(f"{i}::{title}::Drama|War\n" for i, title in titles.items())
        (folder / "movies.dat").write_bytes(text.encode("latin-1"))
    return folder


def replace_line(path, number, line):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line.encode() if isinstance(line, str) else line
    path.write_bytes(b"\n".join(lines))


def refusal(folder, name):
    with pytest.raises(errors.DataError) as error:
        load_ratings(name, data_dir=folder)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_is_read(tmp_path, name):
    folder = write(tmp_path, name)
    data = load_ratings(name, data_dir=tmp_path)
    assert data.user_ids.tolist() == [2, 7, 9, 11]
    assert data.item_ids.tolist() == [10, 20, 30]
    assert data.titles == (TITLES[10], TITLES[20], TITLES[30])
    found = zip(data.user_ids[data.user], data.item_ids[data.item], data.rating, data.time, strict=True)
    assert [tuple(x.item() for x in row) for row in found] == TABLE
    assert (data.user.dtype, data.item.dtype, data.rating.dtype, data.time.dtype) == (
        np.int32, np.int32, np.float32, np.int64,
    )  # fmt: skip
    assert (len(data), data.num_users, data.num_items) == (10, 4, 3)
    assert data.source.startswith(f"{folder} (NOT the official edition: 10 ratings in place of ")
    if name == "ml-100k":
        assert data.fold.tolist() == [0, 1, 2, 3, 4] * 2
        assert ratings.five_folds(data, official=True) is data.fold
    else:
        assert data.fold is None
        with pytest.raises(errors.ConfigError, match="no official folds"):
            ratings.five_folds(data, official=True)


@pytest.mark.parametrize("end", ["\r\n", "\n\n"])
def test_other_ends_of_lines(tmp_path, end):
    folder = write(tmp_path, "ml-latest-small")
    for file in ("ratings.csv", "movies.csv"):
        text = (folder / file).read_bytes()
        (folder / file).write_bytes(text.replace(b"\n", end.encode()))
    assert len(load_ratings("ml-latest-small", data_dir=tmp_path)) == 10
    number = 5 if end == "\r\n" else 9  # with an empty line after each
    replace_line(folder / "ratings.csv", number, "2,20,7.5,200")
    assert f"ratings.csv: line {number}: the rating is 7.5" in refusal(tmp_path, "ml-latest-small")


WRONG = [
    ("2,30,,100", "line 3: the rating is missing"),
    ("2,30,good,100", "line 3: the rating is 'good', which is no number"),
    ("2,30,nan,100", "line 3: the rating is nan, expected 0.5 to 5"),
    ("2,30,inf,100", "line 3: the rating is inf, expected 0.5 to 5"),
    ("2,30,-1,100", "line 3: the rating is -1, expected 0.5 to 5"),
    ("2,30,4", "line 3: has 3 columns, expected 4 (user id, movie id, rating, timestamp)"),
    ("2,30,4,100,9", "line 3: has 5 columns, expected 4"),
    (",30,4,100", "line 3: the user id is missing"),
    ("2.5,30,4,100", "line 3: the user id is 2.5, expected a whole number"),
    ("2,-30,4,100", "line 3: the movie id is -30, expected a whole number"),
    ("2,30,4,", "line 3: the timestamp is missing"),
    ("# a comment", "line 3: has 1 columns"),
    (b"2,30,\xff,100", "line 3: the rating is '\N{REPLACEMENT CHARACTER}', which is no number"),
    ("7,10,3.0,999", "lines 2 and 3 both rate movie 10 by user 7: remove one of them"),
    ("7,99,3.0,999", "line 3: movie 99 has no title in "),
]


@pytest.mark.parametrize(("line", "expected"), WRONG)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_wrong_line_is_named(tmp_path, name, line, expected):
    folder, form = write(tmp_path, name), FORMATS[name]
    if isinstance(line, str) and line[0] != "#":
        line = line.replace(",", form.separator)
    elif isinstance(line, bytes):
        line = line.replace(b",", form.separator.encode())
    if not form.header:  # all lines are one higher up
        for after, before in ((1, 2), (2, 3)):
            expected = expected.replace(str(before), str(after), 1) if "lines" in expected else expected
        expected = expected.replace("line 3", "line 2")
    path = folder / form.ratings
    replace_line(path, 3 if form.header else 2, line)
    assert f"{path}: {expected}" in refusal(tmp_path, name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("20,,Drama", "line 3: movie 20 has no title"),
        ("20, ,Drama", "line 3: movie 20 has no title"),
        ("x,Title,Drama", "line 3: the movie id is 'x', which is no number"),
        ("20,Drama", "line 3: has 2 columns, expected 3"),
        ("10,Title,Drama", "lines 2 and 3 are both movie 10"),
        (b"20,\xff\xfe,Drama", "line 3 is not UTF-8"),
        ("9" * 5000 + ",Title,Drama", "line 3: the movie id has 5,000 digits"),
        ('20,"' + "x" * 140_000, "line 3: field larger than field limit"),
    ],
)
def test_a_wrong_title_is_named(tmp_path, line, expected):
    folder = write(tmp_path, "ml-latest-small")
    replace_line(folder / "movies.csv", 3, line)
    assert expected in refusal(tmp_path, "ml-latest-small")


def test_a_wrong_header_and_files_without_ratings(tmp_path):
    folder = write(tmp_path, "ml-latest-small")
    content = (folder / "ratings.csv").read_text()
    (folder / "ratings.csv").write_text(content.replace("userId", "user", 1))
    assert "line 1 is 'user,movieId,rating,timestamp', expected 'userId" in refusal(
        tmp_path, "ml-latest-small"
    )
    for content in ("", "userId,movieId,rating,timestamp", "userId,movieId,rating,timestamp\n\n"):
        (folder / "ratings.csv").write_text(content)
        assert "ratings.csv: " in refusal(tmp_path, "ml-latest-small")
    (folder / "ratings.csv").unlink()
    assert "lacks ratings.csv: remove the folder" in refusal(tmp_path, "ml-latest-small")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: replace_line(path, 1, "2\t30\t1\t100"), "u2.test: line 1 is no rating of"),
        (lambda path: replace_line(path, 1, "2\t99\t1\t100"), "u2.test: line 1 is no rating of"),
        (lambda path: replace_line(path, 1, "7\t10\t4\t400"), "u2.test: line 1 is in u1.test, too"),
        (lambda path: replace_line(path, 1, ""), "u.data: line 2 is in none of u1.test, "),
    ],
)
def test_folds_that_are_no_partition(tmp_path, change, expected):
    change(write(tmp_path, "ml-100k") / "u2.test")
    assert expected in refusal(tmp_path, "ml-100k")


def test_strict_verification_takes_the_archive_alone(tmp_path):
    write(tmp_path, "ml-1m")
    with pytest.raises(errors.DataError, match="remove the folder, and the archive is downloaded"):
        load_ratings("ml-1m", data_dir=tmp_path, verify="strict")


@pytest.mark.parametrize(("name", "num_ratings"), NUM_RATINGS.items())
def test_another_number_of_ratings_is_warned_of(tmp_path, name, num_ratings):
    folder = write(tmp_path, name)
    with pytest.warns(UserWarning, match=f"10 ratings in place of {num_ratings}: used as they are"):
        data = load_ratings(name, data_dir=tmp_path)
    assert data.source == f"{folder} (NOT the official edition: 10 ratings in place of {num_ratings})"


@pytest.mark.filterwarnings("error")
def test_the_right_number_of_ratings_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "ml-1m", dataclasses.replace(FORMATS["ml-1m"], num_ratings=10))
    folder = write(tmp_path, "ml-1m")
    assert load_ratings("ml-1m", data_dir=tmp_path).source == f"{folder} (unpacked files)"


def test_an_archive_is_checked_unpacked_and_removed(tmp_path, monkeypatch):
    """As if it had been downloaded; a second one with the same name is of no matter."""
    made = write(tmp_path / "made", "ml-100k")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(made.iterdir()):
            archive.write(path, f"ml-100k/{path.name}")
        archive.writestr("ml-100k/README", "read me")
        archive.writestr("ml-100k/allbut.pl", "not wanted")
    data_dir = tmp_path / "data" / "movielens"
    data_dir.mkdir(parents=True)

    def download(url, target, *, size, sha256, progress):
        assert url == "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
        assert (size, sha256[:8]) == (4_924_029, "50d2a982")
        target.write_bytes(content.getvalue())

    monkeypatch.setattr(movielens, "download", download)
    data = load_ratings("ml-100k", data_dir=tmp_path / "data", verify="strict")
    assert data.source.endswith("ml-100k (official archive, SHA-256 verified)")
    again = load_ratings("ml-100k", data_dir=tmp_path / "data", verify="strict")
    assert again.source == data.source
    files = sorted(path.name for path in (data_dir / "ml-100k").iterdir())
    assert files == sorted([*(path.name for path in made.iterdir()), "README", ".sha256"])
    assert not (data_dir / "ml-100k.zip").exists()


def test_an_unknown_set_is_named():
    with pytest.raises(errors.ConfigError, match="did you mean 'ml-100k'"):
        load_ratings("ml-100")


def test_generated_ratings_are_the_same_every_time():
    left, right = generate_ratings(), generate_ratings()
    for name in ("user", "item", "rating", "time"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert (len(left), left.num_users, left.num_items) == (12_000, 240, 300)
    assert len(np.unique(left.user * left.num_items + left.item)) == len(left)
    assert set(np.unique(left.rating * 2)) <= set(range(1, 11))
    assert left.source == "generated"
    assert all(title.startswith("Generated") for title in left.titles)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_folds_are_a_partition(seed):
    data = generate_ratings(num_users=7, num_items=40, mean_count=9)
    fold = ratings.five_folds(data, seed=seed)
    assert fold.min() == 0
    counts = np.bincount(fold)
    assert len(counts) == 5
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(fold, ratings.five_folds(data, seed=seed))
    assert np.any(fold != ratings.five_folds(data, seed=seed + 1))


def test_the_latest_rating_of_each_user(tmp_path):
    write(tmp_path, "ml-1m")
    data = load_ratings("ml-1m", data_dir=tmp_path)
    rows = ratings.latest_of_each_user(data)
    # User 2 at time 200, user 7 at 400, user 9 at 80; user 11 has a single one.
    assert [TABLE[row] for row in rows] == [TABLE[3], TABLE[0], TABLE[7]]
    same = [(u, i, r, 5) for u, i, r, _ in TABLE]
    write(tmp_path, "ml-1m", table=same)
    rows = ratings.latest_of_each_user(load_ratings("ml-1m", data_dir=tmp_path))
    assert rows.tolist() == [6, 8, 7]  # the last in the file


def test_unseen_items_are_new_to_the_user_and_each_once():
    data = generate_ratings(num_users=20, num_items=60, mean_count=20)
    users = np.arange(20)[::-1]
    drawn = ratings.unseen_items(data, users, 25, seed=3)
    assert drawn.shape == (20, 25)
    for user, items in zip(users, drawn, strict=True):
        assert not np.isin(items, data.item[data.user == user]).any()
        assert len(np.unique(items)) == 25
    # A user's draw is the user's own.
    np.testing.assert_array_equal(ratings.unseen_items(data, users[3:5], 25, seed=3), drawn[3:5])
    assert np.any(ratings.unseen_items(data, users, 25, seed=4) != drawn)
    with pytest.raises(errors.ConfigError, match="items left that they didn't rate; 55 are to be drawn"):
        ratings.unseen_items(data, users, 55)


def test_unseen_items_are_drawn_evenly():
    data = generate_ratings(num_users=400, num_items=30, mean_count=2, seed=1)
    drawn = ratings.unseen_items(data, np.arange(400), 5)
    seen = np.bincount(data.item, minlength=30)
    expected = 5 * sum((np.ones(30) - np.isin(np.arange(30), data.item[data.user == u])) /
                       (30 - (data.user == u).sum()) for u in range(400))  # fmt: skip
    counts = np.bincount(drawn.ravel(), minlength=30)
    assert np.sum((counts - expected) ** 2 / expected) < 60  # 29 degrees of freedom
    assert seen.sum() == len(data)


def test_packed_items():
    data = generate_ratings(num_users=9, num_items=21, mean_count=4)
    packed = ratings.packed_items(data.user, data.item, 9, 21)
    expected = np.zeros((9, 21), bool)
    expected[data.user, data.item] = True
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1, count=21), expected)


@pytest.mark.parametrize("wanted", ["42", "-1", "9" * 400, "bob", "", "7.0", "1_0", "٧"])
def test_an_id_that_is_not_there(wanted):
    with pytest.raises(errors.ConfigError) as error:
        ratings.number_of(np.array([2, 7, 9, 41]), wanted, "user")
    assert ("the nearest 7, 9, 41" in str(error.value)) is (wanted == "42")
