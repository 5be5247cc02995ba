"""The same batches as from memory, whoever reads them; workers that end with their parent."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import jaxnets
from jaxnets import errors, registry
from jaxnets.data import Arrays, Batches, Stream, take, write_array_records
from jaxnets.data.sources import ArrayRecords

ROOT = Path(jaxnets.__file__).parents[1]
RNG = np.random.default_rng(0)
ARRAYS = {
    "image": RNG.integers(0, 256, (50, 6, 5, 3), dtype=np.uint8),
    "label": RNG.integers(0, 9, 50).astype(np.int32),
    "weight": RNG.normal(size=50),
}
BATCHES = Batches(50, 8, 147, seed=3)  # straddled epochs and a short last batch


class Slow:
    """Defined in a test, with a lambda: workers get it nevertheless."""

    def __init__(self, size=1000, seconds=0.0, fault=None):
        self.size, self.seconds, self.fault = size, seconds, fault
        self.double = lambda x: 2 * x

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        time.sleep(self.seconds)
        if self.fault and i == self.fault[0]:
            raise self.fault[1]
        return {"x": np.full(3, self.double(i))}


class Unsendable(OSError):
    """What no pickle takes."""

    def __init__(self, message):
        super().__init__(message)
        self.lock, self.callback = threading.Lock(), lambda: self.lock


class Faulty(Slow):
    def __getitem__(self, i):
        raise Unsendable(f"example {i} is gone")


class Marks:
    """Leaves a file for each example that is being read; may wait for that of a neighbour."""

    def __init__(self, folder, neighbour=0):
        self.folder, self.neighbour = folder, neighbour

    def __len__(self):
        return 100

    def __getitem__(self, i):
        (self.folder / str(i)).touch()
        assert wait_for((self.folder / str(i ^ self.neighbour)).exists, 60)
        return {"x": np.int32(i)}


class Where:
    """Which process read it, and what that has imported."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        names = ("jax", "jaxlib", "flax", "orbax", "torch", "experiments")
        return {"pid": os.getpid(), "heavy": sum(name in sys.modules for name in names)}


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        assert batch[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(batch[name], expected[name])


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(("num_workers", "prefetch"), [(0, 0), (0, 3), (1, 2), (2, 5), (3, 0)])
def test_the_batches_are_those_from_memory(num_workers, prefetch):
    with Stream(Arrays(ARRAYS), BATCHES, num_workers=num_workers, prefetch=prefetch) as stream:
        assert len(stream) == len(BATCHES) == 19
        for i in range(len(BATCHES)):
            assert_same(stream[i], take(ARRAYS, BATCHES[i]))
        assert not stream[18]["mask"].all()


def test_files_give_the_same_as_memory(tmp_path):
    path = tmp_path / "x.array_record"
    write_array_records(path, ({name: x[i] for name, x in ARRAYS.items()} for i in range(50)))
    with Stream(ArrayRecords([path]), BATCHES, num_workers=2) as stream:
        for i in range(len(BATCHES)):
            assert_same(stream[i], take(ARRAYS, BATCHES[i]))


def test_reading_starts_anywhere_and_goes_on_from_there():
    with Stream(Arrays(ARRAYS), BATCHES, num_workers=2) as stream:
        for i in (7, 8, 9, 10):
            assert_same(stream[i], take(ARRAYS, BATCHES[i]))
        pids = stream.worker_pids
        for i in (18, 3, 4):
            assert_same(stream[i], take(ARRAYS, BATCHES[i]))
        assert not any(map(is_alive, pids))
        for wrong in (-1, 19):
            with pytest.raises(IndexError):
                stream[wrong]
        assert_same(stream[5], take(ARRAYS, BATCHES[5]))


def test_workers_read_in_turn_and_import_neither_jax_nor_the_program():
    """This process has imported both."""
    with Stream(Where(), Batches(8, 1, 8, shuffle=False), num_workers=2) as stream:
        seen = [stream[i] for i in range(8)]
        first, second = stream.worker_pids
    assert [int(batch["pid"][0]) for batch in seen] == [first, second] * 4
    assert {int(batch["heavy"][0]) for batch in seen} == {0}


def test_a_source_from_a_file_that_was_loaded_reaches_a_worker(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "from jaxnets import registry\n"
        "class Squares:\n"
        "    def __len__(self):\n"
        "        return 6\n"
        "    def __getitem__(self, i):\n"
        "        return {'x': np.int32(i * i)}\n"
        "registry.register('dataset', 'squares', Squares)\n"
    )
    registry.load_file(path)
    try:
        source = registry.get("dataset", "squares")()
        with Stream(source, Batches(6, 3, 6, shuffle=False), num_workers=1) as stream:
            assert stream[1]["x"].tolist() == [9, 16, 25]
    finally:
        registry.unload("dataset", "squares")


def test_workers_read_at_the_same_time(tmp_path):
    """Each example of a pair waits until the other one is being read."""
    batches = Batches(100, 1, 6, shuffle=False)
    with Stream(Marks(tmp_path, neighbour=1), batches, num_workers=2, prefetch=2) as stream:
        assert [int(stream[i]["x"][0]) for i in range(6)] == list(range(6))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_goes_on_ahead_of_use(num_workers, tmp_path):
    batches = Batches(100, 4, 40, shuffle=False)
    with Stream(Marks(tmp_path), batches, num_workers=num_workers, prefetch=4) as stream:
        _ = stream[0]
        # The end of the fourth batch, which nobody has asked for.
        assert wait_for((tmp_path / "15").exists, 60)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (errors.DataError("a.png: can't be read"), "a.png: can't be read"),
        (OSError("too\nlong"), "reading the data failed with OSError: too"),
    ],
)
def test_an_example_that_cannot_be_read(num_workers, fault, message):
    batches = Batches(1000, 4, 40, shuffle=False)
    with Stream(Slow(fault=(13, fault)), batches, num_workers=num_workers) as stream:
        for i in range(3):
            _ = stream[i]
        with pytest.raises(errors.DataError) as caught:
            _ = stream[3]
        assert str(caught.value) == message  # where it was raised stands in its notes, or its cause
        assert stream[4]["x"][0, 0] == 32  # what comes after it can be read


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_that_cannot_be_sent_says_what_it_was(num_workers):
    batches = Batches(1000, 1, 4, shuffle=False)
    with (
        Stream(Faulty(), batches, num_workers=num_workers) as stream,
        pytest.raises(errors.DataError) as caught,
    ):
        _ = stream[0]
    assert str(caught.value) == "reading the data failed with Unsendable: example 0 is gone"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_an_error_at_once(number):
    with Stream(Slow(seconds=0.02), Batches(1000, 4, 4000), num_workers=2) as stream:
        _ = stream[0], stream[1]
        victim = stream.worker_pids[1]
        threading.Timer(0.3, os.kill, (victim, number)).start()
        start = time.monotonic()
        with pytest.raises(errors.DataError) as caught:
            all(stream[i] for i in range(2, 1000))
        assert time.monotonic() - start < 3
    message = str(caught.value)
    assert message.startswith(
        f"data worker 2 of 2 (process {victim}) was killed by {signal.Signals(number).name} before batch"
    )
    assert "\n" not in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_while_workers_start_is_not_for_them(number, monkeypatch):
    """It may arrive before they have left the group."""
    start = subprocess.Popen

    def start_and_signal(*args, **options):
        process = start(*args, **options)
        process.send_signal(number)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    with Stream(Arrays(ARRAYS), BATCHES, num_workers=2) as stream:
        for i in range(4):
            assert_same(stream[i], take(ARRAYS, BATCHES[i]))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_worker_that_is_killed_while_it_is_waited_for():
    with Stream(Slow(seconds=1000), Batches(1000, 4, 4000), num_workers=1) as stream:
        threading.Timer(1.5, lambda: os.kill(stream.worker_pids[0], signal.SIGKILL)).start()
        start = time.monotonic()
        with pytest.raises(errors.DataError, match="killed by SIGKILL before batch 0"):
            _ = stream[0]
        assert time.monotonic() - start < 5


def test_closing_frees_a_thread_that_waits():
    stream = Stream(Slow(seconds=1000), Batches(1000, 4, 4000), num_workers=1)
    caught = []

    def wait():
        with pytest.raises(errors.DataError) as info:
            _ = stream[0]
        caught.append(info.value)

    thread = threading.Thread(target=wait)
    thread.start()
    assert wait_for(lambda: stream.worker_pids)
    stream.close()
    thread.join(5)
    assert caught
    with pytest.raises(errors.DataError, match="closed"):
        _ = stream[0]
    stream.close()


def test_a_stream_that_nobody_closes_ends_its_workers():
    stream = Stream(Slow(seconds=0.01), Batches(1000, 4, 40_000), num_workers=2)
    _ = stream[0]
    pids = stream.worker_pids
    assert all(map(is_alive, pids))
    del stream
    gc.collect()
    assert not any(map(is_alive, pids))


def test_sources_that_cannot_be_sent():
    class Open(Slow):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with (
        Stream(Open(), Batches(1000, 4, 40), num_workers=1) as stream,
        pytest.raises(errors.DataError, match=r"can't be sent to a worker .*num_workers=0"),
    ):
        _ = stream[0]


def test_numbers_that_cannot_be():
    with pytest.raises(errors.ConfigError, match="num_workers is -1"):
        Stream(Arrays(ARRAYS), BATCHES, num_workers=-1)
    with pytest.raises(errors.ConfigError, match="prefetch is -1"):
        Stream(Arrays(ARRAYS), BATCHES, prefetch=-1)
    with pytest.raises(errors.ConfigError, match="the batches are of 50 examples, the source has 3"):
        Stream(Arrays({"x": np.zeros(3)}), BATCHES)
    with (
        Stream(Arrays({"mask": np.zeros(50)}), BATCHES) as stream,
        pytest.raises(errors.ConfigError, match="can't be called mask"),
    ):
        _ = stream[0]


PARENT = """
import os, signal, sys, time
import numpy as np
from jaxnets.data import Arrays, Batches, Stream

class Big:
    def __len__(self): return 1000
    def __getitem__(self, i): return {"x": np.zeros(100_000)}  # workers block in the pipe

stream = Stream(Big(), Batches(1000, 8, 80_000), num_workers=2)
stream[0], stream[1]
print(*stream.worker_pids, flush=True)
"""
ENDINGS = {
    "normally": ("", 0),
    "by an exception": ("raise RuntimeError('so it goes')", 1),
    "by SIGTERM": ("time.sleep(60)", -signal.SIGTERM),
    "by SIGKILL": ("time.sleep(60)", -signal.SIGKILL),
    "by os._exit": ("os._exit(3)", 3),
    # A child that holds the pipes open beyond the parent's end.
    "by SIGKILL, survived by a fork": ("os.fork()\ntime.sleep(6)", -signal.SIGKILL),
}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("ending", ENDINGS)
def test_no_worker_outlives_its_parent(ending):
    code, status = ENDINGS[ending]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT + textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        if status < 0:
            assert all(map(is_alive, pids))
            time.sleep(0.2)
            parent.send_signal(-status)
        assert parent.wait(20) == status
        assert wait_for(lambda: not any(map(is_alive, pids)), seconds=4)
