import contextlib
import sys

import pytest

from jaxnets import errors, registry


@contextlib.contextmanager
def registered(kind, name, target):
    registry.register(kind, name, target)
    try:
        yield
    finally:
        registry.unregister(kind, name)


def build():
    return "built"


EVERY = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]


def test_kinds_and_names():
    assert registry.kinds() == ["model", "dataset", "optimizer"]
    assert {"lenet", "convnet", "mlp"} <= set(registry.names("model"))
    for kind in registry.kinds():
        assert registry.names(kind) == sorted(registry.names(kind))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_name_resolves(kind, name):
    assert callable(registry.get(kind, name))


def test_a_registered_function_is_found_and_can_be_taken_away():
    with registered("model", "mine", build):
        assert registry.get("model", "mine") is build
        assert "mine" in registry.names("model")
        assert "mine" not in registry.names("dataset")
    assert "mine" not in registry.names("model")
    with pytest.raises(errors.ConfigError, match="unknown model 'mine'"):
        registry.get("model", "mine")
    with pytest.raises(errors.ConfigError, match="unknown model 'mine'"):
        registry.unregister("model", "mine")


def test_a_string_is_imported_on_first_use_and_not_before(tmp_path, monkeypatch):
    (tmp_path / "registry_probe.py").write_text("def make():\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with registered("optimizer", "probe", "registry_probe:make"):
        registry.names("optimizer")
        assert "registry_probe" not in sys.modules
        assert registry.get("optimizer", "probe")() == 7
    sys.modules.pop("registry_probe")


def test_a_name_that_is_taken_is_refused():
    before = registry.get("model", "lenet")
    with pytest.raises(errors.ConfigError, match="model 'lenet' is already registered"):
        registry.register("model", "lenet", build)
    assert registry.get("model", "lenet") is before


@pytest.mark.parametrize("target", ["module", "a.b", "a:b:c", ""])
def test_a_string_that_is_not_module_and_function_is_refused(target):
    with pytest.raises(errors.ConfigError, match="is not 'module:function'"):
        registry.register("model", "broken", target)
    assert "broken" not in registry.names("model")


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [("model", "lanet", "lenet"), ("dataset", "cifar", "cifar10"), ("optimizer", "adamv", "adam")],
)
def test_an_unknown_name_gives_the_nearest_one(kind, name, near):
    with pytest.raises(errors.ConfigError) as caught:
        registry.get(kind, name)
    text = str(caught.value)
    assert text.startswith(f"unknown {kind} {name!r}: did you mean '{near}")
    assert "\n" not in text
    assert all(other in text for other in registry.names(kind))


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(errors.ConfigError, match=r"unknown model 'zzzz': there are: convnet, "):
        registry.get("model", "zzzz")


@pytest.mark.parametrize(
    "call",
    [
        lambda: registry.names("modle"),
        lambda: registry.get("modle", "lenet"),
        lambda: registry.register("modle", "x", build),
        lambda: registry.unregister("modle", "lenet"),
    ],
)
def test_an_unknown_kind_gives_the_nearest_one(call):
    with pytest.raises(errors.ConfigError, match=r"unknown kind of component 'modle'.*'model'"):
        call()


def test_errors_that_a_user_can_mend_are_value_errors():
    assert issubclass(errors.ConfigError, errors.UserError)
    assert issubclass(errors.UserError, ValueError)
