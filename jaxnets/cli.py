"""The commands that every experiment has: train, eval and duel, written once against `Recipe`."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jaxlib.version

from jaxnets import agreement, defects, errors, memory, registry, resume, runner, startup
from jaxnets.allocator import keep_freed_memory
from jaxnets.commands import Command, run_command
from jaxnets.config import RunOptions, from_json, parse_flags, preset_of, to_json
from jaxnets.evaluation import make_evaluator
from jaxnets.recipe import Recipe
from jaxnets.train import (
    checkpoint,
    hosts,
    mesh,
    preemption,
    program_cache,
    run_folder,
    sharding,
    watchdog,
)
from jaxnets.train.verdict import by_first, together

_SILENCE_S = 3.0  # after which a user wonders
_LONG_S = 3600.0  # for what one process may do while the others wait
COMMANDS = {
    "train": "train, or go on with the run in the run folder",
    "eval": "evaluate a checkpoint of a run",
    "duel": "compare with PyTorch: the same numbers, then the speed of both",
}
MakeRecipe = Callable[[Any, RunOptions], Recipe]


@dataclasses.dataclass(frozen=True)
class Program:
    """A command that an experiment has for itself, which trains or does without a run.

    Attributes:
        about: one line for the help.
        run: `run(argv) -> exit status`, of the words behind its name.
    """

    about: str
    run: Callable[[Sequence[str]], int]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an experiment module hands to `main`.

    Attributes:
        name: as in `python -m experiments.NAME`, and of the default run folder.
        about: one line for the help.
        config: the default config, a flat frozen dataclass.
        make_recipe: `make_recipe(config, options) -> Recipe`.
        presets: other configs, by name.
        commands: what it can do with a trained run, by name, such as "predict".
        programs: what else it can do, by name, such as "crossvalidate".
        duel: fields of the config that the PyTorch reference doesn't have, and what they are in a duel
            where no flag says otherwise.
        closing: printed at the end of training; {python} stands for the interpreter.
    """

    name: str
    about: str
    config: Any
    make_recipe: MakeRecipe
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    commands: Mapping[str, Command] = dataclasses.field(default_factory=dict)
    programs: Mapping[str, Program] = dataclasses.field(default_factory=dict)
    duel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    closing: str = ""

    @property
    def module(self) -> str:
        """What `python -m` runs, such as "experiments.digits"; a user's own may lie anywhere."""
        spec = self.make_recipe.__globals__.get("__spec__")
        return spec.name if spec else f"experiments.{self.name}"


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run a command of an experiment.

    Args:
        experiment: which.
        argv: the words of the command line; those of this process by default.

    Returns:
        the exit status: 0, 1 if parity fails, 2 for a user's mistake, 70 if the watchdog ended the run,
        128 + n after signal n.
    """
    # The wait of a user who typed the command began with the process.
    begun = startup.process_start() if argv is None else time.perf_counter()
    words = list(sys.argv[1:] if argv is None else argv)
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if argv is None and words[:1] != ["train"] and is_default:
        # At once, and without an exception, which JAX loses in its callbacks, or crashes behind.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = _status(experiment, words, begun)
    if status and hosts.count() > 1:
        watchdog.leave(status)
    return status


def _status(experiment: Experiment, argv: list[str], begun: float) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(experiment, argv, begun)
    except errors.ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what was printed is no longer wanted, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a disk that is full, a folder that went away
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        if hosts.count() == 1:
            raise
        traceback.print_exc()
        return 1


def _run(experiment: Experiment, argv: list[str], begun: float) -> int:
    prog = f"python -m {experiment.module}"
    commands = (*COMMANDS, *experiment.programs, *experiment.commands)
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: {prog} {{{','.join(commands)}}} [FLAGS]\n\n{experiment.about}\n\n"
            f"{_listing(experiment)}\n{prog} COMMAND --help lists the flags."
        )
        return 0
    if not argv or argv[0].startswith("-"):
        raise errors.ConfigError(f"which command? {prog} {{{','.join(commands)}}} (see --help)")
    command = argv.pop(0)
    if command not in commands:
        raise errors.unknown("command", command, commands)
    if command in experiment.programs:
        return experiment.programs[command].run(argv)
    if command in experiment.commands:
        run_command(
            experiment.commands[command],
            argv,
            experiment=experiment.name,
            config_type=type(experiment.config),
            presets=experiment.presets,
            prog=f"{prog} {command}",
        )
        return 0
    preset, words = preset_of(argv, experiment.presets)
    default = experiment.presets[preset] if preset else experiment.config
    usual = default
    if command == "duel":  # without what the PyTorch reference doesn't have
        default = dataclasses.replace(default, **experiment.duel)
    about = experiment.about
    if experiment.presets:
        about += f" --preset NAME takes other defaults: {', '.join(experiment.presets)}."
    parse = partial(parse_flags, words, prog=f"{prog} {command}", about=about)
    named = {word.split("=")[0] for word in words}
    if "--epochs" in named and "--steps" not in named and hasattr(default, "steps"):
        default = dataclasses.replace(default, steps=None)  # which would count in their place
    config, options = parse(default)
    if command == "duel":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # its workers share a GPU
    for file in options.plugin:
        registry.load_file(file)
    if command == "duel":
        refuse_several(options, "duel measures")
    else:
        _join(options)
    if command != "duel":  # whose workers do both by themselves
        keep_freed_memory()
        if options.fixed_order and options.threads is not None:
            raise errors.ConfigError(
                "--fixed-order sets the number of threads, on which the order depends: leave out "
                "--threads"
            )
        # Sums are cut up by the number of threads: in the fixed order it is the same everywhere.
        startup.limit_threads(options.fixed_order if options.fixed_order > 0 else options.threads)
    folder = Path("runs") / (f"{experiment.name}-{preset}" if preset else experiment.name)
    folder = options.run_dir or folder
    options = dataclasses.replace(options, run_dir=folder)
    if command == "eval":
        # The run says what it was trained with; flags may still change where and on what.
        stored = run_folder.read_config(folder)
        if stored["experiment"] != experiment.name:
            raise errors.ConfigError(
                f"{folder} holds a run of {stored['experiment']}, not of {experiment.name}"
            )
        config, _ = parse(from_json(type(default), stored["config"]))
        with program_cache.opened(options.program_cache, use=options.cache_programs):
            return _eval(experiment, config, options, folder)
    if command == "duel":
        from jaxnets.interop.duel import run_duel  # the only command that needs PyTorch

        _say_what_differs(experiment, usual, config)
        with _announced(f"{experiment.name}: reading and preparing the data"):
            recipe = experiment.make_recipe(config, options)
        return run_duel(experiment.module, recipe, config, options)
    with program_cache.opened(options.program_cache, use=options.cache_programs) as programs:
        return _train(experiment, config, options, folder, begun, programs)


def _train(
    experiment: Experiment,
    config: Any,
    options: RunOptions,
    folder: Path,
    begun: float,
    programs: program_cache.Uses,
) -> int:
    values = to_json(config)
    agreement.check_start(values, options, experiment.make_recipe)
    for name in ("grace_s", "watchdog_s"):
        if not 0 <= getattr(options, name) < math.inf:
            flag = f"--{name.replace('_', '-')}"
            raise errors.ConfigError(f"{flag} is {getattr(options, name)}; it must be at least 0")
    for name in ("log_every", "eval_every", "checkpoint_every", "profile_steps"):
        if getattr(options, name) < (1 if name == "log_every" else 0):
            raise errors.ConfigError(f"{name} is {getattr(options, name)}; it counts steps")
    if options.keep_best < 1:
        raise errors.ConfigError(f"keep_best is {options.keep_best}; the best checkpoint is always kept")
    recipe, strategy, usages = _prepared(experiment, config, options)
    agreement.check_data(recipe, options.max_unreadable)
    _warn_of_defects(strategy)
    opened = run_folder.open_run(
        folder,
        experiment.name,
        values,
        resume=options.resume,
        allow_change=options.allow_change,
    )
    with (
        opened,
        preemption.StopOnSignal(grace_s=options.grace_s).installed() as stop,
        watchdog.Watchdog(
            options.watchdog_s, limits={"step": options.watchdog_s * options.steps_per_call}
        ) as dog,
        memory.explained(recipe, strategy),
    ):
        by_first("run folder/assets", lambda: run_folder.check_assets(folder, recipe.assets))
        data = agreement.data_of(recipe) if hosts.is_first() else {}
        if not options.allow_change:
            by_first("run folder/data", lambda: run_folder.check_data(folder, data))
        on_start = partial(run_folder.write_config, folder, experiment.name, values, recipe.assets, data)
        result = runner.train(
            folder,
            recipe,
            options,
            strategy,
            usages,
            stop=stop,
            watchdog=dog,
            on_start=on_start,
            begun=begun,
            programs=programs,
        )
    if result is None:
        assert stop.signal is not None
        return 128 + stop.signal
    if not hosts.is_first():
        return 0
    evaluated = result["eval"]
    drawn = [name for name in ("confusion.png", "samples.png") if (folder / name).exists()]
    pictures = "".join(f", {name}" for name in drawn if options.pictures)
    waited = result.get("seconds_to_first_step")
    print(
        f"{recipe.test_name} {recipe.monitor} {evaluated[recipe.monitor]:.4f} on "
        f"{evaluated['count']:,} examples after {result['epochs']:g} epochs; "
        f"{result['train_seconds']:.1f} s of training, "
        f"{result['compile_seconds']:.1f} s of compilation"
        f"{f', first step after {waited:.1f} s' if waited else ''}\n"
        f"everything is in {folder}: result.json, curves.png{pictures}, metrics.csv, checkpoints, "
        "tensorboard"
    )
    if experiment.closing:
        python = os.path.relpath(sys.executable) if os.sep in sys.executable else sys.executable
        print(experiment.closing.format(python=min(python, sys.executable, key=len)))
    return 0


def _listing(experiment: Experiment) -> str:
    """The commands and what they do."""
    about = dict(COMMANDS)
    for own in (experiment.programs, experiment.commands):
        about.update((name, command.about) for name, command in own.items())
    width = max(map(len, about))
    return "".join(f"{name:<{width}}  {line}\n" for name, line in about.items())


def _prepared(
    experiment: Experiment, config: Any, options: RunOptions
) -> tuple[Recipe, sharding.Strategy, Any]:
    """Recipe, strategy and what training asks of the devices; what one process refuses, all do."""
    made = []

    def prepare() -> None:
        with _announced(f"{experiment.name}: reading and preparing the data"):
            recipe = experiment.make_recipe(config, options)  # which may download for a while
        strategy = _strategy(options, recipe)
        made.append((recipe, strategy, runner.check_recipe(recipe, strategy, options)))

    together("the recipe", prepare, timeout_s=_LONG_S)
    return made[0]


def _say_what_differs(experiment: Experiment, usual: Any, config: Any) -> None:
    """Say what a duel doesn't take from the experiment because the PyTorch reference has none of it."""
    said = [
        f"--{name.replace('_', '-')} {value} instead of {getattr(usual, name)}"
        for name, value in experiment.duel.items()
        if getattr(config, name) == value != getattr(usual, name)
    ]
    if said:
        hosts.say(f"as the PyTorch reference has it: {', '.join(said)}")


@contextlib.contextmanager
def _announced(what: str) -> Iterator[None]:
    """Say what goes on, if it takes seconds."""
    timer = threading.Timer(_SILENCE_S, hosts.say, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _eval(experiment: Experiment, config: Any, options: RunOptions, folder: Path) -> int:
    agreement.check_start(to_json(config), options, experiment.make_recipe)
    if hosts.count() > 1:  # JAX's own handler only tells training; here nothing is to be saved
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    recipe, strategy, _ = _prepared(experiment, config, options)
    agreement.check_data(recipe)
    # Tokens of another vocabulary would give a loss that means nothing.
    by_first("run folder/assets", lambda: run_folder.check_assets(folder, recipe.assets))
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", maximize=recipe.maximize)
    abstract = strategy.abstract(runner.make_state(recipe))
    with (
        watchdog.Watchdog(options.watchdog_s) as dog,
        memory.explained(recipe, strategy, is_training=False),
    ):
        step, state = resume.read(checkpoints, options.checkpoint, abstract)
        evaluated = make_evaluator(recipe, strategy, options, beat=dog.beat)(state)
    if hosts.is_first():
        print(json.dumps({"step": step, "eval": evaluated}))
    return 0


def _strategy(options: RunOptions, recipe: Recipe) -> sharding.Strategy:
    sizes = None if options.mesh is None else mesh.read_sizes(options.mesh)
    is_cut = options.strategy in ("fsdp", "tensor") or sizes is not None
    return sharding.make_strategy(
        options.strategy,
        num_devices=options.num_devices,
        sizes=sizes,
        rules=recipe.rules if is_cut else None,
        use_jit=options.jit,
        virtual_shards=options.fixed_order,
    )


def _join(options: RunOptions) -> None:
    """Meet the other processes, if this run has any."""
    where, count, process = options.coordinator, options.num_processes, options.process_id
    if not 1 <= options.heartbeat_s < math.inf:
        raise errors.ConfigError(f"--heartbeat-s is {options.heartbeat_s:g}; it must be at least 1")
    is_given = (where, count, process) != (None, None, None)
    if where == "auto" or (not is_given and hosts.cluster_size() > 1):
        hosts.join(heartbeat_s=options.heartbeat_s)
    elif is_given:
        hosts.join(where, count, process, heartbeat_s=options.heartbeat_s)


def refuse_several(options: RunOptions, what: str) -> None:
    """For a command of one process.

    Args:
        options: of the command.
        what: it does with one, for the message, such as "duel measures".

    Raises:
        ConfigError: if several are asked for.
    """
    if options.coordinator or options.num_processes or options.process_id:
        raise errors.ConfigError(f"{what} one process; it takes no coordinator")


def _warn_of_defects(strategy: sharding.Strategy) -> None:
    version = jaxlib.version.__version__
    platform = strategy.mesh.devices.flat[0].platform
    line = defects.warning(version, platform, is_guarded=strategy.is_guarded)
    if line and defects.is_news(line):
        hosts.say(f"warning: {line}")


def _show_warning(message: Any, category: type, *_: Any) -> None:
    if category is UserWarning:  # ours; those of libraries are not for the user of a command
        hosts.say(f"warning: {message}")
