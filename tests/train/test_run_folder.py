import contextlib
import errno
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import processes
import pytest

from jaxnets import errors
from jaxnets.train import folder_lock
from jaxnets.train.run_folder import open_run, read_config, write_config

VALUES = {"seed": 0, "epochs": 2, "model": "lenet"}


def run(folder, values=VALUES, experiment="digits", **options):
    with open_run(folder, experiment, values, **options) as opened:
        write_config(opened, experiment, values)


def test_the_same_config_goes_on_and_more_epochs_too(tmp_path):
    folder = tmp_path / "deep" / "run"
    run(folder)
    expected = {"experiment": "digits", "config": VALUES, "assets": {}, "data": {}}
    assert read_config(folder) == expected
    run(folder, {**VALUES, "epochs": 3})
    assert read_config(folder)["config"]["epochs"] == 3


def test_another_config_is_refused_with_what_differs(tmp_path):
    run(tmp_path / "r")
    other = {**VALUES, "seed": 1, "model": "mlp", "come_since": None}
    with pytest.raises(errors.ConfigError, match=r"seed 0 -> 1, model 'lenet' -> 'mlp'; ") as error:
        run(tmp_path / "r", other)
    assert "\n" not in str(error.value)
    assert read_config(tmp_path / "r")["config"] == VALUES
    run(tmp_path / "r", other, allow_change=True)
    assert read_config(tmp_path / "r")["config"] == other
    with pytest.raises(errors.ConfigError, match="holds a run of digits, not of cifar10"):
        run(tmp_path / "r", other, experiment="cifar10", allow_change=True)


def test_no_resume_moves_the_earlier_run_aside(tmp_path):
    for number in range(3):
        with open_run(tmp_path / "r", "digits", VALUES, resume=False) as folder:
            write_config(folder, "digits", VALUES)
            (folder / "result.json").write_text(str(number))
    assert (tmp_path / "r" / "result.json").read_text() == "2"
    assert (tmp_path / "r.1" / "result.json").read_text() == "0"
    assert (tmp_path / "r.2" / "result.json").read_text() == "1"
    assert read_config(tmp_path / "r.2")["config"] == VALUES


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.ConfigError, match="is a file"):
        run(tmp_path / "file")
    with pytest.raises(errors.ConfigError, match="can't be written"):
        run(tmp_path / "file" / "below")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(errors.ConfigError, match=r"not the folder of a run.*chapter.tex"):
        run(tmp_path / "thesis", resume=False)
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


@pytest.mark.parametrize("name", ["config.json.tmp", ".lock", "duel.json"])
def test_what_a_kill_or_a_duel_left_is_no_obstacle(tmp_path, name):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).write_text("{")
    run(tmp_path / "r")
    assert read_config(tmp_path / "r")["config"] == VALUES


@pytest.mark.parametrize("text", ["", "{", "[]", '{"experiment": 1}'])
def test_a_damaged_config(tmp_path, text):
    run(tmp_path / "r")
    (tmp_path / "r" / "config.json").write_text(text)
    with pytest.raises(errors.ConfigError, match="is damaged"):
        run(tmp_path / "r")
    assert (tmp_path / "r" / "config.json").read_text() == text


def test_two_processes_cannot_share_a_folder(tmp_path):
    with open_run(tmp_path / "r", "digits", VALUES):
        script = f"""
            from jaxnets import errors
            from jaxnets.train.run_folder import open_run
            try:
                with open_run(__import__("pathlib").Path({str(tmp_path / "r")!r}), "digits", {VALUES!r}):
                    print("opened")
            except errors.ConfigError as error:
                print(error)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
        )
    assert f"another process (process {os.getpid()} on {socket.gethostname()}) is running" in done.stdout
    run(tmp_path / "r")


def test_a_folder_that_may_not_be_written(tmp_path):
    """As an unprivileged user: root may write anywhere."""
    locked = tmp_path / "locked"
    locked.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o055)
    locked.chmod(0o555)
    script = f"""
        import os, pathlib
        from jaxnets import errors
        from jaxnets.train.run_folder import open_run
        if os.geteuid() == 0:
            os.setgid(65534); os.setuid(65534)
        for name in (".", "below"):
            try:
                with open_run(pathlib.Path({str(locked)!r}) / name, "digits", {json.dumps(VALUES)}):
                    print("opened")
            except errors.ConfigError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2, done.stderr
    assert all("can't be written: Permission denied" in line for line in lines)


def refusal(folder):
    with pytest.raises(errors.ConfigError) as error:
        run(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_places_where_no_run_can_be(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "loop")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "loop" / "below")
    assert f"is a link to {tmp_path / 'gone'}, which isn't there" in refusal(tmp_path / "nowhere")
    assert "Not a directory" in refusal(tmp_path / "file" / "below")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    # Long enough for a run, and too long for what a checkpoint holds.
    room = os.pathconf(tmp_path, "PC_PATH_MAX") - 60
    long = tmp_path
    while len(str(long)) < room - 201:
        long /= "y" * 200
    long /= "z" * (room - len(str(long)) - 1)
    assert "File name too long" in refusal(long)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop", "nowhere", "y" * 200]
    run(tmp_path / "r")
    (tmp_path / "r" / "checkpoints").write_text("x")
    assert "checkpoints is a file" in refusal(tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    run(pathlib.Path("a") / "b" / "c")
    assert sorted(p.name for p in (tmp_path / "a" / "b" / "c").iterdir()) == [".lock", "config.json"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(path):
    """Write until nothing more fits."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while os.write(descriptor, b"x" * 4096):
            pass
    os.close(descriptor)


def test_a_disk_that_is_full_or_may_only_be_read(small_disk):
    """At once, not at the first save; and what is there stays as it is."""
    folder = small_disk / "r"
    run(folder)
    (folder / "checkpoints" / "00000003").mkdir(parents=True)
    (folder / "checkpoints" / "00000003" / "manifest.json").write_text("x")
    fill(small_disk / "big")
    assert "can't be written: No space left on device" in refusal(folder)
    (small_disk / "big").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "can't be written: Read-only file system" in refusal(folder)
    names = {p.name for p in folder.rglob("*")}
    assert names == {".lock", "config.json", "checkpoints", "00000003", "manifest.json"}


OTHER = {"host": "elsewhere", "boot": "1234", "pid": 7, "run": "abc"}


def test_a_lock_of_another_host_counts_until_it_is_silent(tmp_path, monkeypatch, sleeps, capsys):
    """Whose kernel's own lock may not show here; the clock of this host plays no part."""
    run(tmp_path / "r")
    lock = tmp_path / "r" / ".lock"
    now = lock.stat().st_mtime
    monkeypatch.setattr("time.time", lambda: now + 1e6)
    for age, wait in ((0, 60), (50, 10), (70, 0), (1e6, 0), (-1e4, 0)):
        lock.write_text(json.dumps(OTHER))
        os.utime(lock, (lock.stat().st_mtime - age,) * 2)
        begun = sleeps.now
        with pytest.warns(UserWarning, match=r"process 7 on elsewhere.*silent.*taking it over"):
            run(tmp_path / "r")
        assert sleeps.now - begun == pytest.approx(wait, abs=1)
        said = capsys.readouterr().err
        assert ("waiting up to" in said) == (wait > 0)
        assert not wait or "the lock of process 7 on elsewhere, silent for" in said
        assert lock.read_text() == ""  # and given back
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [".lock", "config.json"]


def test_a_lock_of_another_host_that_beats_is_refused(tmp_path, sleeps):
    run(tmp_path / "r")
    lock = tmp_path / "r" / ".lock"
    third = {**OTHER, "host": "third"}
    for happens, owner in (
        (lambda: os.utime(lock), OTHER),  # it beats
        (lambda: lock.write_text(json.dumps(third)), third),  # who waited too was faster
    ):
        lock.write_text(json.dumps(OTHER))
        os.utime(lock, (lock.stat().st_mtime - 50,) * 2)
        sleeps.events = [lambda: None, happens]
        assert f"process 7 on {owner['host']}) is running" in refusal(tmp_path / "r")
        assert not sleeps.events
        assert json.loads(lock.read_text()) == owner
    lock.write_text(json.dumps(OTHER))
    sleeps.events = [lambda: lock.write_text("")]  # it ends
    run(tmp_path / "r")
    assert not sleeps.events


def test_a_signal_ends_the_wait_for_a_lock(tmp_path):
    """It isn't training yet, and nothing is to be saved."""
    script = """
        import pathlib, signal, sys
        from jaxnets.train.folder_lock import locked
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
        with locked(pathlib.Path(sys.argv[1])):
            pass
    """
    waiting = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / ".lock").write_text(json.dumps(OTHER))
        command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
        waiting[number] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for number, process in waiting.items():
        with process:
            assert "waiting up to" in process.stderr.readline()
            process.send_signal(number)
            assert process.wait(30) == -number
        assert json.loads((tmp_path / str(number) / ".lock").read_text()) == OTHER


def test_without_locks_of_the_file_system_the_heartbeat_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with open_run(tmp_path / "r", "digits", VALUES):
        assert f"process {os.getpid()} on " in refusal(tmp_path / "r")
    run(tmp_path / "r")
    dead = {**folder_lock._me(), "born": "1"}  # another process has its number now
    (tmp_path / "r" / ".lock").write_text(json.dumps(dead))
    run(tmp_path / "r")


def test_the_heartbeat(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.01)
    left = []
    monkeypatch.setattr(folder_lock, "_leave", lambda: left.append(True))
    lock = tmp_path / "r" / ".lock"

    def wait_for(condition):
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    with open_run(tmp_path / "r", "digits", VALUES):
        os.utime(lock, (1e9, 1e9))
        wait_for(lambda: lock.stat().st_mtime > 1.1e9)
        lock.write_text(json.dumps(OTHER))  # as another host does after a minute
        said = []
        wait_for(lambda: said.append(capsys.readouterr().err) or "took over" in "".join(said))
        assert "process 7 on elsewhere took over" in "".join(said)
        wait_for(lambda: left)
    assert json.loads(lock.read_text()) == OTHER  # it is not ours to give back


def test_a_killed_run_leaves_no_lock(tmp_path):
    script = f"""
        import pathlib, time
        from jaxnets.train.run_folder import open_run
        with open_run(pathlib.Path({str(tmp_path / "r")!r}), "digits", {VALUES!r}):
            print("open", flush=True)
            time.sleep(600)
    """
    with processes.Processes(script, 1, joined=False) as started:
        started.wait_for(0, "open")
        pid = started.processes[0].pid
        assert f"another process (process {pid} on {socket.gethostname()}) is running" in refusal(
            tmp_path / "r"
        )
        started.send(0)
        started.wait()
        run(tmp_path / "r")  # at once, and with no word of it


HOSTS = """
    import json, pathlib
    from jaxnets import errors
    from jaxnets.train import MetricsLog, metrics_log, run_folder
    from jaxnets.train.run_folder import open_run, write_config

    folder, me = pathlib.Path({folder!r}), hosts.index()
    run_folder._PATIENCE_S = 0.5
    shown = metrics_log._shown

    def late(*args):  # the first process is writing already
        hosts.barrier("appended")
        return shown(*args)

    metrics_log._shown = late

    def error_of(folder, **options):
        try:
            with open_run(folder, "digits", {values!r}, **options):
                return None
        except errors.UserError as error:
            return str(error)

    def say(name, value):
        print("SAID " + json.dumps([name, value]), flush=True)

    say("own", error_of(folder / str(me)))
    say("used", error_of(folder / "used"))
    for start in (0, 2):
        with open_run(folder / "r", "digits", {values!r}) as opened:
            say("other", error_of(folder / "r"))
            write_config(opened, "digits", {values!r})
            log = MetricsLog(opened, step=start)
            say("before", log.rows)
            for step in range(start + 1, start + 4):
                log.write(step, {{"loss": 1 / step, "me": float("nan")}})
                if me == 0 and step == start + 1:
                    hosts.barrier("appended")
            log.sync()
            hosts.barrier("written")
            if me == 0:
                with (opened / "metrics.jsonl").open("a") as file:
                    file.write('{{"step": 3, "lo')
            log.close()
            say("rows", log.rows)
    say("changed", error_of(folder / "r"))
    with open_run(folder / "r", "digits", {values!r}, resume=False):
        say("aside", sorted(p.name for p in folder.iterdir()))
"""


def test_two_processes_have_one_folder(tmp_path):
    """Only the first one writes, and what it is refused both are refused."""
    for name in ("0", "1"):  # the same path, and each host has its own behind it
        (tmp_path / name).mkdir()
    with open_run(tmp_path / "used", "digits", VALUES):
        ended = processes.run(HOSTS.format(folder=str(tmp_path), values=VALUES), 2, timeout=60)
    said = [[line for line in e.out.splitlines() if line.startswith("SAID")] for e in ended]
    pairs = [tuple(json.loads(line[5:]) for line in lines) for lines in zip(*said, strict=True)]
    assert len(pairs) == 10
    assert all(one == two for one, two in pairs)
    found = [one for one, _ in pairs]
    assert "process 1: the run folder " in found[0][1]
    assert "choose a --run-dir that all hosts share" in found[0][1]
    assert f"another process (process {os.getpid()} on " in found[1][1]
    assert "another process (process " in found[2][1]
    rows = [value for name, value in found if name == "rows"]
    assert [row["step"] for row in rows[0]] == [1, 2, 3]
    assert dict(found[6:7])["before"] == rows[0][:2]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4, 5]
    assert found[-1] == ["aside", ["0", "1", "r", "r.1", "used"]]
    assert sorted(p.name for p in (tmp_path / "r.1").iterdir()) == [
        "config.json", "metrics.csv", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip
    lines = (tmp_path / "r.1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2, 3, 4, 5]
