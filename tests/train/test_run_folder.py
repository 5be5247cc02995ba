import json
import os
import subprocess
import sys
import textwrap

import pytest

from jaxnets import errors
from jaxnets.train.run_folder import open_run, read_config, write_config

VALUES = {"seed": 0, "epochs": 2, "model": "lenet"}


def run(folder, values=VALUES, experiment="digits", **options):
    with open_run(folder, experiment, values, **options) as opened:
        write_config(opened, experiment, values)


def test_the_same_config_goes_on_and_more_epochs_too(tmp_path):
    folder = tmp_path / "deep" / "run"
    run(folder)
    assert read_config(folder) == {"experiment": "digits", "config": VALUES}
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
    assert f"another process (process {os.getpid()}) is running" in done.stdout
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
