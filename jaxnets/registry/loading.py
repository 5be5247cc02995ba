"""Components from a user's own file or module: load, unload, reload."""

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from jaxnets import errors
from jaxnets.registry import table


def load_file(path: str | Path) -> list[tuple[str, str]]:
    """Run a Python file that calls `register`. A file that is loaded already isn't run again.

    Args:
        path: of the file.

    Returns:
        what it registered, as (kind, name).

    Raises:
        ConfigError: if the file isn't there, fails (with the line), or registers nothing; then none
            of its names stay.
    """
    file = Path(path).expanduser().resolve()
    with table.changing:
        if str(file) not in table.origins:
            if not file.is_file():
                problem = "is not a file" if file.exists() else "does not exist"
                raise errors.ConfigError(f"the plugin {path} {problem}")
            digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
            stem = re.sub(r"\W", "_", file.stem)
            module = ModuleType(f"jaxnets_plugin_{stem}_{digest}")  # never the name of another module
            module.__file__ = str(file)
            _load(str(file), module)
        return _names_of(str(file))


def file_modules() -> list[ModuleType]:
    """What the loaded files are as modules, which no other process can import by name."""
    with table.lock:
        return [module for name, module in table.origins.items() if module.__name__ != name]


def load_module(name: str) -> list[tuple[str, str]]:
    """Import a module that calls `register`; returns and raises as `load_file` does."""
    with table.changing:
        if name not in table.origins:
            try:
                spec = importlib.util.find_spec(name)
            except (ImportError, ValueError):
                spec = None
            if spec is None:
                raise errors.ConfigError(f"there is no module {name} to load")
            if name in sys.modules:  # imported before: its names are there already
                table.origins[name] = sys.modules[name]
                for entry in [entry for its in table.entries.values() for entry in its.values()]:
                    if entry.origin is None and getattr(entry.target, "__module__", None) == name:
                        entry.origin = name
                if not _names_of(name):
                    del table.origins[name]
                    raise errors.ConfigError(f"the module {name} has registered nothing")
            else:
                _load(name, importlib.util.module_from_spec(spec))
        return _names_of(name)


def unload(kind: str, name: str) -> None:
    """Let go of the module or file behind a component.

    All names that a loaded file or module registered go with it. A "module:function" keeps its name
    and is imported anew when it is next used; a function registered by itself loses its name.

    Raises:
        ConfigError: if there is no such name, or it or another one of the same origin is leased.
    """
    with table.changing, table.lock:
        entry = table.find(kind, name)
        together = _together(entry)
        table.refuse_leased(together, "unloaded")
        if entry.origin is None and entry.module is not None:
            sys.modules.pop(entry.module, None)
            return
        for other, its_name in _names_of(entry.origin) if entry.origin else [(kind, name)]:
            del table.entries[other][its_name]
        if entry.origin is not None:
            sys.modules.pop(table.origins.pop(entry.origin).__name__, None)


def reload(kind: str, name: str) -> table.Function:
    """Run the module or file behind a component again, so that edited code takes effect.

    What it imports is not run again. If the new code fails everything stays as it was.

    Returns:
        the new function; who has the old one keeps that.

    Raises:
        ConfigError: if there is no such name, it or another one of the same origin is leased, it was
            registered as a function by itself, or the new code fails.
    """
    with table.changing:
        with table.lock:
            entry = table.find(kind, name)
            table.refuse_leased(_together(entry), "reloaded")
        if entry.module is not None:
            table.get(kind, name)
            _run(sys.modules[entry.module], lambda: table.get(kind, name))
        elif entry.origin is None:
            raise errors.ConfigError(
                f"{kind} {name!r} was registered as a function, of which nothing can be loaded again; "
                "register it as 'module:function' or from a file"
            )
        else:
            _load(entry.origin, table.origins[entry.origin], expected=(kind, name))
        return table.get(kind, name)


def _load(origin: str, module: ModuleType, expected: tuple[str, str] | None = None) -> None:
    """Run a file or module, whose names then are those that it registers; all or nothing."""
    with table.lock:
        before = {key: table.entries[key[0]].pop(key[1]) for key in _names_of(origin)}
    known = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    token = table.loading.set(origin)

    def check() -> None:
        found = _names_of(origin)
        if not found:
            what = "registers nothing; it should call registry.register(kind, name, function)"
            raise errors.ConfigError(what)
        if expected and expected not in found:
            raise errors.ConfigError(f"no longer registers {expected[0]} {expected[1]!r}")

    try:
        _run(module, check)
        table.origins[origin] = module
    except BaseException:
        with table.lock:
            for kind, name in _names_of(origin):
                del table.entries[kind][name]
            for (kind, name), entry in before.items():
                table.entries[kind][name] = entry
        if known is None:
            del sys.modules[module.__name__]
        raise
    finally:
        table.loading.reset(token)


def _run(module: ModuleType, check: Callable[[], object]) -> None:
    """Run a module's source in its emptied namespace; if that or the check fails it is as before.

    Not `importlib.reload`: that would take compiled code from a cache, which misses an edit within a
    second that leaves the file's size as it was, and would keep functions that are no longer there.
    """
    path, space = module.__file__ or "", module.__dict__
    before = dict(space)
    try:
        code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
        if "__path__" not in space:  # a package keeps the modules in it
            for name in [name for name in space if not name.startswith("__")]:
                del space[name]
        exec(code, space)
        check()
    except BaseException as error:
        space.clear()
        space.update(before)
        if not isinstance(error, Exception | SystemExit):
            raise
        raise errors.ConfigError(_explain(error, path)) from error


def _explain(error: BaseException, path: str) -> str:
    """One line that says what went wrong in a user's file, and where."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: {error.msg}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    is_ours = isinstance(error, errors.UserError)
    text = errors.first_line(error) if is_ours else errors.named_line(error)
    return f"{path}, line {lines[-1]}: {text}" if lines else f"{path}: {text}"


def _names_of(origin: str) -> list[tuple[str, str]]:
    """The names that a file or module registered when it was loaded."""
    with table.lock:
        return [
            (kind, name)
            for kind, its in table.entries.items()
            for name, entry in its.items()
            if entry.origin == origin
        ]


def _together(entry: table.Entry) -> dict[tuple[str, str], table.Entry]:
    """This entry and those that change with it: of the same module, or loaded with it."""
    return {
        (kind, name): other
        for kind, its in table.entries.items()
        for name, other in its.items()
        if other is entry
        or (entry.origin is not None and other.origin == entry.origin)
        or (entry.module is not None and other.module == entry.module)
    }
