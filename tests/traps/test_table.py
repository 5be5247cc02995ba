"""The table of traps names tests that exist, and all of those beside this one."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "numeric-traps.md"


@functools.cache
def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def named() -> list[tuple[str, str]]:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return [pair for row in rows for pair in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)]


def test_each_test_that_the_table_names_is_there():
    assert len(named()) > 50
    for path, name in named():
        assert (ROOT / path).is_file(), path
        assert name in functions_in(ROOT / path), f"{path}::{name}"


def test_each_row_names_a_test():
    for line in TABLE.read_text().splitlines():
        if line.startswith("| ") and line not in ("| trap | test |", "| --- | --- |"):
            assert re.search(r"\| `tests/[\w/]+\.py::test_\w+`", line), line


def test_each_test_beside_this_one_is_named():
    here = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in Path(__file__).parent.glob("test_*.py")
        if path != Path(__file__)
        for name in functions_in(path)
        if name.startswith("test_")
    }
    assert not sorted(here - set(named()))
