import concurrent.futures
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
    assert registry.kinds() == [
        *("model", "language_model", "text_model", "recommender", "text_encoder", "translation_model"),
        *("layer", "loss", "optimizer", "row_optimizer", "dataset", "text_dataset", "ratings"),
    ]
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


def test_a_name_that_is_taken_is_refused_and_says_by_what():
    before = registry.get("model", "lenet")
    taken = "model 'lenet' is already registered: it is jaxnets.models.lenet:lenet"
    with pytest.raises(errors.ConfigError, match=taken):
        registry.register("model", "lenet", build)
    assert registry.get("model", "lenet") is before


@pytest.mark.parametrize("target", ["module", "a.b", "a:b:c", "", 7, None])
def test_what_is_not_module_and_function_is_refused(target):
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


def component(kind, name):
    (found,) = [c for c in registry.components() if (c.kind, c.name) == (kind, name)]
    return found


def test_components_say_where_they_come_from_and_import_nothing(tmp_path, monkeypatch):
    (tmp_path / "registry_listed.py").write_text("def make():\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [(c.kind, c.name) for c in registry.components()] == EVERY
    with registered("loss", "listed", "registry_listed:make"), registered("loss", "mine", build):
        before = component("loss", "listed")
        assert before == registry.Component("loss", "listed", "registry_listed:make", False, ())
        assert "registry_listed" not in sys.modules
        registry.get("loss", "listed")
        assert component("loss", "listed").is_loaded
        assert component("loss", "mine").source == f"{__name__}:build"
        assert component("loss", "mine").is_loaded
    sys.modules.pop("registry_listed")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import registry_not_there\n", "model 'bad': can't import registry_bad:make: No module named"),
        ("def made(): ...\n", "model 'bad': there is no registry_bad:make: "),
        ("make = 7\n", "model 'bad': registry_bad:make is no function but 7"),
        ("def make(:\n", r"model 'bad': .*registry_bad.py, line 1: invalid syntax"),
    ],
)
def test_a_target_that_is_not_there_is_one_line(tmp_path, monkeypatch, source, message):
    (tmp_path / "registry_bad.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with (
        registered("model", "bad", "registry_bad:make"),
        pytest.raises(errors.ConfigError, match=message) as caught,
    ):
        registry.get("model", "bad")
    assert "\n" not in str(caught.value)
    sys.modules.pop("registry_bad", None)


def test_a_lease_keeps_the_name_and_ends_by_itself():
    with registered("model", "mine", build):
        with registry.use("model", "mine", by="server 1") as function:
            assert function is build
            with registry.use("model", "mine", by="a test"):
                assert component("model", "mine").holders == ("server 1", "a test")
                with pytest.raises(errors.ConfigError, match=r"in use by server 1, a test$"):
                    registry.unregister("model", "mine")
            assert component("model", "mine").holders == ("server 1",)
        with pytest.raises(RuntimeError), registry.use("model", "mine", by="someone who fails"):
            raise RuntimeError
        assert component("model", "mine").holders == ()
        with pytest.raises(errors.ConfigError, match="unknown model 'nine'"):
            registry.use("model", "nine", by="x").__enter__()


def test_threads_that_register_and_lease_at_once_lose_nothing():
    def work(i):
        for j in range(50):
            registry.register("loss", f"{i}-{j}", build)
            with registry.use("loss", f"{i}-{j}", by=str(i)):
                registry.components()
            registry.unregister("loss", f"{i}-{j}")

    before = registry.components()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert registry.components() == before
