import os
import stat
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import lru_cache, monitoring

from jaxnets import errors
from jaxnets.train import program_cache
from jaxnets.train.program_cache import machine, opened, prune

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def options():
    return [getattr(jax.config, name) for name in OPTIONS]


@pytest.fixture(autouse=True)
def as_before():
    before = options(), len(monitoring.get_event_listeners())
    yield
    assert (options(), len(monitoring.get_event_listeners())) == before


@pytest.fixture
def no_folder_of_the_users(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def compute():
    """A new function each time, so that JAX must look for its program."""
    return np.asarray(jax.jit(lambda x: jnp.sin(x) * 3 + jnp.flip(x))(np.arange(7.0)))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def entries(folder):
    return sorted(folder.glob("*/*-cache"))


def test_what_was_compiled_is_found_again(tmp_path):
    results = []
    for hits, misses in ((0, 1), (1, 0), (1, 0)):
        with opened(tmp_path / "a" / "b") as uses:
            results.append(compute())
        assert (uses.hits, uses.misses) == (hits, misses)
        assert uses.to_json() == {"hits": hits, "misses": misses, "folder": str(uses.folder)}
    assert len(entries(tmp_path / "a" / "b")) == 1
    np.testing.assert_array_equal(results[0], results[1])
    compute()  # not counted any more
    assert uses.hits == 1


def test_nobody_else_may_read_or_write_there(tmp_path, monkeypatch, no_folder_of_the_users):
    monkeypatch.setenv("HOME", str(tmp_path))
    old = os.umask(0)
    try:
        with opened() as uses:
            compute()
    finally:
        os.umask(old)
    root = tmp_path / ".cache" / "jaxnets" / "xla"
    assert uses.folder == root / machine()
    assert mode(root) == mode(uses.folder) == 0o700
    assert len(entries(root)) == 1


def test_the_users_own_option_is_left_as_it_is(tmp_path, monkeypatch, no_folder_of_the_users):
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    before = options()
    with opened() as uses:
        assert options() == before
    assert uses.folder == tmp_path / "theirs"
    with opened(tmp_path / "mine") as uses:  # what is said with the command itself comes first
        compute()
    assert uses.folder == tmp_path / "mine" / machine()
    assert not (tmp_path / ".cache").exists()


def test_switched_off(tmp_path, monkeypatch, no_folder_of_the_users):
    monkeypatch.setenv("HOME", str(tmp_path))
    with opened(tmp_path / "a", use=False) as uses:
        compute()
    assert (uses.folder, uses.requests, uses.to_json()) == (None, 0, None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with opened(tmp_path / "a") as uses:
            compute()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert (uses.folder, uses.requests) == (None, 0)
    assert list(tmp_path.iterdir()) == []


def refused(folder, message):
    with pytest.warns(UserWarning, match=message) as warned, opened(folder) as uses:
        compute()
    assert (uses.folder, uses.requests, len(warned)) == (None, 0, 1)


def test_a_folder_that_is_not_to_be_trusted(tmp_path, monkeypatch):
    for name, bits in (("group", 0o770), ("all", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(bits)
        refused(tmp_path / name, f"not kept in .*: others may write into .*{name}$")
        assert not list((tmp_path / name).iterdir())
    with opened(tmp_path / "a") as uses:
        compute()
    uses.folder.chmod(0o777)
    refused(tmp_path / "a", "others may write")
    uses.folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    refused(tmp_path / "a", "is another user's")


def test_a_folder_that_can_not_be(tmp_path, monkeypatch, no_folder_of_the_users):
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "File exists")
    refused(tmp_path / "file" / "below", "Not a directory")

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    refused(None, "not kept in ~/.cache/jaxnets/xla: Could not determine home")


def test_a_folder_that_may_not_be_written(tmp_path):
    """As an unprivileged user: root may write anywhere."""
    locked, own = tmp_path / "locked", tmp_path / "own"
    for folder in (locked, own, own / machine()):
        folder.mkdir(mode=0o700)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o055)
    locked.chmod(0o555)
    (own / machine()).chmod(0o500)
    if os.geteuid() == 0:
        for folder in (own, own / machine()):
            os.chown(folder, 65534, 65534)
    script = f"""
        import os, warnings
        from pathlib import Path
        import jax
        from jaxnets.train.program_cache import opened
        print(float(jax.jit(lambda x: x + 1)(1.0)))  # so that all is imported
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        warnings.showwarning = lambda message, *_: print(message)
        for folder in {str(locked / "below")!r}, {str(own)!r}:
            with opened(Path(folder)) as uses:
                print(float(jax.jit(lambda x: x + 2)(1.0)), uses.folder)
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "2.0", done.stderr
    assert lines[1].endswith("below: Permission denied")
    assert lines[2] == lines[4] == "3.0 None"
    assert lines[3].endswith("can't be written")


def test_several_processes_keep_none_unless_told_where(tmp_path, monkeypatch, no_folder_of_the_users):
    """JAX would keep those of the first one alone, and the next start find one process far ahead."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(program_cache.hosts, "count", lambda: 2)
    with opened():
        compute()
    assert list(tmp_path.iterdir()) == []
    with opened(tmp_path / "a"):
        compute()
    assert list((tmp_path / "a").iterdir())
    with (
        pytest.raises(errors.ConfigError, match="on a disk, not in gs:/"),
        opened(Path("gs://bucket/a")),
    ):
        pass


def test_a_damaged_entry_is_compiled_again_and_mended(tmp_path):
    with opened(tmp_path / "a"):
        expected = compute()
    (path,) = entries(tmp_path / "a")
    whole = path.read_bytes()
    damaged = (whole[: len(whole) // 2], b"", bytes([*whole[:20], whole[20] ^ 1, *whole[21:]]))
    for content in damaged:
        path.write_bytes(content)
        with (
            pytest.warns(UserWarning, match=r"a program kept in .* is compiled again") as warned,
            opened(tmp_path / "a") as uses,
        ):
            np.testing.assert_array_equal(compute(), expected)
        assert (uses.hits, uses.misses) == (0, 1)
        assert len(warned) == 1
        assert "\n" not in str(warned[0].message)
        with opened(tmp_path / "a") as uses:
            np.testing.assert_array_equal(compute(), expected)
        assert (uses.hits, uses.misses) == (1, 0)


def test_a_full_disk_is_said_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lru_cache.LRUCache, "put", full)
    with (
        pytest.warns(UserWarning, match=r"can't be kept in .*No space left on device$") as warned,
        opened(tmp_path / "a") as uses,
    ):
        _ = [jax.jit(lambda x: x + 1)(np.ones(size)) for size in (2, 3, 4)]
    assert uses.misses == 3
    assert len(warned) == 1


def test_other_warnings_are_shown_as_before(tmp_path):
    with pytest.warns(UserWarning, match="^something else$"), opened(tmp_path):
        warnings.warn("something else", UserWarning, stacklevel=1)


def test_two_processes_at_once(tmp_path):
    script = f"""
        import time, jax, jax.numpy as jnp, numpy as np
        from pathlib import Path
        from jaxnets.train.program_cache import opened
        folder = Path({str(tmp_path)!r})
        with opened(folder / "a") as uses:
            (folder / str(__import__("os").getpid())).touch()
            while len([p for p in folder.iterdir() if p.name.isdigit()]) < 2:
                time.sleep(0.001)
            total = sum(float(jax.jit(lambda x: jnp.sin(x).sum())(np.ones(n))) for n in range(1, 30))
        print(total, uses.requests)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].split()[1] == "29"
    with opened(tmp_path / "a") as uses:
        for n in range(1, 30):
            jax.jit(lambda x: jnp.sin(x).sum())(np.ones(n))
    assert (uses.hits, uses.misses) == (29, 0)


def test_prune(tmp_path):
    names = [f"jit_{name}-{name * 64}-cache" for name in "abcdef"]
    for age, name in enumerate(names):
        path = tmp_path / ("m" if age % 2 else "n") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "n" / names[4], (2e9, 1e9))  # read not long ago
    (tmp_path / "n" / "my-cache").write_bytes(bytes(1000))  # not JAX's
    prune(tmp_path, 600)
    assert len(entries(tmp_path)) == 7
    prune(tmp_path, 599)
    left = {path.name for path in entries(tmp_path)}
    assert left == {"my-cache", *(names[i] for i in (0, 1, 2, 4))}


def test_too_much_is_pruned_before_a_run(tmp_path, monkeypatch):
    with opened(tmp_path / "a"):
        compute()
    monkeypatch.setattr(program_cache, "MAX_BYTES", 10)
    with opened(tmp_path / "a") as uses:
        compute()
    assert (uses.hits, uses.misses) == (0, 1)


def test_a_machine_has_one_name():
    script = "from jaxnets.train.program_cache import machine; print(machine())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == machine() + "\n"
    assert machine().startswith(jax.lib.__version__)
