"""Columns of numbers that a Python program hands over: arrays, dicts of arrays, tables of pandas, polars and Arrow.

None of those libraries is imported for it: a table is known by what it offers. Names are text here, whatever they were.

Legend: `k` rows, `d` columns.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tapedist.data.tables.columns import listed
from tapedist.errors import InputError
from tapedist.text import quoted

_EXACT = 2**53  # Up to here, float64 holds every integer.
_PLAIN = {"b": np.dtype(bool), "i": np.dtype(np.int64), "u": np.dtype(np.uint64), "f": np.dtype(np.float64)}


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A table whose columns have names.

    Attributes:
        names: of its columns, in order.
        column: gives one by its place.
        floats: the whole table `[k, d]`, where it is one array of floats already; else None.
    """

    names: tuple[str, ...]
    column: Callable[[int], Any]
    floats: Callable[[], np.ndarray] | None = None

    @classmethod
    def of(cls, table: Any) -> Frame | None:
        """The columns of a table by name; None for what has no names, such as an array or a list."""
        if isinstance(table, Mapping):
            keys = list(table)
            return cls(text_names(keys), lambda place: table[keys[place]])
        if isinstance(table, np.ndarray):
            fields = table.dtype.names
            return None if fields is None else cls(fields, lambda place: table[fields[place]])
        if _is_pandas(table) and hasattr(table, "columns"):
            kinds = set(table.dtypes)
            whole = len(kinds) == 1 and _is_float(next(iter(kinds)))
            floats = (lambda: np.asarray(table)) if whole else None
            return cls(text_names(table.columns), lambda place: table.iloc[:, place], floats)
        if arrow := _arrow_table(table):
            return cls(text_names(arrow.column_names), arrow.column)
        return None


def text_names(names: Iterable[Any]) -> tuple[str, ...]:
    """Names as text: a table that nobody named counts its columns."""
    return tuple(map(str, names))


def matrix(table: Any, where: str, *, names: Sequence[str] = ()) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Columns of numbers.

    Args:
        table: an array or nested lists, whose columns go by position; or a table, whose columns go by name.
        where: the argument, for messages.
        names: the columns of a table to take, in this order; empty takes all. An array is taken whole.

    Returns:
        A float array, `[k, d]` if it came from a table, and the columns' names; None for an array's.

    Raises:
        InputError: if a column is not there or not unique, or holds something else than numbers.
    """
    frame = Frame.of(table)
    if frame is None:
        return numbers(table, where), None
    wanted = tuple(names) or frame.names
    places = _places(frame, wanted, where)
    if frame.floats:
        whole = frame.floats()
        return _exact(whole if wanted == frame.names else whole[:, places], where), wanted
    otherwise = "" if names else ", or take other columns by feature_names"
    columns = [
        numbers(frame.column(place), f"column {quoted(name)} of {where}", otherwise=otherwise)
        for name, place in zip(wanted, places, strict=True)
    ]
    shapes = {column.shape for column in columns}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        described = ", ".join(sorted(str(list(shape)) for shape in shapes))
        raise InputError(f"{where}: its columns have the shapes {described}; must be [rows], the same for all")
    return np.stack(columns, axis=1) if columns else np.zeros((0, 0)), wanted


def _places(frame: Frame, wanted: Sequence[str], where: str) -> list[int]:
    """Where the wanted columns are."""
    counts = collections.Counter(frame.names)
    missing = [name for name in wanted if name not in counts]
    if missing:
        raise InputError(
            f"{where}: lacks the columns {listed(missing)}; present: {listed(frame.names)}; rename its columns, or "
            "give an array, whose columns go by position"
        )
    repeated = [name for name in dict.fromkeys(wanted) if counts[name] > 1]
    if repeated:
        raise InputError(f"{where}: has more than one column named {listed(repeated)}; rename all but one of them")
    places = {name: place for place, name in enumerate(frame.names)}
    return [places[name] for name in wanted]


def numbers(column: Any, where: str, *, otherwise: str = "") -> np.ndarray:
    """An array or one column as float32 or float64 of the same numbers, not copied where it is that already.

    Args:
        column: anything that is an array, a column of a table, or nested lists.
        where: the argument, and the column of a table, for messages.
        otherwise: what else can be done than to convert it.

    Raises:
        InputError: if it is masked, has missing values, or does not hold numbers that float64 has.
    """
    check_mask(column, where)
    if hasattr(column, "tocsr") and hasattr(column, "toarray"):
        raise InputError(f"{where}: is a sparse matrix; give {where}.toarray()")
    if hasattr(column, "isna") and hasattr(column, "dtype"):
        return _exact(_pandas_values(column, where, otherwise), where, otherwise)
    if hasattr(column, "__arrow_c_stream__") or hasattr(column, "__arrow_c_array__"):
        return _exact(_arrow_values(column, where, otherwise), where)
    if isinstance(column, (list, tuple)) and any(isinstance(row, Mapping) or _is_pandas(row) for row in column):
        raise InputError(f"{where}: is a list of rows with names; make a table of it, as pandas.DataFrame({where})")
    try:
        array = np.asarray(column)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{where}: is no array ({quoted(str(error))}); give rows of equal length") from None
    if array.dtype.kind == "O" and not array.ndim:
        raise InputError(f"{where}: is of type {type(column).__name__}; give an array, nested lists or a table")
    return _exact(array, where, otherwise)


def check_mask(array: Any, where: str) -> None:
    """Refuses numbers under a mask, which are none; a mask that hides nothing is fine.

    Raises:
        InputError: if a number is masked, in an array or in an array of a list.
    """
    parts = array if isinstance(array, (list, tuple)) else [array]
    masks = [np.ma.getmaskarray(part) for part in parts if isinstance(part, np.ma.MaskedArray)]
    count = sum(int(np.array(mask.tolist()).sum()) if mask.dtype.names else int(mask.sum()) for mask in masks)
    if count:
        rows = ".any(axis=1)" if getattr(array, "ndim", 2) > 1 else ""
        name = "..." if not where.isidentifier() else f"np.ma.array({where})" if parts is array else where
        raise InputError(
            f"{where}: {count} of its numbers {'is' if count == 1 else 'are'} under a mask; keep the other rows, those "
            f"of ~np.ma.getmaskarray({name}){rows}, or put numbers there by np.ma.filled({name}, ...)"
        )


def check_row_labels(**tables: Any) -> None:
    """Refuses tables of pandas whose rows have other labels or another order: by label or by position?

    Args:
        tables: what was handed over, by argument; None, arrays and lists have no labels.

    Raises:
        InputError: naming the first row that differs.
    """
    labelled = [labels for name, table in tables.items() for labels in _row_labels(name, table)]
    if not labelled:
        return
    first, labels = labelled[0]
    for name, others in labelled[1:]:
        if len(labels) != len(others) or labels.equals(others):
            continue
        row = next((i for i, (a, b) in enumerate(zip(labels, others, strict=True)) if repr(a) != repr(b)), 0)
        raise InputError(
            f"{first} and {name}: their row labels differ, first in row {row}: {quoted(str(labels[row]))} and "
            f"{quoted(str(others[row]))}; give {name}.loc[{first}.index] if rows belong together by label, or "
            f"{name}.to_numpy() if by position"
        )


def series_name(column: Any) -> str:
    """The name of a column of a table; empty if it has none."""
    named = _is_pandas(column) or hasattr(column, "__arrow_c_stream__")
    name = getattr(column, "name", None) if named else None
    return "" if name is None else str(name)


def _is_pandas(table: Any) -> bool:
    return hasattr(table, "iloc") and hasattr(table, "index")


def _is_float(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind == "f"


def _row_labels(where: str, table: Any) -> list[tuple[str, Any]]:
    """Row labels of a table or column of pandas, or of the columns in a dict, and where they are from."""
    parts = {f"{where}[{key!r}]": part for key, part in table.items()} if isinstance(table, Mapping) else {where: table}
    return [(name, part.index) for name, part in parts.items() if _is_pandas(part) and hasattr(part.index, "equals")]


def _arrow_table(table: Any) -> Any:
    """A table that Arrow can take over, as Arrow's; None for anything else, a single column included."""
    if not (hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__")):
        return None
    import pyarrow as pa

    try:
        return pa.table(table)
    except (pa.ArrowInvalid, TypeError, ValueError):
        return None


def _pandas_values(column: Any, where: str, otherwise: str) -> np.ndarray:
    """Values of a column of pandas; of types of its own (Int64, boolean, Arrow's) those that are numbers."""
    if isinstance(column.dtype, np.dtype):
        return np.asarray(column)
    kind = getattr(column.dtype, "kind", "O")
    if kind not in _PLAIN:
        raise InputError(_not_numbers(where, str(column.dtype)) + otherwise)
    missing = column.isna()
    if missing.any() and not hasattr(column.dtype, "subtype"):  # A sparse column's NaN is a number like others.
        raise InputError(_missing(where, int(missing.sum()), "dropna", "fillna"))
    return np.asarray(column, _PLAIN[kind])


def _arrow_values(column: Any, where: str, otherwise: str) -> np.ndarray:
    """Values of a column of Arrow or polars."""
    import pyarrow as pa

    if hasattr(column, "__arrow_c_stream__"):
        column = pa.chunked_array(column)
    kind = column.type
    known = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not known and not pa.types.is_decimal(kind):
        raise InputError(_not_numbers(where, str(kind)) + otherwise)
    if column.null_count:
        raise InputError(_missing(where, column.null_count, "drop_nulls or drop_null", "fill_null"))
    if not known:  # The nearest float64; Arrow's own way there rounds more than once.
        return np.array([float(value) for value in column.to_pylist()], np.float64)
    return np.asarray(column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy())


def _exact(array: np.ndarray, where: str, otherwise: str = "") -> np.ndarray:
    """`array` as float32 or float64 of this machine's byte order.

    Raises:
        InputError: if that would be other numbers, or it holds none.
    """
    kind, dtype = array.dtype.kind, array.dtype
    if kind in "iub":
        if kind != "b" and array.size and max(int(array.max()), -int(array.min())) > _EXACT:
            _check_integers(array, where)
        return array.astype(np.float64)
    if kind != "f":
        raise InputError(_not_numbers(where, str(dtype), array) + otherwise)
    if dtype.itemsize > 8:
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float64)
        if not ((narrow == array) | np.isnan(array)).all():
            raise InputError(
                f"{where}: holds {dtype} numbers that float64 has not; round them by np.asarray(..., float)"
            )
        return narrow
    return array.astype(np.float32 if dtype.itemsize < 8 else np.float64, copy=False)


def _check_integers(array: np.ndarray, where: str) -> None:
    """Refuses integers of more than 53 significant bits."""
    bits = array.astype(np.uint64)
    sizes = np.where(array < 0, ~bits + np.uint64(1), bits)
    lowest = np.maximum(sizes & (~sizes + np.uint64(1)), np.uint64(1))
    inexact = array[sizes // lowest > _EXACT]
    if inexact.size:
        raise InputError(
            f"{where}: holds the integer {inexact.flat[0]}, which float64 has not; subtract one number from all, or "
            "round them by np.asarray(..., float)"
        )


def _not_numbers(where: str, held: str, array: np.ndarray | None = None) -> str:
    """What to say of a column that does not hold numbers."""
    kind = held if array is None else array.dtype.kind
    if kind == "M" or held.startswith(("datetime", "timestamp")):
        fix = "make numbers of it, as (t - t.min()) / np.timedelta64(1, 's')"
    elif kind == "m" or held.startswith(("timedelta", "duration")):
        fix = "make numbers of it, as t / np.timedelta64(1, 's')"
    elif kind == "c":
        fix = "take its parts, .real and .imag"
    else:
        fix = "convert it by np.asarray(..., float)"
    if array is not None and array.size and kind in "OUS":
        held += f", such as {quoted(str(array.flat[0]))}"
    return f"{where}: holds {held}; must be integers, float32 or float64; {fix}"


def _missing(where: str, count: int, drop: str, fill: str) -> str:
    values = "1 missing value" if count == 1 else f"{count} missing values"
    return f"{where}: holds {values}; leave out such rows ({drop}) or put numbers there ({fill})"
