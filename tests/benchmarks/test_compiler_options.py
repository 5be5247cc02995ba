"""The table of compiler options, on a small step."""

import json

import jax
import pytest

from benchmarks import compiler_options


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(compiler_options, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(compiler_options, "WORKLOADS", {"tiny": ("mlp", 4)})
    monkeypatch.setitem(compiler_options.OPTIONS, "unheard", {"xla_cpu_unheard_of": True})
    is_cached = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", is_cached)


def test_every_set_of_options_has_its_row(tmp_path, capsys):
    words = ["--options", "ynn none", "--options", "unheard", "--rounds", "2", "--seconds", "0.001"]
    assert compiler_options.main([*words, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "options.json").read_text())
    rows = report["workloads"]["tiny"]["options"]
    assert list(rows) == ["default", "training", "ynn none", "unheard"]
    assert "No such compile option" in rows["unheard"]["refused"]
    for name in ("default", "training", "ynn none"):
        assert len(rows[name]["times"]) == 2
        assert 0 < rows[name]["milliseconds"][1] <= rows[name]["milliseconds"][2]
        assert rows[name]["difference"] < 1e-3
        assert rows[name]["loss"] == pytest.approx(rows["default"]["loss"], rel=1e-5)
    assert rows["training"]["ratio"] == [1, 1, 1]
    page = (tmp_path / "options.md").read_text()
    assert page == capsys.readouterr().out
    assert page.count("\n| ") == 6  # the head, a line below it, and the sets
    assert "refused: INVALID_ARGUMENT" in page


def test_a_name_that_is_not_there_is_one_line(capsys):
    assert compiler_options.main(["--options", "ynn nome"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown set of options 'ynn nome': did you mean")
