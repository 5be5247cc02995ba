"""TensorBoard's events: a convenience, which can neither stop nor hold up a run."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxnets.errors import first_line
from jaxnets.train.files import Staged

_PATIENCE_S = 30.0  # at the end, for a store that doesn't answer


class Events:
    """Scalars for TensorBoard, of a run that goes on after a step; what it shows behind that is hidden.

    Nothing raises: if they can't be written there is one warning, and no more of them. They are written
    where they are given, since tensorboardX's own thread would die of a full disk, and who adds to its
    queue then would wait for ever.

    Args:
        folder: made with the first scalars.
        step: the one that the run goes on from.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._step = folder, step
        self._writer: Any = None
        self._staged: Staged | None = None
        self._has_failed = False
        self._upload: threading.Thread | None = None
        self._error: Exception | None = None  # of the upload

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the scalars of a step."""
        self._try(lambda: self._add(step, values))

    def flush(self) -> None:
        """Bring what was added to the disk, or begin to upload it unless an upload is under way."""
        self._try(self._flush)

    def close(self) -> None:
        """Flush, and close the file."""
        self._try(self._close)

    def _try(self, work: Any) -> None:
        if self._has_failed:
            return
        try:
            work()
        except Exception as error:
            self._has_failed = True
            if self._writer:
                with contextlib.suppress(Exception):
                    self._writer.close()
            warnings.warn(
                f"TensorBoard's events can't be written to {self._folder}: {first_line(error)}; the run "
                "goes on without them, and metrics.jsonl has everything",
                UserWarning,
                stacklevel=4,
            )

    def _flush(self) -> None:
        if self._writer and self._staged:
            self._writer.flush()
            if not (self._upload and self._upload.is_alive()):
                self._begin(self._staged.push)

    def _close(self) -> None:
        if self._writer and self._staged:
            self._writer.close()
            end = time.monotonic() + _PATIENCE_S
            self._wait(end)
            self._begin(self._staged.close)
            self._wait(end)

    def _begin(self, work: Callable[[], None]) -> None:
        """Start an upload, of which there is none under way."""
        if self._error:
            raise self._error

        def upload() -> None:
            try:
                work()
            except Exception as error:
                self._error = error

        self._upload = threading.Thread(target=upload, name="events", daemon=True)
        self._upload.start()

    def _wait(self, end: float) -> None:
        if self._upload:
            self._upload.join(max(0.0, end - time.monotonic()))
            if self._upload.is_alive():
                raise TimeoutError(f"no answer for {_PATIENCE_S:g} s")
        if self._error:
            raise self._error

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        # Only here: it imports PyTorch where that is installed, and sets an environment variable. Only
        # with the first row, so that the first step need not wait for it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        proto: Any = event_pb2  # its names are made when it is imported

        def write(step: int, **content: Any) -> None:
            # A time to be shown: nothing is decided by it.
            self._writer.write_event(proto.Event(wall_time=time.time_ns() / 1e9, step=step, **content))

        if self._writer is None:
            self._staged = Staged(self._folder)
            self._staged.path.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._staged.path / "events"))
            write(self._step + 1, session_log=proto.SessionLog(status=proto.SessionLog.START))
        for name, value in values.items():
            write(step, summary=scalar(name, value))
