"""`python -m jaxnets list`: what there is."""

import importlib.util
import pkgutil
import sys

from jaxnets import errors, registry
from jaxnets.version import __version__


def main(argv: list[str]) -> int:
    """Run a command that belongs to no experiment; the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m jaxnets {list,version}")
        return 0 if argv else 2
    if argv == ["version"]:
        print(__version__)
        return 0
    if argv != ["list"]:
        error = errors.unknown("command", " ".join(argv), ("list", "version"))
        print(f"error: {error}", file=sys.stderr)
        return 2
    for kind in registry.kinds():
        print(f"{kind + 's:':<13}{', '.join(registry.names(kind))}")
    found = importlib.util.find_spec("experiments")
    places = list(found.submodule_search_locations or []) if found else []
    names = sorted(module.name for module in pkgutil.iter_modules(places))
    print(f"{'experiments:':<13}{', '.join(names) or 'none here; they come with the repository'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
