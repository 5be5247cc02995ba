import io
import os
import tarfile

import pytest

from jaxnets import errors
from jaxnets.data import archive as archive_module
from jaxnets.data.archive import is_as_unpacked, unpack_tar

MEMBERS = {"set/a.bin": 1000, "set/deep/b.txt": 10}


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def make_tar(tmp_path):
    """Write an archive of the good members, then whatever the test adds."""

    def make(extra=None, a=b"a" * 1000, b=b"b" * 10, mode="w:gz"):
        path = tmp_path / "set.tar.gz"
        with tarfile.open(path, mode) as tar:
            add(tar, "set", type=tarfile.DIRTYPE, mode=0o755)
            if a is not None:
                add(tar, "set/a.bin", a)
            if b is not None:
                add(tar, "./set/deep/b.txt", b, mode=0)
            if extra:
                extra(tar)
        return path

    return make


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("mode", ["w:gz", "w", "w:xz"])
def test_unpacks_what_is_expected(make_tar, tmp_path, mode):
    target = tmp_path / "out" / "set"
    assert unpack_tar(make_tar(mode=mode), target, members=MEMBERS) == target
    assert (target / "a.bin").read_bytes() == b"a" * 1000
    assert (target / "deep" / "b.txt").read_bytes() == b"b" * 10
    assert left_in(target.parent) == ["set"]
    assert target.stat().st_mode & 0o055 or os.umask(os.umask(0)) & 0o055  # readable by others


def test_a_folder_that_is_as_it_was_unpacked(make_tar, tmp_path):
    target = unpack_tar(make_tar(), tmp_path / "out" / "set", members=MEMBERS)
    assert is_as_unpacked(target)
    (target / "deep" / "b.txt").chmod(0o644)
    (target / "deep" / "b.txt").write_bytes(b"bbbbbbbbbB")
    assert not is_as_unpacked(target)
    (target / "deep" / "b.txt").unlink()
    assert not is_as_unpacked(target)
    assert not is_as_unpacked(tmp_path)  # nothing is known of it


def test_a_folder_that_is_there_is_left_alone(make_tar, tmp_path):
    (tmp_path / "set").mkdir()
    unpack_tar(make_tar(), tmp_path / "set", members=MEMBERS)
    assert left_in(tmp_path / "set") == []


def link(kind, goal):
    return lambda tar: add(tar, "set/link", type=kind, linkname=goal)


HOSTILE = {
    "parent": (lambda tar: add(tar, "set/../../evil", b"x"), "leads out"),
    "absolute": (lambda tar: add(tar, "/tmp/evil", b"x"), "leads out"),
    "backslash": (lambda tar: add(tar, "set\\..\\evil", b"x"), "leads out"),
    "beside": (lambda tar: add(tar, "other/evil", b"x"), "isn't in set/"),
    "symlink": (link(tarfile.SYMTYPE, "/etc/passwd"), "link"),
    "symlink inside": (link(tarfile.SYMTYPE, "a.bin"), "link"),
    "hard link": (link(tarfile.LNKTYPE, "set/a.bin"), "link"),
    "device": (link(tarfile.CHRTYPE, ""), "special"),
    "fifo": (link(tarfile.FIFOTYPE, ""), "special"),
    "twice": (lambda tar: add(tar, "set/a.bin", b"x"), "is there twice"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_refuses_hostile_members(make_tar, tmp_path, kind):
    extra, why = HOSTILE[kind]
    path = make_tar(extra)
    (tmp_path / "out").mkdir()
    with pytest.raises(errors.DataError, match=why) as error:
        unpack_tar(path, tmp_path / "out" / "set", members=MEMBERS)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert left_in(tmp_path / "out") == []
    assert left_in(tmp_path) == ["out", "set.tar.gz"]


def test_refuses_a_member_that_is_too_large(make_tar, tmp_path):
    with pytest.raises(errors.DataError, match=r"a\.bin' has 1,001 bytes, expected at most 1,000"):
        unpack_tar(make_tar(a=b"a" * 1001), tmp_path / "set", members=MEMBERS)
    assert left_in(tmp_path) == ["set.tar.gz"]


def test_refuses_an_archive_that_lacks_a_member(make_tar, tmp_path):
    with pytest.raises(errors.DataError, match=r"lacks set/deep/b\.txt"):
        unpack_tar(make_tar(b=None), tmp_path / "set", members=MEMBERS)
    assert left_in(tmp_path) == ["set.tar.gz"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_refuses_a_damaged_archive(make_tar, tmp_path, damage):
    path = make_tar()
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "garbage": b"not a tar file" * 100,
            "empty": b"",
        }[damage]
    )
    with pytest.raises(errors.DataError) as error:
        unpack_tar(path, tmp_path / "set", members=MEMBERS)
    assert "\n" not in str(error.value)
    assert left_in(tmp_path) == ["set.tar.gz"]


def test_an_interrupt_leaves_no_target_and_the_next_try_cleans_up(make_tar, tmp_path, monkeypatch):
    path = make_tar()
    target = tmp_path / "set"
    with monkeypatch.context() as patch:
        # Killed between the last byte and the rename: nothing is tidied either.
        patch.setattr(archive_module.os, "rename", lambda *_: (_ for _ in ()).throw(SystemExit))
        patch.setattr(archive_module.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            unpack_tar(path, target, members=MEMBERS)
    assert not target.exists()
    assert len(left_in(tmp_path)) == 2  # the archive and the temporary folder
    unpack_tar(path, target, members=MEMBERS)
    assert left_in(tmp_path) == ["set", "set.tar.gz"]


def test_a_folder_that_cannot_be_written(make_tar, tmp_path, as_nobody):
    path = make_tar()
    tmp_path.chmod(0o755)
    report = as_nobody(
        f"""
        from pathlib import Path
        from jaxnets import errors
        from jaxnets.data.archive import unpack_tar
        try:
            unpack_tar(Path({str(path)!r}), Path({str(tmp_path)!r}) / "set", members={MEMBERS})
        except errors.DataError as error:
            print(error)
        """
    )
    assert report.count("\n") == 1
    assert "can't write in the data folder" in report
    assert left_in(tmp_path) == ["set.tar.gz"]


def test_what_nobody_asked_for_stays_packed(make_tar, tmp_path):
    path = make_tar(lambda tar: add(tar, "set/readme.html", b"x"))
    target = unpack_tar(path, tmp_path / "out" / "set", members=MEMBERS)
    assert left_in(target) == [".sha256", "a.bin", "deep"]
