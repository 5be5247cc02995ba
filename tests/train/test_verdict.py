"""What several processes decide; with real processes it is tested where it is used."""

import pytest

from jaxnets import errors
from jaxnets.train import hosts, verdict


@pytest.fixture
def second(monkeypatch):
    """This is the second of three processes; the list holds what the other two say."""
    others = []
    monkeypatch.setattr(hosts, "count", lambda: 3)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "gather", lambda name, x, **_: [others[0], x, others[1]])
    monkeypatch.setattr(hosts, "broadcast", lambda name, x, **_: others[0])
    return others


def fail(error, cause=None):
    def raise_it():
        raise error from cause

    return raise_it


def test_one_process_just_does_it():
    assert verdict.by_first("x", lambda: {1: (2,)}) == {1: (2,)}
    assert verdict.together("x", lambda: 5) == [5]
    for decide in (verdict.by_first, verdict.together):
        with pytest.raises(KeyError, match="a"):
            decide("x", fail(KeyError("a")))


def test_the_first_one_decides(second):
    second[:] = [{"value": [1]}]
    assert verdict.by_first("x", fail(AssertionError("is not asked"))) == [1]
    second[:] = [{"kind": "DamagedError", "line": "broken"}]
    with pytest.raises(errors.DamagedError, match=r"^broken$"):
        verdict.by_first("x", lambda: 1)
    second[:] = [{"kind": "KeyError", "line": "process 0: a"}]
    with pytest.raises(errors.HostError, match="process 0: a"):
        verdict.by_first("x", lambda: 1)


def test_what_fails_on_one_fails_on_all(second):
    second[:] = [{"value": 1}, {"value": 3}]
    assert verdict.together("x", lambda: 2) == [1, 2, 3]
    with pytest.raises(errors.DamagedError, match=r"^process 1: broken$"):
        verdict.together("x", fail(errors.DamagedError("broken")))
    with pytest.raises(errors.HostError, match=r"^process 1: 'a'$"):
        verdict.together("x", fail(KeyError("a")))
    second[1] = {"kind": "CheckpointError", "line": "full", "waited": False}
    with pytest.raises(errors.CheckpointError, match=r"^process 2: full$"):
        verdict.together("x", lambda: 2)


def test_the_cause_is_told_and_not_who_waited_for_it(second):
    waited = {"kind": "CheckpointError", "line": "waited", "waited": True}
    second[:] = [waited, {"kind": "CheckpointError", "line": "full", "waited": False}]
    late = fail(errors.CheckpointError("late"), TimeoutError())
    with pytest.raises(errors.CheckpointError, match=r"^process 2: full$"):
        verdict.together("x", late)
    second[1] = waited
    with pytest.raises(errors.CheckpointError, match=r"^process 0: waited$"):
        verdict.together("x", late)
