"""One contender of the duel: a process that trains when it is told to, and reports its time.

The parent writes a line of JSON to its standard input for each command and reads a line back. The
process ends when its standard input does, whatever it is doing, so it never outlives the parent. A
process for each contender: thread pools don't mix, a peak of memory belongs to one of them, and
PyTorch's processes never import JAX.
"""

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from jaxnets.allocator import keep_freed_memory, release_freed_memory
from jaxnets.interop.jax_side import JaxSide
from jaxnets.interop.measure import NUM_VALUES, peak_bytes
from jaxnets.interop.torch_side import TorchSide


class Session:
    """Answers the parent's commands in turn: start, first, check_bound, check, run, memory, ceiling."""

    def __init__(self) -> None:
        self.side: Any = None
        self.next = 0

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a command says."""
        return getattr(self, f"do_{command['do']}")(command)

    def do_start(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Import, load the data and the weights."""
        kind = JaxSide if command["side"] == "jax" else TorchSide
        self.side = kind(command["spec"])
        return {
            "settings": self.side.settings,
            "memory": {
                "after_imports_bytes": self.side.after_imports,
                "loaded_bytes": peak_bytes(),
            },
        }

    def do_first(self, _command: Mapping[str, Any]) -> dict[str, Any]:
        """The first call, with its compilation, and a few more steps; their values."""
        start = time.perf_counter()
        values = self.side.first()
        seconds, hits = time.perf_counter() - start, self.side.cache_hits
        self.next = len(values)
        while len(values) < NUM_VALUES:
            values.append(self._run(1)[1])
        return {"seconds": seconds, "values": values[:NUM_VALUES], "cache_hits": hits}

    def do_run(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Train or predict for a number of steps."""
        seconds, values = self._run(command["steps"])
        return {"seconds": seconds, "is_finite": all(map(math.isfinite, values))}

    def _run(self, steps: int) -> tuple[float, list[float]]:
        """Seconds, and the last step's loss, or its logits."""
        start = time.perf_counter()
        out = self.side.run(self.next, self.next + steps)
        values = self.side.finish(out)
        seconds = time.perf_counter() - start
        self.next += steps
        return seconds, values

    def do_check(self, _command: Mapping[str, Any]) -> dict[str, Any]:
        """What is farthest from the plain variant's, and how far."""
        found = self.side.check()
        release_freed_memory()  # the check takes twice the memory of a step
        return found

    def do_check_bound(self, _command: Mapping[str, Any]) -> dict[str, Any]:
        """How far that may be."""
        return self.side.check_bound()

    def do_memory(self, _command: Mapping[str, Any]) -> dict[str, Any]:
        """The peak so far."""
        on_device = self.side.device_peak_bytes() if self.side else None
        return {"peak_bytes": peak_bytes(), "device_peak_bytes": on_device}

    def do_ceiling(self, _command: Mapping[str, Any]) -> dict[str, Any]:
        """What a matrix product and a copy reach."""
        return self.side.ceiling()


def main() -> None:
    """Serve until standard input ends."""
    keep_freed_memory()  # on both sides, before either starts threads
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    commands: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    session = Session()
    while True:
        try:
            reply = session.answer(commands.get())
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reply = {"error": f"{type(error).__name__}: {lines[0]}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
