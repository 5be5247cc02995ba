"""A user's own file or module: loaded, leased, reloaded, unloaded; and what is wrong with it."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxnets import errors, registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    before, modules = names_now(), set(sys.modules)
    yield
    for key in names_now():
        if key not in before and key in names_now():  # names of one file go together
            registry.unload(*key)
        if key not in before and key in names_now():  # a target's name stays
            registry.unregister(*key)
    for name in set(sys.modules) - modules:
        if name.startswith(("mine", "jaxnets_plugin")):
            del sys.modules[name]


def plugin(value, *names, kind="model"):
    calls = "".join(f"registry.register({kind!r}, {name!r}, make)\n" for name in names)
    return f"from jaxnets import registry\ndef make():\n    return {value}\n{calls}"


def loaded(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return path, registry.load_file(path)


def names_now():
    return [(c.kind, c.name) for c in registry.components()]


def test_a_file_registers_its_names(tmp_path):
    path, names = loaded(tmp_path, plugin(1, "mine", "other"))
    assert names == [("model", "mine"), ("model", "other")]
    assert registry.get("model", "mine")() == 1
    (found,) = [c for c in registry.components() if c.name == "mine"]
    assert found == registry.Component("model", "mine", f"{path}:make", True, ())


def test_a_file_is_run_once(tmp_path, monkeypatch):
    path, names = loaded(tmp_path, plugin(1, "mine"))
    path.write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    assert registry.load_file("mine.py") == names  # the same file by another way


def test_two_files_of_one_name_are_two_modules(tmp_path):
    (tmp_path / "a").mkdir()
    loaded(tmp_path, plugin(1, "one"))
    loaded(tmp_path, plugin(2, "two"), "a/mine.py")
    one, two = (registry.get("model", name) for name in ("one", "two"))
    assert (one(), two()) == (1, 2)
    assert one.__module__ != two.__module__
    assert sys.modules[one.__module__].make is one


WRONG = {
    "syntax": ("x = 1\ndef f(:\n", r"mine\.py, line 2: invalid syntax"),
    "raises": ("x = 1\n\n1 / 0\n", r"mine\.py, line 3: ZeroDivisionError: division by zero"),
    "exits": ("import sys\nsys.exit('no')\n", r"mine\.py, line 2: SystemExit: no"),
    "nothing": ("x = 1\n", r"mine\.py: registers nothing; it should call registry\.register"),
    "null bytes": ("x = '\0'\n", r"mine\.py.*null bytes"),
    "taken": (
        plugin(1, "mine", "lenet"),
        r"mine\.py, line 5: model 'lenet' is already registered: it is jaxnets\.models\.lenet:lenet",
    ),
    "kind": (plugin(1, "x", kind="modle"), r"line 4: unknown kind of component 'modle'.*'model'"),
    "several lines": ("raise ValueError('one\\ntwo')\n", "line 1: ValueError: one$"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_one_line_and_leaves_nothing(tmp_path, case):
    text, message = WRONG[case]
    before, modules = names_now(), set(sys.modules)
    with pytest.raises(errors.ConfigError, match=message) as caught:
        loaded(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert names_now() == before
    assert set(sys.modules) == modules
    (tmp_path / "mine.py").write_text(plugin(1, "mine"))  # mended, it loads
    assert registry.load_file(tmp_path / "mine.py") == [("model", "mine")]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"the plugin nowhere\.py does not exist"):
        registry.load_file("nowhere.py")
    with pytest.raises(errors.ConfigError, match=r"the plugin .* is not a file"):
        registry.load_file(tmp_path)


def test_a_module_registers_its_names(tmp_path):
    (tmp_path / "mine_module.py").write_text(plugin(1, "mine"))
    assert registry.load_module("mine_module") == [("model", "mine")]
    assert registry.get("model", "mine") is sys.modules["mine_module"].make
    assert registry.load_module("mine_module") == [("model", "mine")]
    with pytest.raises(errors.ConfigError, match="there is no module mine_nowhere to load"):
        registry.load_module("mine_nowhere")


def test_a_module_that_was_imported_before(tmp_path):
    (tmp_path / "mine_before.py").write_text(plugin(1, "mine"))
    (tmp_path / "mine_silent.py").write_text("")
    __import__("mine_before")
    __import__("mine_silent")
    assert registry.load_module("mine_before") == [("model", "mine")]
    with pytest.raises(errors.ConfigError, match="mine_silent has registered nothing"):
        registry.load_module("mine_silent")


def test_reload_takes_edited_code_at_once(tmp_path):
    """The edits leave size and second of the file as they were, which fools Python's own cache."""
    path, _ = loaded(tmp_path, plugin(1, "mine", "other"))
    for value in (2, 3):
        path.write_text(plugin(value, "mine", "other"))
        assert registry.get("model", "mine")() == value - 1
        assert registry.reload("model", "mine")() == value
        assert registry.get("model", "other")() == value


def test_reload_of_a_target(tmp_path):
    target = tmp_path / "mine_target.py"
    target.write_text("def make():\n    return 1\n")
    registry.register("model", "mine", "mine_target:make")
    assert registry.get("model", "mine")() == 1
    target.write_text("def make():\n    return 2\n")
    assert registry.get("model", "mine")() == 1
    assert registry.reload("model", "mine")() == 2
    target.write_text("def made():\n    return 3\n")
    with pytest.raises(errors.ConfigError, match="model 'mine': there is no mine_target:make"):
        registry.reload("model", "mine")
    assert registry.get("model", "mine")() == 2


def test_names_that_an_edited_file_drops_and_adds(tmp_path):
    path, _ = loaded(tmp_path, plugin(1, "mine", "other"))
    path.write_text(plugin(2, "mine", "third"))
    assert registry.reload("model", "mine")() == 2
    assert registry.load_file(path) == [("model", "mine"), ("model", "third")]
    with pytest.raises(errors.ConfigError, match="unknown model 'other'"):
        registry.get("model", "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "line 1: invalid syntax"),
        (plugin(2, "mine") + "1 / 0\n", "line 5: ZeroDivisionError"),
        (plugin(2, "other"), "no longer registers model 'mine'"),
        (plugin(2, "mine", "lenet"), "'lenet' is already registered"),
    ],
)
def test_a_reload_that_fails_changes_nothing(tmp_path, text, message):
    path, _ = loaded(tmp_path, plugin(1, "mine", "other"))
    before, function = registry.components(), registry.get("model", "mine")
    path.write_text(text)
    with pytest.raises(errors.ConfigError, match=message):
        registry.reload("model", "mine")
    assert registry.components() == before
    assert registry.get("model", "mine") is function
    assert function() == 1
    assert sys.modules[function.__module__].make is function


def test_what_is_leased_is_neither_reloaded_nor_unloaded(tmp_path):
    loaded(tmp_path, plugin(1, "mine", "other"))
    with registry.use("model", "mine", by="the server") as make:
        for change in (registry.reload, registry.unload):
            for name in ("mine", "other"):  # they change together
                with pytest.raises(errors.ConfigError, match=r"'mine' can't be .*in use by the server"):
                    change("model", name)
        assert registry.get("model", "mine") is make
    registry.reload("model", "mine")
    registry.unload("model", "mine")


def test_unload_takes_all_that_a_file_registered(tmp_path):
    before = registry.components()
    path, _ = loaded(tmp_path, plugin(1, "mine", "other"))
    module = registry.get("model", "mine").__module__
    registry.unload("model", "other")
    assert registry.components() == before
    assert module not in sys.modules
    path.write_text(plugin(2, "mine"))
    registry.load_file(path)
    assert registry.get("model", "mine")() == 2


def test_unload_of_a_target_imports_it_anew(tmp_path):
    (tmp_path / "mine_lazy.py").write_text("def make():\n    return 1\n")
    registry.register("model", "mine", "mine_lazy:make")
    first = registry.get("model", "mine")
    registry.unload("model", "mine")
    assert "mine_lazy" not in sys.modules
    assert registry.get("model", "mine") is not first


def test_a_function_by_itself_can_be_unloaded_but_not_reloaded():
    registry.register("model", "mine", lambda: 1)
    with pytest.raises(errors.ConfigError, match="register it as 'module:function' or from a file"):
        registry.reload("model", "mine")
    registry.unload("model", "mine")
    assert "mine" not in registry.names("model")


def test_the_list_shows_a_plugin(tmp_path):
    (tmp_path / "mine.py").write_text(plugin(1, "mine"))

    def listed(*words):
        command = [sys.executable, "-m", "jaxnets", "list", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = listed(f"--plugin={tmp_path / 'mine.py'}")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["model", "mine", f"{tmp_path / 'mine.py'}:make", "loaded"] in rows
    assert ["model", "lenet", "jaxnets.models.lenet:lenet"] in rows
    assert ["experiment", "cifar10", "experiments.cifar10"] in rows
    wrong = listed("--plugin", "nowhere.py")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: the plugin nowhere.py does not exist\n"
