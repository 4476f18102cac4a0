"""Which files a table is: a path, a folder or a pattern, resolved to regular files in one fixed order.

Nothing that may hold rows is left out without a word: what is not read is an error or a notice.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from tapedist.data.tables.files import (
    HEAD_BYTES,
    KNOWN,
    TableFile,
    content_problem,
    display,
    holds_rows,
    name_problem,
    table_format,
)
from tapedist.errors import InputError

_MOST_LISTED = 5
_PARTITION = re.compile(r"([^=]+)=(.*)", re.DOTALL)
# Folders in which a table's own log says which of its files count.
_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi", "_spark_metadata": "Spark streaming"}
# Passed over with the rest, but nobody's rows, and nearly everybody's.
_NO_ROWS = (".ipynb_checkpoints", ".git", "._*", "_temporary", ".~lock.*")


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """The files of a table.

    Attributes:
        format: a value of `FORMATS`.
        files: sorted by path, which is the order of the table's rows.
        partitions: `year` for folders named `year=2019`: columns that stand in the folders' names only.
        notices: sentences about what was passed over.
    """

    format: str
    files: tuple[TableFile, ...]
    partitions: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def find_files(data: str) -> FoundFiles:
    """The files that `data` names.

    Args:
        data: path of a file, of a folder (read with its subfolders, also linked ones), or a glob pattern, whose
            matching folders are read as folders. In folders and patterns, names that start with `.` or `_` are passed
            over, and files that are no tables are named in a notice.

    Raises:
        InputError: if nothing is there, if a file that may hold rows cannot be read, if a log says which files count,
            if formats are mixed, or if a file is there twice.
    """
    if "\0" in data:
        raise InputError(f"--data={data!r}: a path cannot hold NUL; give the path of a table")
    if os.path.isdir(data):
        walk = _Walk(data)
        return _of_many(walk, walk.paths([data]), root=data)
    if not os.path.lexists(data) and glob.has_magic(data):
        walk = _Walk(data)
        return _of_many(walk, walk.paths(walk.matches()), root=_fixed_part(data))
    file = TableFile.of(data)
    if not table_format(data):
        raise InputError(f"--data={display(data)}: {name_problem(data)}")
    _check_contents([file])
    return FoundFiles(table_format(data), (file,))


class _Walk:
    """Lists the files below folders, and what is passed over.

    Args:
        data: what the user gave.
    """

    def __init__(self, data: str):
        self.data = data
        self.hidden: list[str] = []
        # A pattern that says `_x` asks for such names.
        self._asked_for = [part for part in data.split(os.sep) if part[:1] in ("_", ".")]

    def matches(self) -> list[str]:
        """What the pattern matches, but for hidden names."""
        fixed, paths = _fixed_part(self.data), []
        found = sorted(glob.glob(self.data, recursive=True))
        for path in found:
            odd = next((part for part in _parts(path, fixed) if self._is_hidden(part)), "")
            if odd:
                self._pass_over(path[: path.index(odd, len(fixed)) + len(odd)])
            else:
                paths.append(path)
        if not paths:
            but = " but names that begin with _ or ., which are passed over" if found else ""
            raise InputError(f"--data={display(self.data)}: no file matches this pattern{but}; check the path")
        return paths

    def paths(self, starts: Iterable[str]) -> list[str]:
        """All files at and below `starts`, sorted, each path once."""
        found: set[str] = set()
        for start in starts:
            found.update(self._below(start, ()) if os.path.isdir(start) else [start])
        return sorted(found)

    def _below(self, folder: str, above: tuple[str, ...]) -> Iterator[str]:
        # Links are followed, because the rows behind them are the table's as well.
        real = os.path.realpath(folder)
        if real in above:
            raise InputError(
                f"--data={display(folder)}: comes back to a folder above it through a link; remove the link"
            )
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise InputError(
                f"--data={display(folder)}: {(error.strerror or str(error)).lower()}; make the folder readable"
            ) from None
        for name in names:
            path = os.path.join(folder, name)
            if self._is_hidden(name):
                self._pass_over(path)
            elif os.path.isdir(path):
                yield from self._below(path, (*above, real))
            else:
                yield path

    def _is_hidden(self, name: str) -> bool:
        return name[0] in "._" and not any(fnmatch.fnmatchcase(name, part) for part in self._asked_for)

    def _pass_over(self, path: str) -> None:
        """Notes what is hidden, if it may hold rows."""
        if any(fnmatch.fnmatchcase(os.path.basename(path), pattern) for pattern in (*_NO_ROWS, *_LOGS)):
            return
        if os.path.isdir(path):
            below = (name for _, _, names in os.walk(path) for name in names)
            if not any(table_format(name) or holds_rows(name) for name in below):
                return
        elif not table_format(path) and not holds_rows(path):
            return
        if path not in self.hidden:
            self.hidden.append(path)


def _of_many(walk: _Walk, paths: Sequence[str], *, root: str) -> FoundFiles:
    """The table that a folder or a pattern is; `root` is the folder whose names are the user's choice."""
    _refuse_logs(walk.data, root, paths)
    tables = [path for path in paths if table_format(path)]
    others = [path for path in paths if not table_format(path)]
    unreadable = [path for path in others if holds_rows(path)]
    if not tables:
        raise InputError(_no_table(walk, others, unreadable))
    only = _fix_by_pattern(walk.data, root, tables)
    if unreadable:
        raise InputError(f"--data={display(unreadable[0])}: {name_problem(unreadable[0])}{only}")
    formats = sorted({table_format(path) for path in tables})
    if len(formats) > 1:
        some = [path for path in tables if table_format(path) == formats[0]]
        only = _fix_by_pattern(walk.data, root, some)
        raise InputError(f"--data={display(walk.data)}: mixes {' and '.join(formats)} files; keep one format{only}")
    files = tuple(map(_part, tables))
    _refuse_twice(files)
    _check_contents(files)
    found = [_PARTITION.fullmatch(part) for path in tables for part in _parts(path, root)[:-1]]
    partitions = tuple(dict.fromkeys(match[1] for match in found if match))
    return FoundFiles(formats[0], files, partitions, tuple(_notices(walk, others)))


def _part(path: str) -> TableFile:
    """A file among others."""
    if os.path.isfile(path) and not os.path.getsize(path):
        raise InputError(f"--data={display(path)}: the file is empty; write it again, or remove it if it has no rows")
    return TableFile.of(path)


def _no_table(walk: _Walk, others: Sequence[str], unreadable: Sequence[str]) -> str:
    if unreadable:
        return f"--data={display(unreadable[0])}: {name_problem(unreadable[0])}"
    if len(others) == 1:
        return f"--data={display(others[0])}: {name_problem(others[0])}"
    what = "the folder holds" if os.path.isdir(walk.data) else "the pattern matches"
    there = f", but {_listed(others)}" if others else ""
    there += f"; names that begin with _ or . are passed over ({_listed(walk.hidden)})" if walk.hidden else ""
    return f"--data={display(walk.data)}: {what} no table{there}; known are {KNOWN}"


def _notices(walk: _Walk, others: Sequence[str]) -> Iterator[str]:
    if others:
        yield f"{display(walk.data)}: files not read, because their names are no table's: {_listed(others)}"
    if walk.hidden:
        yield f"{display(walk.data)}: not read, because of the _ or . that begins the name: {_listed(walk.hidden)}"


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _MOST_LISTED} more" if len(paths) > _MOST_LISTED else ""
    return ", ".join(map(display, paths[:_MOST_LISTED])) + more


def _fix_by_pattern(data: str, root: str, tables: Sequence[str]) -> str:
    """A pattern that takes `tables` only, as the end of a message; empty if there is none so simple."""
    ends = {os.path.splitext(path)[1] for path in tables}
    if len(ends) > 1 or not data.isprintable():
        return ""
    last = f"*{ends.pop()}"
    folders = [data] if not os.path.isdir(data) else [glob.escape(data)]
    if os.path.isdir(data):
        nested = any(len(_parts(path, root)) > 1 for path in tables)
        pattern = os.path.join(folders[0], "**", last) if nested else os.path.join(folders[0], last)
    elif data.endswith("*") and not data.endswith("**") and any(fnmatch.fnmatchcase(path, data) for path in tables):
        pattern = data + last[1:]
    else:
        pattern = os.path.join(data, "**", last)
    return f", or give the files that count: --data={shlex.quote(pattern)}"


def _refuse_twice(files: Sequence[TableFile]) -> None:
    """Refuses a file that links make appear under two names."""
    seen: dict[tuple[int, int], TableFile] = {}
    for file in files:
        first = seen.setdefault(file.inode, file)
        if first is not file:
            raise InputError(
                f"--data={file.name}: is the same file as {first.name}, by a link, and its rows would count twice; "
                "remove one of the two names"
            )


def _check_contents(files: Iterable[TableFile]) -> None:
    for file in files:
        with open(file.path, "rb") as stream:
            problem = content_problem(file.path, stream.read(HEAD_BYTES))
        if problem:
            raise InputError(f"--data={file.name}: {problem}")


def _refuse_logs(data: str, root: str, paths: Iterable[str]) -> None:
    """Refuses folders of whose files only some are the table, as its log knows."""
    asked: set[str] = set()
    top = os.path.abspath(root)
    for folder in {top, *(os.path.dirname(os.path.abspath(path)) for path in paths)}:
        while folder not in asked:
            asked.add(folder)
            kind, log = _log_in(folder)
            if log:
                log = log if os.path.isabs(data) else os.path.relpath(log)
                raise InputError(
                    f"--data={display(data)}: {display(log)} belongs to {kind} table and says which of its files "
                    "count; read without it, removed rows would be there again; copy the files that count into a "
                    "folder of their own, or save the table as Parquet by the tool that keeps it"
                )
            # Above what the user named, only folders that are parts of a larger table.
            if not folder.startswith(top + os.sep) and not _is_part(os.path.basename(folder)):
                break
            folder = os.path.dirname(folder)


def _is_part(name: str) -> bool:
    """Whether a folder's name is that of a part of a table: a partition, or the data beside Iceberg's metadata."""
    return name == "data" or bool(_PARTITION.fullmatch(name))


def _log_in(folder: str) -> tuple[str, str]:
    """The kind and the path of the log of the table in `folder`; empty words if there is none."""
    for name, kind in _LOGS.items():
        if os.path.isdir(os.path.join(folder, name)):
            return f"a {kind}", os.path.join(folder, name)
    metadata = os.path.join(folder, "metadata")
    if os.path.isdir(metadata):
        newest = [name for name in sorted(os.listdir(metadata)) if name.endswith(".metadata.json")]
        if newest:
            return "an Iceberg", os.path.join(metadata, newest[-1])
    return "", ""


def _fixed_part(pattern: str) -> str:
    """The folders of a pattern before its first wildcard."""
    fixed: list[str] = []
    for part in pattern.split(os.sep)[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return os.sep.join(fixed) or (os.sep if pattern.startswith(os.sep) else "")


def _parts(path: str, root: str) -> list[str]:
    """The names below `root` that lead to `path`."""
    return [part for part in path[len(root) :].split(os.sep) if part]
