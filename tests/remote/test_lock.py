"""Of two runs in one folder of a store the second is refused."""

import json
import os
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


def test_a_lock_of_another_host_counts_until_it_is_silent(store, bucket, folder):
    put_lock(store, bucket)
    store.clock = SILENT_S - 1
    with pytest.raises(errors.ConfigError, match="silent for 59 s"), locked(folder):
        pass
    store.clock = SILENT_S + 1
    with pytest.warns(UserWarning, match="taking it over"), locked(folder):
        assert json.loads(lock_of(store, bucket).content)["pid"] == os.getpid()
    assert store.objects[bucket] == {}


def test_a_lock_of_a_dead_process_of_this_host_does_not_count(store, bucket, folder):
    dead = subprocess.Popen(["true"])
    dead.wait()
    process = dead.pid
    put_lock(store, bucket, **folder_lock._here(), pid=process)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(folder):
            pass
    put_lock(store, bucket, **{**folder_lock._here(), "pids": "another"}, pid=process)
    with pytest.raises(errors.ConfigError, match="silent"), locked(folder):
        pass  # the same number may be another process there


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
