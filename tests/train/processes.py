"""Several processes of one run, started and ended by a test: they stand in for hosts.

    ended = processes.run("print(hosts.index())", 2)

Each is a Python of its own with a few CPU devices; all have joined one coordinator before the script
begins. None outlives the test: waiting has a limit, and leaving the `with` statement kills what is left.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

_JOIN = """\
import sys
sys.path[:0] = {path!r}
from jaxnets.train import hosts
hosts.join({coordinator!r}, {num_processes}, {index}, timeout_s=60, heartbeat_s={heartbeat_s})
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, -n after signal n, and what it wrote."""

    index: int
    code: int
    out: str
    err: str


class Processes:
    """Start the same script in several processes; use it in a `with` statement.

    Args:
        script: Python, dedented. `hosts` is there, and what lies in tests/train can be imported.
        num_processes: how many.
        devices: of each process.
        heartbeat_s: how long one may be silent before the others end.
        joined: whether they join a coordinator; otherwise `hosts` isn't even imported.
        env: more environment variables.
    """

    def __init__(self, script, num_processes=2, *, devices=2, heartbeat_s=10, joined=True, env=None):
        self.coordinator = f"127.0.0.1:{_free_port()}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # One that is killed must not leave half an entry in the cache that the tests share.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        self._folder = tempfile.TemporaryDirectory(prefix="jaxnets-processes-")
        self.processes = []
        for index in range(num_processes):
            before = _JOIN.format(
                path=[str(ROOT), str(Path(__file__).parent)],
                coordinator=self.coordinator,
                num_processes=num_processes,
                index=index,
                heartbeat_s=heartbeat_s,
            )
            lines = before if joined else "".join(before.splitlines(keepends=True)[:2])
            files = [self._file(index, name).open("w") for name in ("out", "err")]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", lines + textwrap.dedent(script)],
                    cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                    stdout=files[0], stderr=files[1],
                )
            )  # fmt: skip
            for file in files:
                file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._folder.cleanup()

    def send(self, index, number=signal.SIGKILL):
        """Send a signal to one of them."""
        self.processes[index].send_signal(number)

    def written(self, index, name="out"):
        """What one has written so far, to "out" or "err"."""
        return self._file(index, name).read_text(errors="replace")

    def wait_for(self, index, text, timeout=60.0):
        """Wait until one has written this to its output."""
        end = time.monotonic() + timeout
        while text not in self.written(index):
            if self.processes[index].poll() is not None or time.monotonic() > end:
                raise AssertionError(
                    f"process {index} never wrote {text!r}: {self.written(index, 'err')}"
                )
            time.sleep(0.01)

    def wait(self, timeout=120.0):
        """Wait until all have ended; those that haven't in this time are killed, which is an error.

        Returns:
            a list of `Ended`.
        """
        end = time.monotonic() + timeout
        late = []
        for index, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(index)
        for index in late:
            self.processes[index].kill()
            self.processes[index].wait()
        ended = [
            Ended(index, process.returncode, self.written(index), self.written(index, "err"))
            for index, process in enumerate(self.processes)
        ]
        if late:
            wrote = "\n".join(f"--- {e.index}:\n{e.out}{e.err[-3000:]}" for e in ended)
            raise AssertionError(f"processes {late} did not end within {timeout:g} s\n{wrote}")
        return ended

    def _file(self, index, name):
        return Path(self._folder.name, f"{index}.{name}")


def run(script, num_processes=2, *, timeout=120.0, code=0, **options):
    """Run a script in several processes to its end.

    Args:
        script: see `Processes`.
        num_processes: how many.
        timeout: in seconds, for all.
        code: the exit status that all must have; None for any.
        **options: of `Processes`.

    Returns:
        a list of `Ended`.
    """
    with Processes(script, num_processes, **options) as processes:
        ended = processes.wait(timeout)
    for e in ended:
        assert code is None or e.code == code, f"process {e.index} ended with {e.code}: {e.err[-3000:]}"
    return ended


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
