"""Which columns of a table are features, target and weight, judged by the headers of all its files."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tapedist.data.tables.files import display
from tapedist.errors import InputError
from tapedist.text import to_text

_MOST_LISTED = 20
_MOST_TYPED = 200  # Characters of a fix that people copy.
# Names that nobody gave: pandas' for an index without a name, and for a column without one.
_LABELS = re.compile(r"__index_level_\d+__|__null_dask_index__|Unnamed: \d+(\.\d+)*(_level_\d+)?")
# The same where they stand first: no name at all, and R's, also as packages repair it.
_FIRST_LABELS = ("", "rownames", "row.names", "row_names", "...1")
_ROW_LABELS = "row labels, as pandas and R write them"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column as the header shows it.

    Attributes:
        name: its name.
        numeric: whether it can be a feature, target or weight.
        kind: what it holds, in the user's words, for the message that refuses it.
        blank: whether nothing was seen in it that tells what it holds.
        aside: why it is no feature unless it is asked for by name; empty if it is one.
        problem: why it cannot play a part, an error if it is to play one; empty if it can.
        doubt: why a user may take it for numbers although it is not numeric, or empty.
    """

    name: str
    numeric: bool
    kind: str = "numbers"
    blank: bool = False
    aside: str = ""
    problem: str = ""
    doubt: str = ""


@dataclasses.dataclass(frozen=True)
class Roles:
    """Columns by the part they play; `names` is the order in which rows are read.

    Attributes:
        features: at least one name.
        target: a name, or empty if rows have no target.
        weight: a name, or empty if all rows weigh 1.
        unused: columns that play no part, where the features were not named.
        chosen: whether the features were named.
        of_run: whether they are a trained run's, for which the user has no flags.
        blank: features that were left out because they hold no number.
    """

    features: tuple[str, ...]
    target: str = ""
    weight: str = ""
    unused: tuple[Column, ...] = ()
    chosen: bool = False
    of_run: bool = False
    blank: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.features, *filter(None, (self.target, self.weight)))

    def without(self, blank: Sequence[str]) -> Roles:
        """The same without features that hold no number."""
        features = tuple(name for name in self.features if name not in blank)
        return dataclasses.replace(self, features=features, blank=tuple(blank))

    def fix_without(self, names: Iterable[str]) -> str:
        """The flag that leaves features out; empty if there is none, or no feature would be left."""
        names = set(names)
        if self.of_run:
            return ""
        rest = tuple(name for name in self.features if name not in names)
        return features_flag(rest) if rest and len(rest) < len(self.features) else ""


def features_flag(names: tuple[str, ...]) -> str:
    """`--features=...` as it can be typed, or without its value where that is too long or cannot be."""
    text = to_text(names)
    return f"--features={shlex.quote(text)}" if len(text) <= _MOST_TYPED and text.isprintable() else "--features"


def row_labels(name: str, position: int) -> str:
    """Why a column is none of the user's data, by its name and its place; empty if it is."""
    return _ROW_LABELS if _LABELS.fullmatch(name) or (not position and name in _FIRST_LABELS) else ""


def without_repeats(columns: Sequence[Column], where: str) -> list[Column]:
    """Each name once; one that is there again cannot play a part.

    Args:
        columns: the header.
        where: file, and line if it has lines.
    """
    found: dict[str, Column] = {}
    for column in columns:
        first = found.setdefault(column.name, column)
        if first is not column:
            problem = f"{where}: duplicate column {display(column.name)} in the header; rename one of them"
            # Any of them might have been meant.
            found[column.name] = dataclasses.replace(
                first, numeric=first.numeric or column.numeric, problem=first.problem or problem
            )
    return list(found.values())


def merged(tables: Sequence[tuple[str, Sequence[Column]]], *, what: str = "columns") -> tuple[Column, ...]:
    """The columns of a table of several files, in the first one's order.

    Args:
        tables: where each header is, and its columns, each name once.
        what: the files' word for columns.
    """
    if len(tables) == 1:
        return tuple(tables[0][1])
    by_name: dict[str, list[tuple[str, Column]]] = {}
    for where, columns in tables:
        for column in columns:
            by_name.setdefault(column.name, []).append((where, column))
    differing = _differing(tables, what)
    return tuple(_merged_column(found, differing.get(name, "")) for name, found in by_name.items())


def _differing(tables: Sequence[tuple[str, Sequence[Column]]], what: str) -> dict[str, str]:
    """Columns that are not in all files, and what is said of the first file that has other columns than the first."""
    first_where, first = tables[0][0], {column.name for column in tables[0][1]}
    problems: dict[str, str] = {}
    for where, columns in tables[1:]:
        names = {column.name for column in columns}
        if names == first:
            continue
        odd = [("it lacks", sorted(first - names)), ("it has besides", sorted(names - first))]
        said = " and ".join(f"{verb} {listed(names)}" for verb, names in odd if names)
        problem = f"{where}: its {what} differ from those of {first_where}: {said}; give all files the same {what}"
        problems |= {name: problem for name in names ^ first if name not in problems}
    return problems


def _merged_column(found: Sequence[tuple[str, Column]], differing: str) -> Column:
    """One column of several files; a problem if they do not agree."""
    telling = [(where, column) for where, column in found if not column.blank] or found[:1]
    first_where, first = telling[0]
    problem = next((column.problem for _, column in found if column.problem), "") or differing
    odd = next(((where, column) for where, column in telling if column.numeric != first.numeric), None)
    if not problem and odd:
        problem = (
            f"{odd[0]}: column {display(first.name)} holds {odd[1].kind}, and {first.kind} in {first_where}; "
            "save it with one type in all files"
        )
    return dataclasses.replace(
        first, numeric=any(column.numeric for _, column in telling), problem=problem,
        aside=next((column.aside for _, column in found if column.aside), ""),
    )  # fmt: skip


def choose(
    columns: Sequence[Column],
    *,
    where: str,
    target: str,
    features: Sequence[str] = (),
    weight: str = "",
    need_target: bool = True,
    partitions: Sequence[str] = (),
    of_run: bool = False,
) -> Roles:
    """Gives each column its part.

    Args:
        columns: the header.
        where: the table, for messages.
        target: the column to predict.
        features: the columns to predict from; empty takes all other numeric ones that were not put aside.
        weight: the column of row weights; empty weighs all rows alike.
        need_target: whether an empty `target` is an error.
        partitions: columns that stand in the folders' names only.
        of_run: whether features and target are a trained run's, for which the user has no flags.

    Raises:
        InputError: with every problem found.
    """
    present = {column.name: column for column in columns}
    target, weight = _as_written(target, present), _as_written(weight, present)
    features = [_as_written(name, present) for name in features]
    asked = [("target", target), *(("features", name) for name in features), ("weight", weight)]
    problems = [*_wrong_names(present, where, target, features, weight, need_target, partitions, of_run)]
    problems += dict.fromkeys(present[name].problem for _, name in asked if name in present and present[name].problem)
    if problems:
        raise InputError(*problems)
    if len(columns) == 1 and need_target:
        raise InputError(f"{where}: a table needs at least two columns; write .csv with ',' or .tsv with tabs")
    taken = {target, weight}
    usual = [c for c in columns if c.numeric and not c.aside and c.name not in taken]
    chosen = tuple(features) or tuple(column.name for column in usual)
    if not chosen:
        raise InputError(_no_feature(present, where, taken))
    # Whoever names the features knows what is left out.
    unused = () if features else tuple(c for c in columns if c.name not in chosen and c.name not in taken)
    roles = Roles(chosen, target, weight, unused, chosen=bool(features), of_run=of_run)
    if not features:
        bad = [column for column in usual if column.problem]
        if bad:
            fix = roles.fix_without(column.name for column in bad)
            end = f", or leave it out by {fix}" if fix else ""
            raise InputError(*dict.fromkeys(column.problem + end for column in bad))
    return roles


def _no_feature(present: Mapping[str, Column], where: str, taken: set[str]) -> str:
    aside = [name for name, column in present.items() if column.aside and column.numeric and name not in taken]
    named = [name for name in aside if not present[name].problem]
    fix = f"use {features_flag(tuple(named))} if they are more than row labels" if named else "encode text as numbers"
    return f"{where}: no numeric column is left to be a feature; present: {listed(present)}; {fix}"


def _wrong_names(
    present: Mapping[str, Column], where: str, target: str, features: Sequence[str], weight: str, need_target: bool,
    partitions: Sequence[str], of_run: bool,
) -> Iterator[str]:  # fmt: skip
    if need_target and not target:
        yield f"--target='': must name the column of {where} to predict; present: {listed(present)}"
    for flag, name in [("target", target), *(("features", f) for f in features), ("weight", weight)]:
        if not name and flag != "features":
            continue
        said = f"--data={where}: column {display(name)}" if of_run and flag != "weight" else f"--{flag}={display(name)}"
        if not name:
            yield f"--{flag}={display(','.join(features))}: holds an empty name; leave out the comma beside it"
        elif name not in present and name in partitions:
            yield (
                f"{said}: is a partition column: it stands in the names of the folders ({display(name)}=...), not in "
                f"the files of {where}; add it to the files as a column (pandas.read_parquet(FOLDER) does)"
            )
        elif name not in present:
            yield f"{said}: no such column in {where}; {_nearest(name, present)}present: {listed(present)}"
        elif not present[name].numeric:
            yield f"{said}: holds {present[name].kind}, not numbers; encode it as numbers first"
    if len(set(features)) < len(features):
        yield f"--features={display(','.join(features))}: names a column twice; name each once"
    if target and target in features:
        yield f"--target={display(target)}: is among --features, so it would predict itself; take it out of --features"
    if weight and weight in features:
        yield f"--weight={display(weight)}: is among --features; take it out of --features"
    if weight and weight == target:
        yield f"--weight={display(weight)}: is the target too; give another column"


def _as_written(name: str, present: Mapping[str, Column]) -> str:
    """The column that a name means: one with other blanks is meant too, since some of them cannot be typed."""
    if not name or name in present:
        return name
    alike = [column for column in present if column.split() == name.split()]
    return alike[0] if len(alike) == 1 else name


def _nearest(name: str, present: Iterable[str]) -> str:
    """The column that was meant, if one can tell."""
    near = [column for column in present if column.lower().split() == name.lower().split()]
    near = near or difflib.get_close_matches(name, present, n=1)
    return f"did you mean {display(near[0])}? " if near else ""


def listed(names: Iterable[str]) -> str:
    """Names for a message; of very many, the first."""
    names = list(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(map(display, names[:_MOST_LISTED])) + more
