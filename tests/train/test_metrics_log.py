import csv
import json
import threading

import pytest

from jaxnets import errors
from jaxnets.train.metrics_log import MetricsLog, read_rows


def write(folder, steps, start=0, evaluate=()):
    log = MetricsLog(folder, step=start)
    for step in steps:
        log.write(step, {"loss": 1 / step, "accuracy": step / 10})
        if step in evaluate:
            log.write(step, {"eval/loss": 2 / step})
    log.close()
    return log


def both(folder):
    return (folder / "metrics.jsonl").read_bytes(), (folder / "metrics.csv").read_bytes()


def test_three_forms_of_the_same(tmp_path):
    write(tmp_path, [1, 2, 3], evaluate=[2])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, "loss": 1.0, "accuracy": 0.1}
    assert rows[2] == {"step": 2, "eval/loss": 1.0}
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table[2] == {"step": "2", "loss": "", "accuracy": "", "eval/loss": "1.0"}
    assert len(table) == 4

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert events.Scalars("eval/loss")[0].value == 1.0


@pytest.mark.parametrize("stop", range(1, 6))
@pytest.mark.parametrize("restored", range(6))
def test_a_resumed_log_equals_an_unbroken_one(tmp_path, stop, restored):
    if restored > stop:
        return
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", range(1, 7), evaluate=[3, 6])
    write(tmp_path / "parts", range(1, stop + 1), evaluate=[3, 6])
    write(tmp_path / "parts", range(restored + 1, 7), start=restored, evaluate=[3, 6])
    assert both(tmp_path / "whole") == both(tmp_path / "parts")


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    write(tmp_path, [3], start=2)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    write(tmp_path, [1, 2, 3])
    text = (tmp_path / "metrics.jsonl").read_text().replace('"step": 2', '"stop": 2')
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(errors.ConfigError, match=r"metrics.jsonl, line 2"):
        MetricsLog(tmp_path, step=3)


def test_non_finite_values_become_null(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.write(1, {"eval/loss": float("inf")})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "eval/loss": None}]


def test_events_that_cannot_be_written_are_one_warning(tmp_path, monkeypatch):
    """F39: from the beginning, as there is a file in their place, and from some row on."""
    (tmp_path / "tensorboard").write_text("")
    with pytest.warns(
        UserWarning, match=r"events can't be written to .*tensorboard: File exists"
    ) as told:
        write(tmp_path, [1, 2, 3], evaluate=[2])
    assert len(told) == 1
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]
    (tmp_path / "tensorboard").unlink()

    def full(self, content):
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, step=3)
    log.write(4, {"loss": 1.0})
    log.sync()
    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
    with pytest.warns(UserWarning, match="No space left on device; the run goes on without"):
        log.write(5, {"loss": 1.0})
    for step in range(6, 50):  # more than any queue holds, and no other warning, which would be an error
        log.write(step, {"loss": 1.0})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl")[-1] == {"step": 49, "loss": 1.0}


class Slow:
    """A folder whose uploads wait, or fail."""

    def __init__(self, path, error=None):
        self.path, self.error = path, error
        self.go_on, self.num_pushes, self.is_closed = threading.Event(), 0, False

    def push(self):
        self.num_pushes += 1
        if self.error:
            raise self.error
        self.go_on.wait()

    def close(self):
        self.push()
        self.is_closed = True


def staged_in(monkeypatch, folder):
    monkeypatch.setattr("jaxnets.train.events.Staged", lambda path: folder)


def test_a_store_that_is_silent_holds_up_no_run(tmp_path, monkeypatch):
    folder = Slow(tmp_path / "here")
    staged_in(monkeypatch, folder)
    log = MetricsLog(tmp_path, step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
        log.sync()
    assert folder.num_pushes == 1  # one at a time
    monkeypatch.setattr("jaxnets.train.events._PATIENCE_S", 0.0)
    with pytest.warns(UserWarning, match="no answer for 0 s; the run goes on without") as told:
        log.close()
    assert len(told) == 1
    folder.go_on.set()


def test_the_last_upload_is_waited_for(tmp_path, monkeypatch):
    folder = Slow(tmp_path / "here")
    staged_in(monkeypatch, folder)
    log = MetricsLog(tmp_path, step=0)
    log.write(1, {"loss": 1.0})
    log.sync()
    folder.go_on.set()
    log.close()
    assert folder.is_closed


def test_an_upload_that_fails_is_one_warning(tmp_path, monkeypatch):
    staged_in(monkeypatch, Slow(tmp_path / "here", OSError(121, "the store answers 503")))
    with pytest.warns(UserWarning, match="the store answers 503; the run goes on without") as told:
        write(tmp_path, [1])
    assert len(told) == 1
