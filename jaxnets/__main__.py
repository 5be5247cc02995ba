"""`python -m jaxnets list`: what there is."""

import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxnets import errors, registry
from jaxnets.version import __version__

COMMANDS = ("list", "version")
_HELP = f"""usage: python -m jaxnets {{{",".join(COMMANDS)}}}

list [--plugin FILE]    components by kind, where each comes from, what is loaded; experiments
version                 of jaxnets"""


def main(argv: Sequence[str]) -> int:
    """Run a command that belongs to no experiment; the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    try:
        _run(argv[0], list(argv[1:]))
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(command: str, words: list[str]) -> None:
    if command not in COMMANDS:
        raise errors.unknown("command", command, COMMANDS)
    plugins, words = _plugins_of(words)
    if words:
        raise errors.ConfigError(f"{command} takes no {words[0]}")
    if command == "version":
        print(__version__)
        return
    for file in plugins:
        registry.load_file(file)
    _list()


def _plugins_of(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Take every `--plugin FILE` out of the words."""
    files, rest, rest_of_words = [], [], iter(words)
    for word in rest_of_words:
        name, _, value = word.partition("=")
        if name != "--plugin":
            rest.append(word)
            continue
        value = value or next(rest_of_words, "")
        if not value:
            raise errors.ConfigError("--plugin needs the name of a file")
        files.append(Path(value))
    return files, rest


def _list() -> None:
    rows = [(c.kind, c.name, c.source, "loaded" if c.is_loaded else "") for c in registry.components()]
    found = importlib.util.find_spec("experiments")
    places = list(found.submodule_search_locations or []) if found else []
    modules = sorted(module.name for module in pkgutil.iter_modules(places))
    rows += [("experiment", name, f"experiments.{name}", "") for name in modules]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)).rstrip()
        )
    if not modules:
        print("no experiments here; they come with the repository")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
