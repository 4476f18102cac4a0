"""Which columns of a table are features, target and weight, judged by its header."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tapedist.data.table_files import shown
from tapedist.errors import InputError

_MOST_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Column:
    """A column as the header shows it.

    Attributes:
        name: its name.
        numeric: whether it can be a feature, target or weight.
        kind: what it holds, in the user's words, for the message that refuses it.
    """

    name: str
    numeric: bool
    kind: str = "numbers"


@dataclasses.dataclass(frozen=True)
class Roles:
    """Columns by the part they play; `names` is the order in which rows are read.

    Attributes:
        features: at least one name.
        target: a name, or empty if rows have no target.
        weight: a name, or empty if all rows weigh 1.
        unused: columns that play no part, where the features were not named.
    """

    features: tuple[str, ...]
    target: str = ""
    weight: str = ""
    unused: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.features, *filter(None, (self.target, self.weight)))


def check_names(names: Sequence[str], where: str) -> None:
    """Refuses a header with a nameless or repeated column.

    Args:
        names: the header.
        where: file, and line if it has lines.

    Raises:
        InputError: naming the column.
    """
    for position, name in enumerate(names):
        if not name:
            raise InputError(f"{where}: column {position + 1} has no name; name it in the header, or drop it")
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise InputError(f"{where}: duplicate column {listed(repeated)} in the header; rename one of them")


def choose(
    columns: Sequence[Column],
    *,
    where: str,
    target: str,
    features: Sequence[str] = (),
    weight: str = "",
    need_target: bool = True,
) -> Roles:
    """Gives each column its part.

    Args:
        columns: the header.
        where: the table, for messages.
        target: the column to predict.
        features: the columns to predict from; empty takes all other numeric ones.
        weight: the column of row weights; empty weighs all rows alike.
        need_target: whether an empty `target` is an error.

    Raises:
        InputError: with every problem found.
    """
    present = {column.name: column for column in columns}
    problems = list(_wrong_roles(present, where, target, features, weight, need_target))
    if problems:
        raise InputError(*problems)
    taken = {target, weight}
    chosen = tuple(features) or tuple(c.name for c in columns if c.numeric and c.name not in taken)
    if not chosen:
        raise InputError(
            f"{where}: no numeric column is left to be a feature; present: {listed(present)}; encode text as numbers"
        )
    # Whoever names the features knows what is left out.
    unused = () if features else tuple(name for name in present if name not in chosen and name not in taken)
    return Roles(chosen, target, weight, unused)


def _wrong_roles(
    present: Mapping[str, Column], where: str, target: str, features: Sequence[str], weight: str, need_target: bool
) -> Iterator[str]:
    if need_target and not target:
        yield f"--target='': must name the column of {where} to predict; present: {listed(present)}"
    for flag, name in [("target", target), *(("features", f) for f in features), ("weight", weight)]:
        if not name and flag != "features":
            continue
        if not name:
            yield f"--{flag}={shown(','.join(features))}: holds an empty name; leave out the comma beside it"
        elif name not in present:
            near = [column for column in present if column.lower() == name.lower()]
            near = near or difflib.get_close_matches(name, present, n=1)
            hint = f"did you mean {shown(near[0])}? " if near else ""
            yield f"--{flag}={shown(name)}: no such column in {where}; {hint}present: {listed(present)}"
        elif not present[name].numeric:
            yield f"--{flag}={shown(name)}: holds {present[name].kind}, not numbers; encode it as numbers first"
    if len(set(features)) < len(features):
        yield f"--features={shown(','.join(features))}: names a column twice; name each once"
    if target and target in features:
        yield f"--target={shown(target)}: is among --features, so it would predict itself; take it out of --features"
    if weight and weight in features:
        yield f"--weight={shown(weight)}: is among --features; take it out of --features"
    if weight and weight == target:
        yield f"--weight={shown(weight)}: is the target too; give another column"


def listed(names: Iterable[str]) -> str:
    """Names for a message; of very many, the first."""
    names = list(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(map(shown, names[:_MOST_LISTED])) + more
