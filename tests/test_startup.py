"""What a command does about compiled programs, and what it says of its start."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax._src import monitoring

from experiments import cifar10
from jaxnets import cli, startup

ROOT = Path(cifar10.__file__).parents[1]
SMALL = [
    *("train", "--no-pictures", "--dataset", "digits", "--model", "mlp", "--batch-size", "64"),
    *("--steps", "3", "--num-devices", "1"),
]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def result_of(folder):
    return json.loads((Path(folder) / "result.json").read_text())


def test_a_second_start_compiles_nothing(tmp_path, capsys):
    options, listeners = dict(jax.config.values), len(monitoring.get_event_listeners())
    for name in ("one", "two", "three"):
        before = time.perf_counter()
        words = [*SMALL, "--run-dir", name, "--program-cache", "programs"]
        assert cli.main(cifar10.EXPERIMENT, words) == 0
        assert 0 < result_of(name)["seconds_to_first_step"] < time.perf_counter() - before
        assert "s of compilation, first step after " in capsys.readouterr().out
        assert dict(jax.config.values) == options
        assert len(monitoring.get_event_listeners()) == listeners
    one, two, three = map(result_of, ("one", "two", "three"))
    assert one["compile_cache"]["hits"] == 0
    assert one["compile_cache"]["misses"] > 2
    assert two["compile_cache"]["hits"] > 2
    assert two["compile_cache"]["misses"] == 0
    assert three["compile_cache"] == two["compile_cache"]
    assert Path(two["compile_cache"]["folder"]).parent == tmp_path / "programs"
    assert one["eval"] == two["eval"]
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()


def test_a_resumed_run_counts_its_own_start(tmp_path):
    assert cli.main(cifar10.EXPERIMENT, [*SMALL, "--run-dir", "r"]) == 0
    first = result_of("r")["seconds_to_first_step"]
    assert cli.main(cifar10.EXPERIMENT, [*SMALL, "--run-dir", "r"]) == 0
    assert result_of("r")["seconds_to_first_step"] == first  # nothing was trained
    assert cli.main(cifar10.EXPERIMENT, [*SMALL, "--run-dir", "r", "--steps", "5"]) == 0
    assert result_of("r")["seconds_to_first_step"] not in (first, None)


def test_switched_off(tmp_path):
    words = [*SMALL, "--run-dir", "r", "--program-cache", "programs", "--no-cache-programs"]
    assert cli.main(cifar10.EXPERIMENT, words) == 0
    assert result_of("r")["compile_cache"] is None
    assert not (tmp_path / "programs").exists()


@pytest.mark.filterwarnings("default:compiled programs are not kept")
def test_a_cache_that_can_not_be_is_a_warning(tmp_path, capsys):
    (tmp_path / "programs").write_text("a file")
    assert cli.main(cifar10.EXPERIMENT, [*SMALL, "--run-dir", "r", "--program-cache", "programs"]) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning:")]
    assert lines == [f"warning: compiled programs are not kept in {tmp_path}/programs: File exists"]
    assert result_of("r")["compile_cache"] is None


def test_damaged_entries_do_not_stop_a_run(tmp_path, capsys):
    words = [*SMALL, "--program-cache", "programs"]
    assert cli.main(cifar10.EXPERIMENT, [*words, "--run-dir", "one"]) == 0
    for path in (tmp_path / "programs").glob("*/*-cache"):
        path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert cli.main(cifar10.EXPERIMENT, [*words, "--run-dir", "two"]) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning:")]
    assert len(lines) == 1
    assert "can't be read and is compiled again" in lines[0]
    assert cli.main(cifar10.EXPERIMENT, [*words, "--run-dir", "three"]) == 0
    assert "warning:" not in capsys.readouterr().err
    assert result_of("three")["compile_cache"]["misses"] == 0
    assert result_of("one")["eval"] == result_of("two")["eval"] == result_of("three")["eval"]


def test_eval_uses_the_cache_too(tmp_path):
    assert cli.main(cifar10.EXPERIMENT, [*SMALL, "--run-dir", "r", "--no-cache-programs"]) == 0
    words = ["eval", "--run-dir", "r", "--program-cache", "programs"]
    assert cli.main(cifar10.EXPERIMENT, words) == 0
    assert list((tmp_path / "programs").glob("*/*-cache"))


def fresh(tmp_path, *words):
    """In a process whose user has set nothing, with a home of its own."""
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_command_as_it_is_typed(tmp_path):
    before = time.perf_counter()
    words = ["-m", "experiments.cifar10", *SMALL, "--run-dir", str(tmp_path / "r")]
    fresh(tmp_path, *words)
    result = result_of(tmp_path / "r")
    folder = Path(result["compile_cache"]["folder"])
    assert folder.parent == tmp_path / ".cache" / "jaxnets" / "xla"
    assert result["compile_cache"]["misses"] == len(list(folder.glob("*-cache"))) > 2
    assert 0 < result["seconds_to_first_step"] < time.perf_counter() - before


def test_importing_the_library_sets_nothing(tmp_path):
    script = (
        "import jax; before = dict(jax.config.values)\n"
        "from jax._src import monitoring; count = len(monitoring.get_event_listeners())\n"
        "from jaxnets import cli, runner, train; import experiments.cifar10\n"
        "assert dict(jax.config.values) == before\n"
        "assert len(monitoring.get_event_listeners()) == count\n"
    )
    fresh(tmp_path, "-c", script)
    assert not (tmp_path / ".cache").exists()


def test_the_first_step_waits_for_nothing_that_comes_after_it(tmp_path):
    """What is heavy and not needed before: scikit-learn, PyTorch (by tensorboardX), Orbax, pictures."""
    script = f"""
import sys
from experiments import cifar10
from jaxnets import cli, run
fit = run.fit
def watched(*args, **options):
    heavy = ("sklearn", "scipy", "torch", "tensorboardX", "orbax", "matplotlib", "PIL", "grain")
    print("imported:", *[name for name in heavy if name in sys.modules])
    return fit(*args, **options)
run.fit = watched
sys.exit(cli.main(cifar10.EXPERIMENT, {[*SMALL, "--run-dir", str(tmp_path / "r")]}))
"""
    assert "imported:\n" in fresh(tmp_path, "-c", script).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start isn't known")
def test_a_process_knows_when_it_began():
    before = time.perf_counter()  # the same clock for all processes
    script = "import time; n = time.perf_counter(); from jaxnets import startup\n"
    script += "print(startup.process_start(), n)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    began, ran = map(float, done.stdout.split())
    tick = 0.011  # the system counts hundredths
    assert before - tick < began < ran


def test_where_the_system_does_not_say_when(monkeypatch):
    def nothing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", nothing)
    assert startup.process_start() == startup._IMPORTED


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux tells them")
def test_threads_are_limited_and_the_environment_is_as_before():
    code = (
        "import os, jax, jax.numpy as jnp\n"
        "from jaxnets import startup\n"
        "startup.limit_threads({})\n"
        "x = jnp.ones((1500, 1500)); (x @ x).block_until_ready()\n"
        "print(os.environ.get('NPROC'), len(os.listdir('/proc/self/task')))\n"
    )

    def run(count):
        env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
        words = [sys.executable, "-c", code.format(count)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
        return done.stdout.split()

    one, four = run(1), run(4)
    assert one[0] == four[0] == "None"
    assert int(four[1]) - int(one[1]) >= 3


def test_threads_below_one_are_refused(capsys):
    assert cli.main(cifar10.EXPERIMENT, [*SMALL, "--threads", "0"]) == 2
    assert "error: threads is 0; it must be at least 1" in capsys.readouterr().err
