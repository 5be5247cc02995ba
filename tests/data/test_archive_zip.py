import warnings
import zipfile

import pytest

from jaxnets import errors
from jaxnets.data.archive import unpack_zip

MEMBERS = {"set/a.bin": 1000, "set/deep/b.txt": 10}


@pytest.fixture
def make_zip(tmp_path):
    """Write an archive of the good members, then whatever the test adds."""

    def make(extra=(), a=b"a" * 1000, b=b"b" * 10, method=zipfile.ZIP_DEFLATED):
        path = tmp_path / "set.zip"
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
            warnings.simplefilter("ignore")  # of names that come twice
            archive.writestr("set/", b"")
            archive.writestr("set/a.bin", a)
            if b is not None:
                archive.writestr("set/deep/b.txt", b)
            for name in extra:
                archive.writestr(name, b"x")
        return path

    return make


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_unpacks_what_is_expected_and_nothing_else(make_zip, tmp_path, method):
    target = tmp_path / "out" / "set"
    assert unpack_zip(make_zip(["set/other"], method=method), target, members=MEMBERS) == target
    assert (target / "a.bin").read_bytes() == b"a" * 1000
    assert (target / "deep" / "b.txt").read_bytes() == b"b" * 10
    assert left_in(target) == [".sha256", "a.bin", "deep"]
    assert left_in(target.parent) == ["set"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("set/../../evil", "leads out"),
        ("/tmp/evil", "leads out"),
        ("set\\..\\evil", "leads out"),
        ("other/evil", "isn't in set/"),
        ("set/a.bin", "is there twice"),
    ],
)
def test_refuses_hostile_members(make_zip, tmp_path, name, why):
    path = make_zip([name])
    with pytest.raises(errors.DataError, match=why) as error:
        unpack_zip(path, tmp_path / "set", members=MEMBERS)
    assert "\n" not in str(error.value)
    assert left_in(tmp_path) == ["set.zip"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"a": b"a" * 1001}, r"a\.bin' has more than the 1,000 bytes expected"),
        ({"b": None}, r"lacks set/deep/b\.txt"),
    ],
)
def test_refuses_members_that_are_too_large_or_missing(make_zip, tmp_path, fields, why):
    with pytest.raises(errors.DataError, match=why):
        unpack_zip(make_zip(**fields), tmp_path / "set", members=MEMBERS)
    assert left_in(tmp_path) == ["set.zip"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "flipped"])
def test_refuses_a_damaged_archive(make_zip, tmp_path, damage):
    path = make_zip(method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    flipped = content.replace(b"aaaa", b"aaab", 1)
    changed = {"truncated": content[:500], "garbage": b"no zip" * 99, "empty": b"", "flipped": flipped}
    path.write_bytes(bytes(changed[damage]))
    with pytest.raises(errors.DataError, match="damaged or no zip file") as error:
        unpack_zip(path, tmp_path / "set", members=MEMBERS)
    assert "\n" not in str(error.value)
    assert left_in(tmp_path) == ["set.zip"]
