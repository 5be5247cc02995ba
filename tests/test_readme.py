"""What the README shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_loop_runs_and_learns(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert 30 <= len(code.strip().splitlines()) <= 55
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"'accuracy': ([\d.]+)", done.stdout)[1])
    assert accuracy > 0.9
    assert "'count': 359" in done.stdout


def test_the_commands_that_it_names_are_there():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)  ", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in set(re.findall(r"experiments\.(\w+)", readme)):
        assert (ROOT / "experiments" / f"{name}.py").exists()
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_lists_what_there_is():
    done = subprocess.run(
        [sys.executable, "-m", "jaxnets", "list"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    for row in (["model", "lenet"], ["loss", "huber"], ["experiment", "digits"]):
        assert row in rows
    wrong = subprocess.run(
        [sys.executable, "-m", "jaxnets", "lits"], cwd=ROOT, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "did you mean 'list'?" in wrong.stderr
