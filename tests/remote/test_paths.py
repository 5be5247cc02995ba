"""A path of an object store is used as one of a disk."""

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments import digits
from jaxnets import errors, remote
from jaxnets.config import RunOptions, parse_flags, to_json
from jaxnets.remote import as_path, is_remote
from jaxnets.train import files


def fill(folder):
    for name in ("a/x", "a/b/y", "a.1/z", "c d+%", "00000001/manifest.json", "00000012/manifest.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(name.encode())


def names(paths, folder):
    return sorted(path.relative_to(folder).as_posix() for path in paths)


@pytest.mark.parametrize("page", [1000, 1, 2])
def test_both_kinds_answer_alike(store, folder, tmp_path, page):
    store.page = page
    found = []
    for place in (folder, tmp_path / "run"):
        fill(place)
        found.append(
            [
                names(place.iterdir(), place),
                names(place.glob("*/manifest.json"), place),
                names(place.glob("000*"), place),
                names((path for path in place.rglob("*") if path.is_file()), place),
                [[f(place / name) for f in (type(place).exists, type(place).is_dir)]
                 for name in ("", "a", "a/x", "a/b", "a/bb", "c d+%", "b")],
                (place / "c d+%").read_text(),
                (place / "a" / "b" / "y").stat().st_size,
                (place / "a/b").with_name("x").read_bytes(),
                (place / "a/x").parent.name,
            ]
        )  # fmt: skip
    assert found[0] == found[1]
    with pytest.raises(FileNotFoundError):
        (folder / "b").stat()
    assert not (folder / "b").exists()
    assert folder.parent.parent.parent == folder.parent.parent  # as a disk's root


def test_moving_and_removing(store, folder, tmp_path):
    for place in (folder, tmp_path / "run"):
        fill(place)
        files.move(place / "a", place / "moved")
        files.move(place / "c d+%", place / "moved" / "c")
        files.remove_tree(place / "00000001")
        assert names((path for path in place.rglob("*") if path.is_file()), place) == [
            "00000012/manifest.json", "a.1/z", "moved/b/y", "moved/c", "moved/x"]  # fmt: skip
    files.write_atomically(folder / "step/state/d/1", b"1")
    files.write_atomically(folder / "step/manifest.json", "{}")
    store.requests.clear()
    files.remove_tree(folder / "step")
    deleted = [name for method, name in store.requests if method == "DELETE"]
    assert deleted[0].endswith("manifest.json"), "what says that a step is whole goes first"


def test_a_write_on_condition(store, folder):
    path = folder / "x"
    first = path.write(b"1", generation=0)
    with pytest.raises(FileExistsError):
        path.write(b"2", generation=0)
    second = path.write(b"3", generation=first)
    with pytest.raises(FileExistsError):
        path.write(b"4", generation=first)
    with pytest.raises(FileExistsError):
        path.unlink(generation=first)
    assert path.read_bytes() == b"3"
    path.unlink(generation=second)
    assert not path.exists()


def test_digests_are_those_of_a_disk(store, folder, tmp_path):
    content = bytes(range(256)) * 5
    (tmp_path / "x").write_bytes(content)
    (folder / "x").write(content)
    for piece in (100, 1280, None):
        assert files.digest(folder / "x", piece=piece) == files.digest(tmp_path / "x", piece=piece)


def test_a_file_that_grows(store, folder, monkeypatch):
    path = folder / "log"
    path.write(b"0\n")
    file = files.open_to_append(path)
    file.write("1\n")
    file.flush()
    assert path.read_text() == "0\n", "not with each row"
    files.sync_open(file)
    assert path.read_text() == "0\n1\n"
    monkeypatch.setattr(files, "_UPLOAD_S", 0)
    file.write("2\n")
    file.flush()
    assert path.read_text() == "0\n1\n2\n"
    file.write("3\n")
    file.close()
    assert path.read_text() == "0\n1\n2\n3\n"


def test_a_block_that_fails_writes_nothing(store, folder):
    with pytest.raises(ZeroDivisionError), (folder / "x").open("wb") as file:
        file.write(b"half" + bytes(1 // 0))
    assert not (folder / "x").exists()


def test_what_goes_wrong_is_an_os_error_in_words(store, folder):
    with pytest.raises(FileNotFoundError, match="there is no bucket nowhere"):
        as_path("gs://nowhere/x").write(b"")
    for status, match in ((403, "the store refuses it"), (400, "the store answers 400")):
        store.fault = lambda method, name, status=status: status
        with pytest.raises(OSError, match=match):
            (folder / "x").read_bytes()


def test_a_try_that_fails_is_repeated(store, folder):
    fails = [503, 429]
    store.fault = lambda method, name: fails.pop() if fails else None
    (folder / "x").write(b"1")
    assert (folder / "x").read_bytes() == b"1"
    assert not fails


def test_flags():
    def parse(place):
        return parse_flags(["--run-dir", place], digits.Config(), prog="x", about="")[1]

    options = parse("gs://bucket/a//b/")
    assert to_json(options)["run_dir"] == "gs://bucket/a/b"
    assert is_remote(options.run_dir)
    assert parse("a/b").run_dir == Path("a/b")
    assert RunOptions().run_dir is None
    for place, match in (("s3://bucket/a", "only gs://"), ("gs://", "names no bucket")):
        with pytest.raises(errors.ConfigError, match=match):
            parse(place)


def test_without_the_client_one_line_says_what_to_install(store, folder, monkeypatch):
    remote._store.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(errors.ConfigError, match=re.escape("pip install 'jaxnets[gcs]'")):
        folder.exists()


def test_who_waits_for_the_first_answer_is_told(store, folder, monkeypatch, capfd):
    answer = threading.Event()
    monkeypatch.setattr(remote, "_answered", threading.Event())
    monkeypatch.setattr(remote, "_TOLD_S", 0.05)
    store.fault = lambda method, name: answer.wait(60) and None
    with ThreadPoolExecutor() as pool:
        found = pool.submit((folder / "x").exists)
        err = ""
        while "waiting for an answer of the object store at http://127.0.0.1:" not in err:
            assert not found.done()
            err += capfd.readouterr().err
        answer.set()
        assert not found.result()
    (folder / "x").write(b"1")
    assert remote._answered.is_set()
