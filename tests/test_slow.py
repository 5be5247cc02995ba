"""What `make test` leaves to `make test-slow`: the tests that slow.txt names."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_every_name_is_of_a_test():
    names = (ROOT / "tests" / "slow.txt").read_text("utf-8").splitlines()
    assert names == sorted(set(names))
    assert 100 < len(names) < 1500
    for name in names:
        path, test = name.split("::", 1)
        assert (ROOT / path).is_file(), name
        if path.startswith("tests/"):
            function = re.split(r"\[|::", test)[0]
            assert f"def {function}(" in (ROOT / path).read_text("utf-8"), name
