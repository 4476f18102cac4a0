"""What is said of a table that was opened: rows that are not used, columns that are not, and why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapedist.data.tables.columns import Column, Roles, listed
from tapedist.data.tables.files import shown
from tapedist.data.tables.scan import Scanned


def row_notices(name: str, scanned: Scanned) -> Iterator[str]:
    """Sentences about bad cells; `name` is the table, as for the functions below."""
    if scanned.num_dropped:
        first = f"; the first: {scanned.first_bad}"
        yield f"{name}: {scanned.num_dropped} of {scanned.num_rows} rows have bad cells and are left out{first}"
    if scanned.num_imputed:
        first = "" if scanned.num_dropped else f"; the first: {scanned.first_bad}"
        yield f"{name}: {scanned.num_imputed} bad cells are replaced by the mean of their column{first}"


def column_notices(name: str, roles: Roles) -> Iterator[str]:
    """Sentences about columns that play no part, by the reason."""
    if roles.blank:
        yield f"{name}: columns not used, because they hold no number: {listed(roles.blank)}"
    yield from _unused_notices(name, roles.unused)


def partition_notice(name: str, partitions: Sequence[str]) -> str:
    return (
        f"{name}: partition column {listed(partitions)} is not used: it stands in the names of the folders, not in the "
        "files; add it to the files as a column to use it"
    )


def no_rows(name: str, roles: Roles, scanned: Scanned) -> str:
    """Why a table has no row to use, and the fix."""
    data = f"--data={name}"
    if not scanned.num_rows:
        return f"{data}: holds no rows below its header; give a table with rows"
    never = [name for name, bad in zip(roles.names, scanned.bad, strict=True) if bad == scanned.num_rows]
    what = f"{data}: holds no good row among {scanned.num_rows} below its header"
    if not never:
        return f"{what}; correct its bad cells"
    fix = roles.fix_without(never) if set(never) <= set(roles.features) else ""
    return f"{what}: no cell of {listed(never)} can be used; " + (f"leave it out by {fix}" if fix else "correct it")


def _unused_notices(name: str, unused: Sequence[Column]) -> Iterator[str]:
    plain = [column.name for column in unused if not column.aside and not column.doubt]
    if plain:
        yield f"{name}: columns not used: {', '.join(map(shown, plain))}"
    for reason in dict.fromkeys(column.aside for column in unused if column.aside):
        group = [column for column in unused if column.aside == reason]
        named = tuple(column.name for column in group if column.numeric and not column.problem)
        nameless = any(column.numeric and column.problem for column in group)
        fix = "; name them in the header to use them" if nameless else ""
        fix = "; name them in --features to use them" if named else fix
        yield f"{name}: columns not used, because they are {reason}: {listed(c.name for c in group)}{fix}"
    for column in unused:
        if column.doubt and not column.aside:
            yield f"{name}: column {shown(column.name)} is not used: {column.doubt}"
