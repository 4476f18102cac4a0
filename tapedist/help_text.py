"""What `--help` prints."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from tapedist.text import written

_WIDTH = 100
_COLUMN = 30


class _Command(Protocol):
    """What the help of a command is made of; `cli.Command` says what each is."""

    @property
    def summary(self) -> str: ...
    @property
    def options(self) -> type: ...
    @property
    def examples(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> str: ...
    @property
    def groups(self) -> Mapping[str, str]: ...
    @property
    def rest(self) -> str: ...


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


def command_help(name: str, command: _Command) -> str:
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
            lines.append(_row(f"--{field.name}={written(field.default)}", _explained(field)))
    lines += [
        "\nCommon to all commands:\n",
        _row("--flagfile=FILE", "Reads flags from a file, one --name=value per line; # begins a comment."),
        _row("--verbosity=0", "1 shows the traceback of an error."),
        _row("--help", "Prints this."),
    ]
    if command.notes:
        lines += ["\nSignals:\n", *(f"  {line}\n" for line in textwrap.wrap(command.notes, _WIDTH - 2))]
    return "".join(lines)


def _explained(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    return field.metadata["help"] + (f" One of: {', '.join(choices)}." if choices else "")


def _row(left: str, right: str) -> str:
    return "".join(_lines(left, right))


def _lines(left: str, right: str) -> Iterator[str]:
    """`left` in its column, `right` wrapped beside it, or below it where `left` is too long."""
    lines = textwrap.wrap(right, _WIDTH - _COLUMN)
    if len(left) > _COLUMN - 4:
        yield f"  {left}\n"
    else:
        yield f"  {left:<{_COLUMN - 2}}{lines.pop(0)}\n"
    for line in lines:
        yield f"{'':<{_COLUMN}}{line}\n"
