"""Commands that an experiment has beside those of all, such as `predict TEXT ...`, on a trained run."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxnets import config, errors, registry, resume, startup
from jaxnets.allocator import keep_freed_memory
from jaxnets.config import Folder
from jaxnets.data.lines import read_lines
from jaxnets.train import checkpoint, run_folder
from jaxnets.train.files import write_atomically
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
    named = f" --preset {preset}" if preset else ""
    about = command.about
    if presets:
        about += f"; --preset NAME takes that preset's run ({', '.join(presets)})"
    words, flags, options = config.parse_command(
        argv, command.flags, SavedOptions(), words=command.words, prog=prog, about=about
    )
    for i, word in enumerate(words, 1):
        _check_encoding(word, f"text {i}")
    if (output := getattr(flags, "output", None)) is not None:
        check_output(output)  # before minutes of work, and not behind them
        given = getattr(flags, "input", None)
        if given is not None and given.exists() and output.exists() and given.samefile(output):
            raise errors.ConfigError(f"--output {output} is the file of --input, which it would replace")
    for file in options.plugin:
        registry.load_file(file)
    keep_freed_memory()
    startup.limit_threads(options.threads)
    folder = options.run_dir or Path("runs") / (f"{experiment}-{preset}" if preset else experiment)
    if options.run_dir is None and not folder.exists():
        program = prog.rsplit(" ", 1)[0]
        raise errors.ConfigError(
            f"there is no run in {folder} yet: first {program} train{named}, or name one by --run-dir"
        )
    saved = open_run(folder, experiment, config_type, options=options)
    command.run(saved, words, flags)


def open_run(
    folder: Path, experiment: str, config_type: type, *, options: SavedOptions | None = None
) -> SavedRun:
    """A run that was trained, also for a program of your own.

    Args:
        folder: of the run.
        experiment: the name of its experiment.
        config_type: of its config.
        options: which checkpoint, and others of the commands.

    Raises:
        ConfigError: if it isn't the folder of such a run.
    """
    stored = run_folder.read_config(folder)
    if stored["experiment"] != experiment:
        raise errors.ConfigError(f"{folder} holds a run of {stored['experiment']}, not of {experiment}")
    run_config = config.from_json(config_type, stored["config"])
    return SavedRun(folder, run_config, options or SavedOptions())


def read_texts(words: Sequence[str], path: Path | None, *, example: str) -> tuple[list[str], list[str]]:
    """The texts that a command is asked about.

    Args:
        words: from the command line.
        path: a file with a text on each line, in their place; "-" is standard input.
        example: of the command, for the message.

    Returns:
        the texts, and what each is called in messages.

    Raises:
        ConfigError: if there are both words and a file, or neither.
        DataError: if the file can't be read, or a text is empty.
    """
    if bool(words) == (path is not None):
        raise errors.ConfigError(f"give either texts, as {example}, or --input FILE")
    texts = list(words) if path is None else read_lines(Path("/dev/stdin") if str(path) == "-" else path)
    places = [f"text {i:,}" if path is None else f"{path}, line {i:,}" for i in range(1, len(texts) + 1)]
    if not texts:
        raise errors.DataError(f"{path} is empty")
    for text, place in zip(texts, places, strict=True):
        if not text.strip():
            raise errors.DataError(f"{place} is empty")
    return texts, places


def check_output(path: Path) -> None:
    """Make sure that a file can be written there.

    Raises:
        ConfigError: if not.
    """
    if str(path) == "-":
        raise errors.ConfigError("--output names a file: leave it out to write to the terminal")
    if path.is_dir():
        raise errors.ConfigError(f"{path} is a folder, not a file to write to")
    if path.exists() and not path.is_file():
        raise errors.ConfigError(f"{path} is no regular file, which is what the outcome is written to")
    if not path.parent.is_dir():
        raise errors.ConfigError(f"{path} can't be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise errors.ConfigError(f"{path} can't be written: {path.parent} can't be written to")


def write_output(path: Path, content: str, what: str) -> None:
    """Write what a command has found, all of it or nothing, and say where.

    Args:
        path: of the file.
        content: of it.
        what: is in it, such as "12 translations".

    Raises:
        ConfigError: if it can't be written.
    """
    try:
        write_atomically(path.resolve(), content)  # what a link leads to, and not the link
    except OSError as error:
        raise errors.ConfigError(f"{path} can't be written: {error.strerror or error}") from None
    print(f"{what} in {path}")


def _check_encoding(word: str, place: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes of the command line that no encoding knows
        raise errors.DataError(f"{place} on the command line is not UTF-8") from None
