"""The metrics of a run in three forms: JSON lines, a table, and TensorBoard events.

`metrics.jsonl` is the record; it holds no times, so that two runs which compute the same write the
same bytes. `metrics.csv` is the same as a table, and both are cut back to the restored step when a run
is resumed. TensorBoard hides by itself what a resumed run wrote before. The first two are the record:
a run that can't write it ends; without events it goes on.

Of several processes the first one writes; all keep the rows, which are the same.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from jaxnets import errors
from jaxnets.train import hosts
from jaxnets.train.events import Events
from jaxnets.train.files import open_to_append, sync_open, write_atomically
from jaxnets.train.verdict import by_first

_PATIENCE_S = 20.0  # until a file shows on another host
Row = dict[str, float | None]


class MetricsLog:
    """Open the log of a run for writing after a step.

    Args:
        folder: of the run; it exists.
        step: the step that the run goes on from; rows behind it are taken out.
    """

    def __init__(self, folder: Path, *, step: int):
        self._jsonl, self._csv = folder / "metrics.jsonl", folder / "metrics.csv"
        self._columns: list[str] = []
        self.rows: list[Row] = []
        self._step = step
        self._events = Events(folder / "tensorboard", step)
        size, digest = by_first("metrics/cut", self._cut)
        if hosts.is_first():
            self._lines = open_to_append(self._jsonl)
            self._table = open_to_append(self._csv)
        else:
            self.rows = _rows(_shown(self._jsonl, size, digest), self._jsonl)

    def _cut(self) -> tuple[int, str]:
        """Take out what is behind the step; how long the record is then, and its digest."""
        self.rows = _rows_until(self._jsonl, self._step)
        content = "".join(_line(row) for row in self.rows).encode()
        write_atomically(self._jsonl, content)
        self._rewrite_table()
        return len(content), hashlib.sha256(content).hexdigest()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row, which on a disk no kill loses then. Non-finite values become null."""
        row = {"step": step, **{name: _finite(value) for name, value in values.items()}}
        self.rows.append(row)
        if not hosts.is_first():
            return
        if set(row) <= set(self._columns):
            self._table.write(self._cells(row))
            self._table.flush()
        else:
            self._table.close()
            self._rewrite_table()
            self._table = open_to_append(self._csv)
        self._lines.write(_line(row))
        self._lines.flush()
        self._events.add(step, values)

    def sync(self) -> None:
        """Make sure that even a power cut loses none of the rows so far."""
        if not hosts.is_first():
            return
        for file in (self._lines, self._table):
            sync_open(file)
        self._events.flush()

    def close(self) -> None:
        """Sync and close the files."""
        self.sync()
        if not hosts.is_first():
            return
        self._lines.close()
        self._table.close()
        self._events.close()

    def _rewrite_table(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step"]
        header = self._cells(dict(zip(self._columns, self._columns, strict=True)))
        write_atomically(self._csv, header + "".join(self._cells(row) for row in self.rows))

    def _cells(self, row: Mapping[str, float | str | None]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a kill cut off is left out.

    Raises:
        ConfigError: if another line can't be read.
    """
    return _rows(path.read_bytes() if path.exists() else b"", path)


def _rows(content: bytes, path: Path) -> list[Row]:
    rows: list[Row] = []
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row.pop("step")), **row})
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                break
            raise errors.ConfigError(f"{path}, line {number}: not a row of metrics") from None
    return rows


def _rows_until(path: Path, step: int) -> list[Row]:
    return [row for row in read_rows(path) if (row["step"] or 0) <= step]


def _shown(path: Path, size: int, digest: str) -> bytes:
    """The beginning of a file as another host has written it, once it shows here."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        with contextlib.suppress(OSError), path.open("rb") as file:
            content = file.read(size)
            if hashlib.sha256(content).hexdigest() == digest:
                return content
        if time.monotonic() > end:
            raise errors.HostError(f"process {hosts.index()} doesn't see {path} as process 0 wrote it")
        time.sleep(0.1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(row: Mapping[str, float | None]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
