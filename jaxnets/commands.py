"""Commands that an experiment has beside those of all, such as `predict TEXT ...`, on a trained run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxnets import config, errors, registry, resume, startup
from jaxnets.allocator import keep_freed_memory
from jaxnets.config import Folder
from jaxnets.train import checkpoint, run_folder
from jaxnets.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class SavedOptions:
    """Which run a command reads, and how it computes."""

    run_dir: Folder = None  # Folder of the run, or gs://BUCKET/FOLDER; runs/EXPERIMENT by default.
    # Folder with the data sets, as of `train`; for commands that need them.
    data_dir: Folder = None
    verify: str = "warn"  # What to do about data files with another digest than the official.
    checkpoint: str = "latest"  # latest, best, or the number of a step.
    threads: int | None = None  # On a CPU, threads that XLA computes with; all cores by default.
    # A Python file of yours that registers components, run before anything else; may be repeated.
    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run that was trained, for a command to use.

    Attributes:
        folder: of the run.
        config: that it was trained with.
        options: of the command.
    """

    folder: Path
    config: Any
    options: SavedOptions

    def asset(self, name: str) -> bytes:
        """A file that belongs to the model, as the recipe's `assets` had it.

        Raises:
            ConfigError: if the run has none of that name, or it was changed since.
        """
        return run_folder.read_asset(self.folder, name)

    @functools.cached_property
    def model(self) -> tuple[int, Params, PyTree]:
        """The step of the checkpoint, its parameters (their average, where there is one), model_state.

        Raises:
            CheckpointError: if there is no such checkpoint, or it can't be read.
        """
        with checkpoint.Checkpoints(self.folder / "checkpoints") as checkpoints:
            return resume.read_model(checkpoints, self.options.checkpoint)


@dataclasses.dataclass(frozen=True)
class Command:
    """What an experiment can do with a trained run.

    Attributes:
        about: one line for the help.
        run: `run(saved_run, words, flags) -> None`; a user's mistake is an `errors.UserError`.
        flags: the defaults of its own flags, a flat frozen dataclass; None if it has none.
        words: what its words are, for the help, such as "TEXT"; "" if it takes none.
    """

    about: str
    run: Callable[[SavedRun, Sequence[str], Any], None]
    flags: Any = None
    words: str = ""


def run_command(
    command: Command,
    argv: Sequence[str],
    *,
    experiment: str,
    config_type: type,
    presets: Mapping[str, Any],
    prog: str,
) -> None:
    """Read a command's words and flags, find the run, and do it.

    Args:
        command: which.
        argv: what stands behind its name.
        experiment: the name that the run's folder must have.
        config_type: of the run's config.
        presets: those after which run folders are called.
        prog: the command line so far, for the help.

    Raises:
        UserError: if a flag is unknown, the folder isn't that of such a run, or the command says so.
    """
    preset, argv = config.preset_of(argv, presets)
    words, flags, options = config.parse_command(
        argv, command.flags, SavedOptions(), words=command.words, prog=prog, about=command.about
    )
    for file in options.plugin:
        registry.load_file(file)
    keep_freed_memory()
    startup.limit_threads(options.threads)
    folder = options.run_dir or Path("runs") / (f"{experiment}-{preset}" if preset else experiment)
    stored = run_folder.read_config(folder)
    if stored["experiment"] != experiment:
        raise errors.ConfigError(f"{folder} holds a run of {stored['experiment']}, not of {experiment}")
    command.run(SavedRun(folder, config.from_json(config_type, stored["config"]), options), words, flags)
