"""Command-line flags and flagfiles to frozen dataclasses, and back; the only file that touches absl.flags.

Flags are derived from a dataclass whose fields were made by `options.option`: a field is a flag of the same name.
Parsing collects problems instead of stopping at the first, so that a user sees all of them at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from absl import flags

from tapedist.errors import InputError
from tapedist.options import Default
from tapedist.text import READERS, display, quoted, to_text, wrong_characters

HELP_FLAGS = ("help", "helpfull", "h")
_GONE = {"virtual_shards": "is gone, because sums no longer depend on how rows are divided; drop it"}
_LINE_MARKS = {9: 32, 10: 32, 13: 32}
_MAX_FLAGFILE_BYTES = 2**25  # Room for a million true weights.
_MAX_FLAGFILES = 100

Options = TypeVar("Options")


class _Parser(flags.ArgumentParser):
    """A parser of absl that keeps a reader's error message as it is."""

    def __init__(self, read: Callable[[str], Any]):
        super().__init__()
        self._read = read

    def parse(self, argument: str) -> Any:
        try:
            return self._read(argument)
        except ValueError as error:
            raise flags.IllegalFlagValueError(str(error)) from None


def _verbosity(text: str) -> int:
    if text not in ("-1", "0", "1"):
        raise ValueError("must be 0, or 1 to see the traceback of an error")
    return int(text)


def _absl_flags(options: type, rest: str) -> flags.FlagValues:
    """A private set of flags, one per field; one that is not given stays None, so that its field keeps the default."""
    values = flags.FlagValues()
    for field in dataclasses.fields(options):
        if field.name != rest:
            kind = field.type if isinstance(field.type, str) else field.type.__name__
            parser, help_text = _Parser(READERS[kind]), field.metadata["help"]
            # --NAME and --noNAME work for switches with a third word, "auto", too.
            switch = kind == "bool" or {"true", "false"} <= set(field.metadata["choices"] or ())
            values[field.name] = flags.Flag(parser, None, field.name, None, help_text, boolean=switch)
    values["verbosity"] = flags.Flag(_Parser(_verbosity), None, "verbosity", None, "1 shows the traceback of an error.")
    return values


class CommandLine(Generic[Options]):
    """The flags of one command, parsed. Construction never fails; `options` raises all errors.

    `--flagfile=FILE` is replaced by the file's lines where it stands, as absl does: the last word on a flag wins. Files
    may include others; lines that are blank or begin with `#` or `//` are skipped.

    Attributes:
        help_wanted: whether a help flag was given.
        verbosity: the value of `--verbosity`.
    """

    def __init__(self, options: type[Options], words: Sequence[str], *, rest: str = "", of_older: bool = False):
        """Parses `words`.

        Args:
            options: the dataclass whose fields are the flags.
            words: the command's arguments, without the command.
            rest: the field that receives the words after `--`; if empty, there must be none.
            of_older: whether an older version may have written them; removed flags are then skipped.
        """
        self.help_wanted = False
        self._options = options
        self._rest = rest
        self._rest_words: list[str] = []
        self._flags = _absl_flags(options, rest)
        self._paths = {field.name for field in dataclasses.fields(options) if field.metadata["path"]}  # type: ignore[arg-type]
        self._given: dict[str, tuple[str, str]] = {}  # Each flag's last place ("" or "FILE:LINE: ") and text.
        self._doubtful: set[str] = set()  # Flags whose value is not known, so that rules about them do not apply.
        self._problems: list[str] = []
        self._files_read = 0
        self._of_older = of_older
        self._parse(list(words), place="", including=())

    @property
    def verbosity(self) -> int:
        return self._flags["verbosity"].value or 0

    def options(self) -> Options:
        """Makes the options from the flags.

        Raises:
            InputError: with all problems of the flags and of the options.
        """
        names = [field.name for field in dataclasses.fields(self._options) if field.name != self._rest]  # type: ignore[arg-type]
        given = {name: self._flags[name].value for name in names if self._flags[name].value is not None}
        if self._rest:
            given[self._rest] = tuple(self._rest_words)
        problems = list(self._problems)
        try:
            result = self._options(**given)
        except InputError as error:
            problems += [self._as_given(p) for p in error.problems if not self._doubtful & set(_flags_named(p))]
        if problems:
            raise InputError(*dict.fromkeys(problems))
        return result

    def _as_given(self, problem: str) -> str:
        """A problem of the options, with the value as the user wrote it and its place."""
        name = next(iter(_flags_named(problem)), "")
        if name not in self._given:
            return problem
        place, text = self._given[name]
        return place + problem.replace(f"--{name}={display(self._flags[name].value)}:", f"--{name}={display(text)}:", 1)

    def _parse(self, words: list[str], *, place: str, including: tuple[tuple[int, int], ...]) -> None:
        words.reverse()
        while words:
            word = words.pop()
            if word == "--" and not place:
                self._end_of_flags(words[::-1])
                return
            name, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
            if not word.startswith("-") or not name:
                self._problems.append(place + self._not_a_flag(word))
            elif name in HELP_FLAGS:
                self.help_wanted = True
            elif name.startswith("no") and name[2:] in self._flags and self._flags[name[2:]].boolean:
                if equals:
                    fix = f"takes no value; write --{name[2:]}=false"
                    self._refuse(name[2:], f"--{name}={display(value)}: {fix}", place)
                else:
                    self._set(name[2:], "false", place)
            elif name in _GONE and name not in self._flags:
                if not equals and words and not words[-1].startswith("--"):
                    equals, value = "=", words.pop()
                if not self._of_older:
                    self._problems.append(f"{place}--{name}{equals}{display(value) if equals else ''}: {_GONE[name]}")
            elif name != "flagfile" and name not in self._flags:
                self._unknown(name, equals + value, place)
            elif equals or (name in self._flags and self._flags[name].boolean):
                self._set(name, value if equals else "true", place, including)
            elif words and not words[-1].startswith("--"):
                self._set(name, words.pop(), place, including)
            else:
                self._refuse(name, f"--{name}: needs a value; write --{name}=VALUE", place)

    def _end_of_flags(self, words: list[str]) -> None:
        if self._rest:
            self._rest_words = words
        else:
            self._problems += map(self._not_a_flag, words)

    def _set(self, name: str, text: str, place: str, including: tuple[tuple[int, int], ...] = ()) -> None:
        try:
            if name == "flagfile":
                self._include(text, including)
                return
            # A shell does not expand `~` after `=`.
            self._flags[name].parse(os.path.expanduser(text) if name in self._paths else text)
        except flags.IllegalFlagValueError as error:
            self._refuse(name, f"--{name}={display(text)}: {error}", place)
        else:
            self._doubtful.discard(name)
            self._given[name] = place, text

    def _refuse(self, name: str, problem: str, place: str) -> None:
        self._problems.append(place + problem)
        self._doubtful.add(name)

    def _not_a_flag(self, word: str) -> str:
        last = next(reversed(self._given), "")
        if word.endswith(".flags"):
            fix = f"did you mean --flagfile={display(word)}?"
        elif last and self._flags[last].boolean and word.lower() in ("true", "false"):
            fix = f"write --{last}={word}, with '=' in place of the space"
        else:
            fix = "write --NAME=VALUE"
        return f"{quoted(word)}: is not a flag; {fix}"

    def _unknown(self, name: str, value: str, place: str) -> None:
        problem = f"--{display(name + value)}: is not a flag"
        if name.partition(" ")[0] in self._flags:
            problem += "; write --NAME=VALUE, with '=' in place of the space"
        elif near := difflib.get_close_matches(name, [*self._flags, "flagfile"], n=1):
            problem += f"; did you mean --{near[0]}?"
            if near[0] not in self._given:
                self._doubtful.add(near[0])
        else:
            problem += "; --help lists the flags"
        self._problems.append(place + problem)

    def _include(self, name: str, including: tuple[tuple[int, int], ...]) -> None:
        """Parses a flagfile's lines, each by itself.

        Raises:
            IllegalFlagValueError: with the rule that the file breaks.
        """
        # By device and inode: a file that includes itself may do so under another name.
        identity, lines = _read_flagfile(os.path.expanduser(name))
        if identity in including:
            raise flags.IllegalFlagValueError("includes itself; remove the line that includes it")
        self._files_read += 1
        if self._files_read > _MAX_FLAGFILES:
            raise flags.IllegalFlagValueError(
                f"is one of more than {_MAX_FLAGFILES} flagfiles; write fewer, larger ones"
            )
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if line and not line.startswith(("#", "//")):
                self._parse([line], place=f"{display(name)}:{number}: ", including=(*including, identity))


def _flags_named(problem: str) -> list[str]:
    return re.findall(r"--(\w+)", problem)


def _read_flagfile(path: str) -> tuple[tuple[int, int], list[str]]:
    """Reads a flagfile.

    Returns:
        The file's identity, the same under any of its names, and its lines.

    Raises:
        IllegalFlagValueError: with the rule that the file breaks.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # Reading a pipe or a device may never end.
            raise flags.IllegalFlagValueError("must be a regular file")
        with open(path, "rb") as file:
            content = file.read(_MAX_FLAGFILE_BYTES + 1)
    except OSError as error:
        raise flags.IllegalFlagValueError(f"cannot be read: {error.strerror}; give the path of a flagfile") from None
    except ValueError:
        raise flags.IllegalFlagValueError("must not hold NUL; give the path of a flagfile") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    # Bars at both ends, because blank lines there are allowed, where `wrong_characters` refuses blanks.
    if len(content) > _MAX_FLAGFILE_BYTES or wrong_characters(f"|{text.translate(_LINE_MARKS)}|"):
        raise flags.IllegalFlagValueError("must be a text file of at most 32 MiB, one --NAME=VALUE per line")
    return (status.st_dev, status.st_ino), text.split("\n")


def config_to_flagfile(config: Any) -> str:
    """The text of a flagfile with every field of `config`, one per line, so that later defaults do not change it.

    A default that is still to be resolved is left out, because a flag would make it the user's.

    Args:
        config: an instance of a dataclass made of `options.option` fields.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return "".join(f"--{name}={to_text(v)}\n" for name, v in values.items() if not isinstance(v, Default))
