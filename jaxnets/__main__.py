"""The commands that belong to no experiment: `python -m jaxnets list, inspect, doctor, launch, ...`."""

import dataclasses
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxnets import defects, errors, launch, registry
from jaxnets.config import read_words
from jaxnets.version import __version__


@dataclasses.dataclass(frozen=True)
class List:
    """Components by kind, where each comes from, and what is loaded; experiments."""

    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A Python file of yours that registers components; may be repeated."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """The layers of a model with output, parameters, FLOPs and memory of each."""

    model: tyro.conf.Positional[str]
    """A registered model."""
    image_shape: str = "32,32,3"
    """Height, width and channels, in pixels."""
    num_classes: int = 10
    """How many classes it tells apart."""
    batch_size: int = 1
    """Images in a batch."""
    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A Python file of yours that registers components; may be repeated."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Known defects of the jaxlib that is installed: which are here, and what avoids them."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A command in several processes of this machine, which stand in for hosts: FLAGS -- COMMAND.

    In it `python` is the Python that runs this, whatever PATH has.
    """

    num_processes: int
    """How many."""
    devices_per_process: int | None = None
    """So many devices of the CPU in each; what is there by default."""
    restarts: int = 0
    """How often to start all again after one was killed or hung; a run goes on from its checkpoint."""
    verbose: bool = False
    """Show also what Gloo and absl say of each connection."""
    command: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class Version:
    """The version of jaxnets."""


def main(argv: Sequence[str]) -> int:
    """Run a command that belongs to no experiment; the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m jaxnets {{{','.join(_COMMANDS)}}} [FLAGS]\n")
        for name, (kind, _) in _COMMANDS.items():
            print(f"{name:<9}{str(kind.__doc__).splitlines()[0]}")
        return 0 if argv else 2
    try:
        if argv[0] not in _COMMANDS:
            raise errors.unknown("command", argv[0], _COMMANDS)
        kind, run = _COMMANDS[argv[0]]
        words, command = list(argv[1:]), ()
        if kind is Launch and "--" in words:
            at = words.index("--")
            words, command = words[:at], tuple(words[at + 1 :])
        elif kind is Launch and not {"-h", "--help"} & set(words):
            raise errors.ConfigError(f"what to launch comes after --, as in: {launch.EXAMPLE}")
        arguments = read_words(kind, words, prog=f"python -m jaxnets {argv[0]}")
        if isinstance(arguments, Launch):
            arguments = dataclasses.replace(arguments, command=command)
        for file in getattr(arguments, "plugin", ()):
            registry.load_file(file)
        status = run(arguments) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def list_components(arguments: List) -> None:
    """Print every name that there is."""
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


def inspect_model(arguments: Inspect) -> None:
    """Print the layers of a model."""
    build = registry.get("model", arguments.model)
    words = arguments.image_shape.split(",")
    if len(words) != 3 or not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise errors.ConfigError(
            f"the image shape is height,width,channels, such as 32,32,3, not {arguments.image_shape}"
        )
    for name in ("num_classes", "batch_size"):
        if getattr(arguments, name) < 1:
            raise errors.ConfigError(f"{name} is {getattr(arguments, name)}; it must be at least 1")
    from jaxnets.plan import format_table, layer_table  # JAX, which listing doesn't need

    shape = (arguments.batch_size, *map(int, words))
    try:
        rows = layer_table(build(num_classes=arguments.num_classes), shape)
    except (ValueError, TypeError) as error:
        why = errors.first_line(error)
        raise errors.ConfigError(f"{arguments.model} can't take images of {shape}: {why}") from error
    print(format_table(rows))
    print(
        f"for a batch of {arguments.batch_size}; FLOPs: forward, 2 for each multiply-add of matrix "
        "products and convolutions"
    )


def examine(arguments: Doctor) -> int:
    """Print the known defects, and whether they are here; 1 if any is."""
    import jaxlib.version

    from jaxnets import train

    strategy = train.make_strategy("jit", num_devices=1)
    version, platform = jaxlib.version.__version__, strategy.mesh.devices.flat[0].platform

    def as_in_training(fn: Callable, *arrays: Any) -> Any:
        return strategy.compile_eval(lambda axis_name: lambda state, batch: fn(*state))(arrays, {})

    findings = defects.examine(version, platform, as_in_training, is_guarded=strategy.is_guarded)
    print(f"jaxlib {version} on {platform}; in training: as a step is compiled")
    print(defects.format_findings(findings))
    if version not in defects.TRIED:
        print(f"\nby version: those known are {', '.join(defects.TRIED)}; of {version} nothing is known")
    return int(any(finding.is_here for finding in findings))


def launch_command(arguments: Launch) -> int:
    """Run the command in several processes; their status."""
    return launch.launch(
        arguments.command,
        arguments.num_processes,
        devices_per_process=arguments.devices_per_process,
        restarts=arguments.restarts,
        verbose=arguments.verbose,
    )


_COMMANDS: dict[str, tuple[type, Callable]] = {
    "list": (List, list_components),
    "inspect": (Inspect, inspect_model),
    "doctor": (Doctor, examine),
    "launch": (Launch, launch_command),
    "version": (Version, lambda arguments: print(__version__)),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
