"""Which part may know which: the imports are read, not run.

A part may import those of a lower row; parts in one row don't import each other.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROWS = {
    "jaxnets.errors": 0,
    "jaxnets.version": 0,
    "jaxnets.allocator": 0,
    "jaxnets.typing": 0,
    "jaxnets.registry": 0,
    "jaxnets.config": 0,
    "jaxnets.remote": -1,
    "jaxnets.defects": 0,
    "jaxnets.recipe": 0,
    "jaxnets.startup": 0,
    "jaxnets.ops": 1,
    "jaxnets.layers": 2,
    "jaxnets.losses": 2,
    "jaxnets.metrics": 2,
    "jaxnets.models": 3,
    "jaxnets.data": 3,
    "jaxnets.report": 3,
    "jaxnets.train": 4,
    "jaxnets.feed": 4.5,
    "jaxnets.evaluation": 4.7,
    "jaxnets.agreement": 5,
    "jaxnets.resume": 4.5,
    "jaxnets.run": 4.8,
    "jaxnets.deploy": 5,
    "jaxnets.interop": 5,
    "jaxnets.plan": 5,
    "jaxnets.runner": 5,
    "jaxnets.memory": 5.5,
    "jaxnets.launch": 5,
    "jaxnets.commands": 5.5,
    "jaxnets.writing": 5.7,
    "jaxnets.translation": 5.7,
    "jaxnets.recommendation": 5.7,
    "jaxnets.cli": 6,
    "jaxnets.__main__": 6,
    "benchmarks": 6,
    "experiments": 7,
    "tests": 7,
}
# Siblings that everyone may know: they import nothing themselves, which is tested below.
KNOWN_TO_ALL = ("jaxnets.errors", "jaxnets.version")
TRAIN_NEVER = ("jaxnets.layers", "jaxnets.models", "jaxnets.data")


class Importer(ast.NodeVisitor):
    """Every module that a file imports, wherever in it, but for what only type checkers read."""

    def __init__(self, module, is_package):
        self.package = module if is_package else module.rpartition(".")[0]
        self.found = set()

    def visit_If(self, node):
        name = ast.unparse(node.test)
        for child in (
            node.orelse
            if name in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            else [
                *node.body,
                *node.orelse,
            ]
        ):
            self.visit(child)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            parents = parents[: len(parents) - node.level + 1]
            base = ".".join([*parents, *([node.module] if node.module else [])])
        # `from jaxnets import data` imports jaxnets.data; of other names the prefix counts.
        self.found |= {f"{base}.{alias.name}" for alias in node.names}


def imports_of(source, module, is_package=False):
    importer = Importer(module, is_package)
    importer.visit(ast.parse(source))
    return importer.found


def part_of(name):
    """The part that a module, or a name in one, belongs to; None for what isn't ours."""
    words = name.split(".")
    if words[0] != "jaxnets":
        return words[0] if words[0] in ROWS else None
    return ".".join(words[:2]) if len(words) > 1 else "jaxnets"


def modules(*places):
    """{module: imports} of every file under a place."""
    found = {}
    for place in places:
        for path in sorted((ROOT / place).rglob("*.py")):
            words = path.relative_to(ROOT).with_suffix("").parts
            is_package = words[-1] == "__init__"
            name = ".".join(words[:-1] if is_package else words)
            found[name] = imports_of(path.read_text(), name, is_package)
    return found


def breaches(found):
    """Every import that the table forbids."""
    wrong = []
    for module, imports in found.items():
        part = part_of(module)
        for name in imports:
            other = part_of(name)
            if other is None or other in (part, "jaxnets") or other in KNOWN_TO_ALL:
                continue
            is_down = part in ROWS and other in ROWS and ROWS[other] < ROWS[part]
            if not is_down or (part == "jaxnets.train" and other in TRAIN_NEVER):
                wrong.append(f"{module} imports {name}")
    return sorted(wrong)


OURS = modules("jaxnets", "benchmarks", "experiments")


def users_of(library, found=OURS):
    """Modules of the package that import a library."""
    return {
        module
        for module, imports in found.items()
        if module.startswith("jaxnets") and any(name.split(".")[0] == library for name in imports)
    }


def test_every_part_has_a_row():
    parts = {part_of(module) for module in OURS} - {"jaxnets"}
    assert parts <= set(ROWS), f"give {sorted(parts - set(ROWS))} a row in the design and here"
    assert len(OURS) > 30


def test_imports_go_down_the_rows():
    assert breaches(OURS) == []


def test_what_everyone_may_know_knows_nothing():
    for module in KNOWN_TO_ALL:
        assert not [name for name in OURS[module] if part_of(name)], module


def test_one_file_knows_orbax():
    assert users_of("orbax") == {"jaxnets.train.array_store"}


def test_only_interop_knows_pytorch():
    assert {part_of(module) for module in users_of("torch")} <= {"jaxnets.interop"}
    assert not users_of("tensorflow")


def test_data_does_not_know_jax():
    for library in ("jax", "flax", "optax", "chex"):
        assert not [m for m in users_of(library) if part_of(m) == "jaxnets.data"]


def test_experiments_do_not_import_each_other():
    for module, imports in modules("experiments").items():
        assert not [name for name in imports if part_of(name) == "experiments"], module


@pytest.mark.parametrize(
    ("module", "source", "is_wrong"),
    [
        ("jaxnets.ops.x", "from jaxnets import layers", True),
        ("jaxnets.ops.x", "def f():\n    import jaxnets.train.step", True),
        ("jaxnets.layers.x", "from jaxnets.losses import huber", True),
        ("jaxnets.layers.x", "from ..losses import huber", True),
        ("jaxnets.layers.x", "from .conv import Conv", False),
        ("jaxnets.train.x", "from jaxnets.data import Batches", True),
        ("jaxnets.train.x", "from jaxnets import models", True),
        ("jaxnets.train.x", "from jaxnets.ops import constrain", False),
        ("jaxnets.models.x", "from jaxnets import errors", False),
        ("jaxnets.models.x", "import benchmarks.y", True),
        ("jaxnets.unheard", "from jaxnets import ops", True),
        ("jaxnets.ops.x", "from jaxnets import unheard", True),
        ("jaxnets.recipe", "if TYPE_CHECKING:\n    from jaxnets.train import fit", False),
        ("jaxnets.recipe", "if TYPE_CHECKING:\n    pass\nelse:\n    import jaxnets.train", True),
        ("experiments.x", "from jaxnets import cli, data", False),
    ],
)
def test_the_reader_sees_what_is_wrong(module, source, is_wrong):
    assert bool(breaches({module: imports_of(source, module)})) is is_wrong


def in_a_fresh_process(code):
    variables = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


LIGHT = ["jaxnets", *(name for name, row in ROWS.items() if row <= 0 and "typing" not in name)]


def test_the_light_parts_import_nothing_heavy():
    heavy = ("jax", "flax", "optax", "orbax", "torch", "tensorflow", "sklearn", "matplotlib")
    code = f"import sys, {', '.join(LIGHT)}\nprint(*[x for x in {heavy} if x in sys.modules])"
    assert in_a_fresh_process(code) == []


def test_data_runs_without_jax():
    """A data worker forks, which JAX doesn't survive."""
    code = "import sys, jaxnets.data\nprint(*[x for x in ('jax', 'flax') if x in sys.modules])"
    assert in_a_fresh_process(code) == []


def test_importing_everything_starts_nothing():
    names = [m for m in OURS if m.startswith("jaxnets") and m != "jaxnets.__main__"]
    code = f"""
import importlib, os, sys
before = dict(os.environ)
import jaxnets, jaxnets.registry, jaxnets.config, jaxnets.recipe
assert dict(os.environ) == before
import jax, flax, optax, orbax.checkpoint, matplotlib  # what they do to the environment isn't ours
libraries = dict(os.environ)
options = dict(jax.config.values)
from jax._src import xla_bridge
for name in {names}:
    importlib.import_module(name)
    assert not xla_bridge._backends, f"{{name}} starts a backend"
    assert dict(os.environ) == libraries, f"{{name}} changes the environment"
    assert dict(jax.config.values) == options, f"{{name}} changes JAX's options"
print("done")
"""
    assert in_a_fresh_process(code) == ["done"]


def test_importing_everything_imports_no_other_framework():
    """Not even through a library that takes what it finds: it costs seconds and memory."""
    names = [m for m in OURS if m.startswith("jaxnets") and m != "jaxnets.__main__"]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    heavy = [x for x in ("torch", "tensorflow", "sklearn", "matplotlib") if x in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
print("done")
"""
    assert in_a_fresh_process(code) == ["done"]
