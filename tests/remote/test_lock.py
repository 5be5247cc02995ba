"""Of two runs in one folder of a store the second is refused."""

import json
import os
import re
import socket
import subprocess
import threading
import warnings

import pytest

from jaxnets import errors
from jaxnets.train import folder_lock
from jaxnets.train.folder_lock import LOCK, SILENT_S, locked


def lock_of(store, bucket):
    return store.objects[bucket].get(f"a/run/{LOCK}")


def put_lock(store, bucket, **owner):
    text = json.dumps({"host": "elsewhere", "boot": "x", "pids": "y", "pid": 1, "run": "z", **owner})
    store.put(bucket, f"a/run/{LOCK}", text.encode())


def test_the_second_is_refused_and_the_first_leaves_nothing(store, bucket, folder):
    with locked(folder):
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(errors.ConfigError, match=owner), locked(folder):
            pass
        assert lock_of(store, bucket)
    assert store.objects[bucket] == {}
    with locked(folder):
        pass


def test_of_many_at_once_one_gets_it(store, bucket, folder):
    got, refused, out = [], [], threading.Barrier(4)

    def try_it():
        try:
            with locked(folder):
                got.append(1)
                out.wait(60)
        except errors.ConfigError:
            refused.append(1)
            out.wait(60)

    threads = [threading.Thread(target=try_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)


def test_a_lock_of_another_host_counts_until_it_is_silent(store, bucket, folder, sleeps, capsys):
    for age, wait in ((50, 10), (SILENT_S + 1, 0)):
        store.clock = 0.0
        put_lock(store, bucket)
        store.clock = age
        begun = sleeps.now
        with pytest.warns(UserWarning, match="taking it over"), locked(folder):
            assert json.loads(lock_of(store, bucket).content)["pid"] == os.getpid()
        assert sleeps.now - begun == pytest.approx(wait, abs=1)
        said = capsys.readouterr().err
        line = "waiting up to 10 s for the lock of process 1 on elsewhere, silent for 50 s"
        assert (line in said) == (wait > 0)
        assert store.objects[bucket] == {}


def test_a_lock_of_another_host_that_beats_is_refused(store, bucket, folder, sleeps):
    put_lock(store, bucket)
    sleeps.events = [lambda: None, lambda: put_lock(store, bucket, host="third")]
    with pytest.raises(errors.ConfigError, match="process 1 on third"), locked(folder):
        pass
    assert not sleeps.events
    sleeps.events = [store.objects[bucket].clear]  # it ends
    with locked(folder):
        assert not sleeps.events


def test_a_lock_of_a_dead_process_of_this_host_does_not_count(store, bucket, folder, sleeps):
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours = folder_lock._me()
    for owner in ({"pid": dead.pid}, {"born": "1"}):  # another process has its number now
        put_lock(store, bucket, **{**ours, **owner})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with locked(folder):
                pass
    assert sleeps.now == 1000
    # The same number may be another process there.
    put_lock(store, bucket, **{**ours, "pids": "another", "pid": dead.pid})
    with pytest.warns(UserWarning, match="taking it over"), locked(folder):
        pass
    assert sleeps.now == 1000 + SILENT_S


def test_a_lock_that_goes_while_it_is_looked_at_is_made_again(store, bucket, folder):
    put_lock(store, bucket)

    def fault(method, name):
        if method == "INFO":
            store.objects[bucket].clear()
            store.fault = lambda method, name: None

    store.fault = fault
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(folder):
            assert json.loads(lock_of(store, bucket).content)["pid"] == os.getpid()


def test_an_owner_that_gets_no_answer_leaves(store, bucket, folder, monkeypatch, capfd):
    """The store takes the connection, and says nothing to the lock alone."""
    left, answer, asked = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(folder_lock, "LEASE_S", 0.5)
    monkeypatch.setattr(folder_lock, "_leave", left.set)

    def fault(method, name):
        if name.endswith(LOCK) and method == "PUT":
            asked.set()
            answer.wait(60)

    try:
        with locked(folder):
            store.fault = fault
            assert asked.wait(60)
            (folder / "x").write(b"1")  # everything else goes on
            assert left.wait(60)
            answer.set()
    finally:
        answer.set()
    assert re.search(r"could not be renewed for \d+ s \(no answer\)", capfd.readouterr().err)


def test_a_call_about_a_lock_ends_soon(store, folder):
    answer = threading.Event()
    store.fault = lambda method, name: answer.wait(60) and None
    try:
        with pytest.raises(OSError, match=r"no answer within 0.1 s"):
            (folder / LOCK).within(0.1).write(b"")
    finally:
        answer.set()


def test_the_owner_beats_and_leaves_when_it_was_taken_over(store, bucket, folder, monkeypatch, capfd):
    left = threading.Event()
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(folder_lock, "_leave", left.set)
    with locked(folder):
        first = lock_of(store, bucket).generation
        while lock_of(store, bucket).generation == first:
            pass
        assert not left.is_set()
        put_lock(store, bucket)
        assert left.wait(60)
    assert "process 1 on elsewhere took over" in capfd.readouterr().err
    assert lock_of(store, bucket), "another's lock is left alone"


def test_an_answer_that_was_lost_is_no_take_over(store, bucket, folder, monkeypatch):
    """The store has written the lock, and answers 503: the next try finds another generation."""
    put = store.put
    fails = [503]

    def lost(*args):
        put(*args)
        store.fault = lambda method, name: fails.pop() if fails and method == "PUT" else None
        monkeypatch.setattr(store, "put", put)
        from tests.remote.object_store import Answer

        raise Answer(503)

    monkeypatch.setattr(store, "put", lost)
    with locked(folder):
        assert lock_of(store, bucket)
    assert store.objects[bucket] == {}
