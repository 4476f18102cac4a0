"""The command line: commands in, exit codes out.

To add a command, write a function that takes its options and has its imports inside, and one row of `COMMANDS`. The
options are a dataclass of `options.option` fields in a module that imports no TensorFlow, because flags, and all else
that can be checked in milliseconds, are checked before TensorFlow's import, which takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from tapedist import flags, process, runtime_flags
from tapedist.cluster import doctor, launch
from tapedist.cluster.doctor import DoctorConfig
from tapedist.cluster.launch import LaunchConfig
from tapedist.command_options import EvaluateOptions, PredictOptions, RunOptions, VerifyOptions
from tapedist.config import GROUPS, TrainConfig
from tapedist.errors import InputError, StorageError, TapedistError
from tapedist.text import display, quoted, to_text
from tapedist.version import __version__

_MAX_LINES = 20
_SIGNALS = (
    "SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU save and leave, with the exit code 128 and the signal's "
    "number (130, 143, 129, 138, 140, 152); the same command goes on from there. So SLURM's --signal=USR1@120 or "
    "TERM@120 saves two minutes before the time limit. A second SIGINT leaves at once. What was ignored at the start, "
    "as SIGHUP is under nohup, stays ignored."
)
_WIDTH = 100
_COLUMN = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        summary: one sentence for the help.
        options: the dataclass whose fields are the command's flags.
        run: takes the options; returns an exit code, or None for 0.
        examples: command lines for the help, without `tapedist`.
        notes: the help's section on signals.
        groups: the first field of each group of flags -> the group's heading in the help.
        rest: the field that receives the words after `--`, if the command takes any.
        answers: whether its output is its result, so that a full disk behind standard output is an error.
    """

    summary: str
    options: type
    run: Callable[[Any], int | None]
    examples: tuple[str, ...] = ()
    notes: str = ""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rest: str = ""
    answers: bool = False


def _check_run_dir(config: TrainConfig) -> None:
    """Checks the run folder without TensorFlow, and changes nothing.

    Raises:
        InputError: if the folder cannot be used, or holds no run although `--resume=must`.
        StateError: if a later version made it.
    """
    from tapedist.storage import run_folder

    run_folder.check(config.run_dir)
    if config.resume == "must":
        try:
            run_folder.RunFolder.find(config.run_dir)
        except InputError as error:
            raise InputError(*(f"--resume=must: {problem}" for problem in error.problems)) from None


def _train(config: TrainConfig) -> None:
    from tapedist.cluster import network, resolve
    from tapedist.data import catalog
    from tapedist.storage import model_file, run_folder

    spec = resolve.of_run(config, os.environ)
    network.check_own_name(spec.address, timeout_secs=config.cluster_timeout_secs)
    network.check_own_port(spec.address)
    if config.strategy == "tpu":
        network.check_tpu(config.tpu)
    process.check_memory_limit()
    if config.run_dir and spec.is_chief:
        _check_run_dir(config)
    catalog.check_source(config)
    if config.init_from:
        model_file.find_start(config.init_from)
    # Locked before TensorFlow is imported: of several runs in one folder, all but one fail here within milliseconds.
    folder = run_folder.RunFolder.open(config.run_dir) if config.run_dir and spec.is_chief else None
    with folder or contextlib.nullcontext():
        with process.quiet_start():
            with process.importing():
                from tapedist.run.train import find_devices, train_in  # The first import of TensorFlow.

            find_devices()
        train_in(folder, config, spec=spec, quiet=False)


def _commands() -> Any:
    from tapedist import commands  # It imports NumPy, which --help need not wait for.

    return commands


def _verify(options: VerifyOptions) -> None:
    from tapedist.verification import command

    command.verify(options)


def _launch(options: LaunchConfig) -> int:
    # The workers' flags are checked here first, for one error message rather than one of each worker.
    training = flags.CommandLine(TrainConfig, options.worker_argv[1:]).options()
    launch.check_training(options, training)
    return launch.main(options, on_cpus=training.num_virtual_devices > 0)


COMMANDS: dict[str, Command] = {
    "train": Command(
        summary="Fit a model by gradient descent.",
        options=TrainConfig,
        run=_train,
        groups=GROUPS,
        notes=_SIGNALS,
        examples=(
            "train --flagfile=configs/tutorial.flags",
            "train --n_samples=1e9 --run_dir=runs/billion",
            "train --mode=mini_batch --batch_size=4096 --optimizer=adam --learning_rate=0.01",
            "train --num_virtual_devices=4 --run_dir=runs/four",
        ),
    ),
    "evaluate": Command(
        summary="Say how well a run's model fits its own rows, or a table.",
        options=EvaluateOptions,
        run=lambda options: _commands().evaluate(options),
        examples=("evaluate --run_dir=runs/tutorial", "evaluate --run_dir=runs/flights --data=later.csv"),
        answers=True,
    ),
    "predict": Command(
        summary="Predict the target of every row of a table.",
        options=PredictOptions,
        run=lambda options: _commands().predict(options),
        examples=("predict --run_dir=runs/flights --data=new.parquet --output=predicted.parquet --interval",),
    ),
    "report": Command(
        summary="Make a run's report.html again.",
        options=RunOptions,
        run=lambda options: _commands().report(options),
        examples=("report --run_dir=runs/tutorial",),
    ),
    "export": Command(
        summary="Save a run's model as a SavedModel.",
        options=RunOptions,
        run=lambda options: _commands().export(options),
        examples=("export --run_dir=runs/tutorial",),
    ),
    "verify": Command(
        summary="Recompute a run in plain NumPy, and say whether the numbers that it stored are the same.",
        options=VerifyOptions,
        run=_verify,
        notes="SIGINT ends it with exit code 130; it writes nothing, so nothing has to be saved.",
        examples=("verify --run_dir=runs/tutorial", "verify --run_dir=runs/million --epochs=10"),
        answers=True,
    ),
    "launch": Command(
        summary="Train in several processes of this machine, restarted together when one is lost.",
        options=LaunchConfig,
        run=_launch,
        rest="worker_argv",
        notes="Signals go on to the workers, which save and leave; the exit code is 128 and the signal's number.",
        examples=(
            "launch --num_workers=2 -- train --flagfile=configs/mini_batch.flags",
            "launch --num_workers=4 --max_restarts=10 --log_dir=logs -- train --run_dir=runs/four",
        ),
    ),
    "doctor": Command(
        summary="Look at this machine: what is here, whether it works, what to fix.",
        options=DoctorConfig,
        run=doctor.main,
        examples=("doctor", "doctor --run_dir=runs/tutorial"),
        answers=True,
    ),
}


def main(argv: Sequence[str] | None = None, *, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Runs one command line.

    Args:
        argv: the words after `tapedist`; by default those of this process.
        commands: name -> command.

    Returns:
        The exit code: 0, or that of the error that ended the command, which is on stderr, a line per problem.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    line: flags.CommandLine[Any] | None = None
    try:
        with process.signals_raise():
            name = words[0] if words else ""
            if name == "help" and len(words) > 1:
                name, words = words[1], [words[1], "--help"]
            if name.lstrip("-") in flags.HELP_FLAGS:
                print(commands_help({name: command.summary for name, command in commands.items()}), end="")
                return 0
            if name == "--version":
                print(f"tapedist {__version__}")
                return 0
            if name not in commands:
                raise InputError(_no_command(name, commands))
            command = commands[name]
            line = flags.CommandLine(command.options, words[1:], rest=command.rest)
            if line.help_wanted:
                print(command_help(name, command), end="")
                return 0
            with process.noise_shown(line.verbosity > 0), runtime_flags.keras_left_out():
                code = command.run(line.options()) or 0
                if command.answers:
                    process.check_output()
                return code
    except (Exception, KeyboardInterrupt, process.Terminated) as error:
        return _report(error, with_traceback=line is not None and line.verbosity > 0)


def entry_point() -> NoReturn:
    """The `tapedist` command: `main` on this process's words, streams and signals."""
    process.harden_streams()
    sys.exit(main())


def _no_command(name: str, commands: Mapping[str, Command]) -> str:
    rule = f"must be one of {', '.join(commands)}"
    if not name or name.startswith("-"):
        return f"the first word {rule}; tapedist --help shows how" + (f" (got {quoted(name)})" if name else "")
    near = difflib.get_close_matches(name, commands, n=1)
    return f"{quoted(name)}: {rule}" + (f"; did you mean {near[0]}?" if near else "; tapedist --help shows how")


def _report(error: BaseException, *, with_traceback: bool) -> int:
    """Prints `error` on stderr, a line per problem, and returns its exit code."""
    code, problems = _explained(error)
    if with_traceback:
        traceback.print_exception(error)
    if len(problems) > _MAX_LINES:
        problems = [*problems[:_MAX_LINES], f"and {len(problems) - _MAX_LINES} more problems like these"]
    for problem in problems:
        # Also for messages of libraries: one line per problem, and no control character reaches the terminal.
        clean = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in problem)
        print(f"tapedist: error: {clean}", file=sys.stderr)
    return code


def _explained(error: BaseException) -> tuple[int, Sequence[str]]:
    """The exit code and the problems of `error`."""
    if isinstance(error, InputError):
        return error.exit_code, error.problems
    if isinstance(error, TapedistError):
        return error.exit_code, [str(error)]
    if isinstance(error, process.Terminated):
        return 128 + error.signum, [f"stopped by {signal.Signals(error.signum).name}"]
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, ["stopped by SIGINT"]
    if isinstance(error, MemoryError):
        return InputError.exit_code, ["out of memory; free some, or lower --batch_size, or use --cache=none"]
    if isinstance(error, OSError) and error.errno in process.STORAGE_ERRNOS:
        where = f" {display(str(error.filename))}" if error.filename else ""
        return StorageError.exit_code, [f"cannot write{where}: {error.strerror}; make room or choose another --run_dir"]
    what = f"{type(error).__name__}: {error}".strip().rstrip(":")
    return TapedistError.exit_code, [f"bug in tapedist: {what}; --verbosity=1 shows the traceback, please report it"]


def commands_help(summaries: Mapping[str, str]) -> str:
    """The help of `tapedist` itself: each command with its summary."""
    rows = "".join(_row(name, summary) for name, summary in summaries.items())
    return (
        "usage: tapedist COMMAND [--flag=value ...]\n\n"
        "Linear models by gradient descent on TensorFlow: the same bits on any number of devices.\n\n"
        f"commands:\n{rows}\n"
        "examples:\n"
        "  tapedist train --flagfile=configs/tutorial.flags\n"
        "  tapedist train --help\n"
    )


def command_help(name: str, command: Command) -> str:
    """The help of one command: usage, examples, then its flags with their defaults, in groups."""
    lines = [f"usage: tapedist {name} [--flagfile=FILE] [--flag=value ...]{' -- WORD ...' * bool(command.rest)}\n"]
    lines += ["\n", f"{command.summary}\n"]
    if command.examples:
        lines += ["\nexamples:\n", *(f"  tapedist {example}\n" for example in command.examples)]
    if not command.groups:
        lines.append("\nflags:\n")
    for field in dataclasses.fields(command.options):
        if field.name in command.groups:
            lines.append(f"\n{command.groups[field.name]}:\n")
        if field.name != command.rest:
            lines.append(_row(f"--{field.name}={to_text(field.default)}", _field_help(field)))
    lines += [
        "\nCommon to all commands:\n",
        _row("--flagfile=FILE", "Reads flags from a file, one --name=value per line; # begins a comment."),
        _row("--verbosity=0", "1 shows the traceback of an error."),
        _row("--help", "Prints this."),
    ]
    if command.notes:
        lines += ["\nSignals:\n", *(f"  {line}\n" for line in textwrap.wrap(command.notes, _WIDTH - 2))]
    return "".join(lines)


def _field_help(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    return field.metadata["help"] + (f" One of: {', '.join(choices)}." if choices else "")


def _row(left: str, right: str) -> str:
    return "".join(_lines(left, right))


def _lines(left: str, right: str) -> Iterator[str]:
    """`left` in the first column, `right` wrapped in the second, or below where `left` is too long."""
    lines = textwrap.wrap(right, _WIDTH - _COLUMN)
    if len(left) > _COLUMN - 4:
        yield f"  {left}\n"
    else:
        yield f"  {left:<{_COLUMN - 2}}{lines.pop(0)}\n"
    for line in lines:
        yield f"{'':<{_COLUMN}}{line}\n"
