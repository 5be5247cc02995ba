"""Flat dataclasses from flags, to JSON and back, and what differs between two of them."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from jaxnets import errors
from jaxnets.remote import as_path, is_remote

T = TypeVar("T")
# A folder on the disk, or gs://bucket/folder (also to be refused): a plain path would lose a slash.
Folder = Annotated[
    Path | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_path(words[0]),
        is_instance=lambda value: value is None or isinstance(value, Path) or is_remote(value),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how an experiment runs; all of it may change when a run is resumed."""

    run_dir: Folder = None  # Folder of this run, or gs://BUCKET/FOLDER; runs/EXPERIMENT by default.
    # Folder with the data sets, or gs://BUCKET/FOLDER, of which a copy is kept on this host; by default
    # that of $JAXNETS_DATA, or ~/.cache/jaxnets/data.
    data_dir: Folder = None
    # What to do about local data files with another digest than the official: warn or strict.
    verify: str = "warn"
    # Go on where the run in the folder stopped. Otherwise an earlier run is moved aside.
    resume: bool = True
    # Go on although the config differs from the one that the run was started with.
    allow_change: bool = False
    # How training is spread over devices: jit or pmap, each a part of the batch and the whole state;
    # fsdp, the state is cut up as well; tensor, the model is, and each has the whole batch.
    strategy: str = "jit"
    # Sizes of the mesh's axes, such as data=2,fsdp=2,tensor=2, in place of --strategy.
    mesh: str | None = None
    # How many devices to use, of all processes together; all by default.
    num_devices: int | None = None
    # If not 0, compute each step in the order of so many shards of the batch, so that it is the same
    # bit for bit on any number of devices that divides it. BatchNorm then takes a shard's statistics.
    fixed_order: int = 0
    # HOST:PORT of process 0, for a run of several processes, or auto on a cluster that says it itself:
    # Cloud TPU, SLURM, Open MPI, Kubernetes.
    coordinator: str | None = None
    num_processes: int | None = None  # How many processes the run has.
    process_id: int | None = None  # Which of them this is, from 0.
    # Seconds of silence after which a process of the run is taken for dead, and the others end.
    heartbeat_s: float = 100.0
    # Seconds after SIGTERM in which the run comes to the end of its step and saves; 0 is no limit.
    grace_s: float = 25.0
    # End the run with the stacks of all processes if waiting for data, a step or a batch of evaluation
    # takes longer than this, in seconds; 0 is never. Compiling and saving have no limit.
    watchdog_s: float = 600.0
    # On a CPU, threads that XLA computes with; all cores by default. One is faster where a step takes
    # little more than a millisecond.
    threads: int | None = None
    # Steps that a call of the compiled program takes, where nothing needs the state in between. It
    # saves time where a step takes little longer than a call; for data in memory and --strategy jit.
    steps_per_call: int = 1
    jit: bool = True  # Compile. Otherwise run eagerly on one device, for debugging.
    # Read data as it is needed, as folders of images always are, although it fits on the device.
    stream: bool = False
    num_workers: int = 0  # Processes that read streamed data; 0 reads it in threads of this one.
    prefetch: int = 4  # Batches of streamed data that are read ahead.
    # How many examples of streamed training data that can't be read are left out, over the whole run;
    # one more ends it. Evaluation leaves out none; data in memory is whole.
    max_unreadable: int = 0
    max_resident_gb: float = 4.0  # How much data may be kept on each device, in gigabytes.
    # Keep compiled programs, so that the next start of the same run need not compile them again.
    cache_programs: bool = True
    # Folder that they are kept in; JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxnets/xla by default.
    program_cache: Folder = None
    # Steps to record in the folder `profile`, from the third on, for TensorBoard or Perfetto.
    profile_steps: int = 0
    # Draw confusion.png and samples.png after training; curves.png is always drawn.
    pictures: bool = True
    log_every: int = 50  # Steps between lines of the metrics.
    eval_every: int = 0  # Steps between evaluations; 0 is once for each epoch.
    checkpoint_every: int = 0  # Steps between checkpoints; 0 is after each evaluation.
    # How many of the checkpoints that evaluation found best are kept, beside the latest; going on
    # without this flag keeps one.
    keep_best: int = 1
    # Which checkpoint `eval` reads: latest, best, or the number of a step.
    checkpoint: str = "latest"
    # A Python file of yours that registers components, run before anything else; may be repeated.
    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    # About how long `duel` measures both sides, in seconds, without compilation.
    duel_seconds: float = 60.0
    duel_mode: str = "train"  # What `duel` compares the speed of: train or inference.
    # Training steps that `duel` compares in both precisions before anything is timed.
    parity_steps: int = 20


def parse_flags(
    argv: Sequence[str], config: T, *, options: RunOptions | None = None, prog: str, about: str
) -> tuple[T, RunOptions]:
    """Read the flags of an experiment.

    Args:
        argv: the words after the command.
        config: the defaults of the config.
        options: the defaults of the options.
        prog: the command, for the help.
        about: what the experiment is, for the help.

    Returns:
        config and options.

    Raises:
        ConfigError: if a flag is unknown or its value can't be read; the message is one line.
    """
    given = RunOptions() if options is None else options
    _check_flags(argv, (config, given), known=("--preset",))
    read = _read_together({"experiment": config, "run": given}, argv, prog=prog, about=about)
    return read.experiment, read.run


def parse_command(
    argv: Sequence[str], flags: Any, options: T, *, words: str, prog: str, about: str
) -> tuple[tuple[str, ...], Any, T]:
    """Read the words and flags of a command on a trained run.

    Args:
        argv: what stands behind the command; all that follows a bare -- are words.
        flags: the defaults of the command's own flags; None if it has none.
        options: the defaults of what all such commands take.
        words: what its words are, for the help; "" if it takes none.
        prog: the command, for the help.
        about: what it does, for the help.

    Returns:
        the words, the flags and the options.

    Raises:
        ConfigError: if a flag is unknown or its value can't be read, or it takes no words.
    """
    parts = {"run": options} if flags is None else {"own": flags, "run": options}
    advice = f"see --help; a {words} like this goes behind a bare --" if words else "see --help"
    _check_flags(argv, tuple(parts.values()), known=("--preset",), advice=advice)
    end = list(argv).index("--") if "--" in argv else len(argv)  # behind it words alone
    read = _read_together(parts, argv[:end], prog=prog, about=about, words=words or "WORD")
    found = (*read.words, *argv[end + 1 :])
    if found and not words:
        raise errors.ConfigError(f"{prog} takes flags alone, not {found[0]!r} (see --help)")
    return found, getattr(read, "own", None), read.run


def _check_flags(
    argv: Sequence[str], parts: Sequence[Any], *, known: Sequence[str], advice: str = "see --help"
) -> None:
    """Refuse a flag that no dataclass has, with the nearest one that is there."""
    names = {field.name: field.type for part in parts for field in dataclasses.fields(part)}
    flags = {f"--{name.replace('_', '-')}" for name in names}
    flags |= {f"--no-{name.replace('_', '-')}" for name, kind in names.items() if kind in (bool, "bool")}
    flags |= {"--help", *known}
    for word in argv:
        if word == "--":
            return
        flag = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and flag not in flags:
            raise errors.unknown("flag", flag, flags, advice=advice)


def _read_together(
    parts: Mapping[str, Any], argv: Sequence[str], *, prog: str, about: str, words: str = ""
) -> Any:
    """Read several dataclasses, and words if they have a name, from one command line."""
    fields: list[Any] = [
        (name, tyro.conf.OmitArgPrefixes[type(part)], dataclasses.field(default=part))
        for name, part in parts.items()
    ]
    if words:
        kind = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"[{words} ...]")]]
        fields.append(("words", kind, dataclasses.field(default=())))
    return read_words(dataclasses.make_dataclass("Flags", fields), argv, prog=prog, about=about)


def read_words(kind: type[T], argv: Sequence[str], *, prog: str, about: str | None = None) -> T:
    """Read a dataclass from the words of a command line.

    Args:
        kind: of dataclass.
        argv: the words.
        prog: the command, for the help.
        about: for the help; the docstring of the dataclass by default.

    Raises:
        ConfigError: if a flag is unknown or its value can't be read; the message is one line.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=list(argv), prog=prog, description=about)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise errors.ConfigError(_one_line(printed.getvalue())) from None


def preset_of(argv: Sequence[str], presets: Mapping[str, T]) -> tuple[str | None, list[str]]:
    """Take `--preset NAME` out of the words.

    Returns:
        the name, or None, and the other words.

    Raises:
        ConfigError: if there is no such preset, or no name.
    """
    rest, name, words = [], None, iter(argv)
    for word in words:
        if word == "--":  # behind it words alone
            rest += [word, *words]
        elif word == "--preset":
            name = next(words, "")
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
        else:
            rest.append(word)
    if name is not None and name not in presets:
        raise errors.unknown("preset", name, presets)
    return name, rest


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a config, as JSON holds them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path) or is_remote(value):
            return str(value)
        return [plain(x) for x in value] if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """A config from what `to_json` gave; fields that have come since take their defaults.

    Raises:
        ConfigError: if there are values for fields that this config doesn't have.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    strange = sorted(set(values) - set(names))
    if strange:
        raise errors.ConfigError(f"this experiment's config has no {', '.join(strange)}")
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> list[str]:
    """What differs between two configs, as "name old -> new".

    Example:
        >>> differences({"seed": 0, "epochs": 2}, {"seed": 1, "epochs": 3}, ignore=["epochs"])
        ['seed 0 -> 1']
    """
    names = [name for name in {**old, **new} if name not in ignore]
    return [
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _one_line(box: str) -> str:
    """Tyro's message without its frame and its advice."""
    lines = [re.sub(r"[╭╮╰╯│─]", "", line).strip() for line in box.splitlines()]
    lines = [line for line in lines if line]
    stop = next((i for i, line in enumerate(lines) if line.startswith(("Argument help", "For full"))), 9)
    return f"{' '.join(lines[1:stop]) or 'the flags could not be read'} (see --help)"
