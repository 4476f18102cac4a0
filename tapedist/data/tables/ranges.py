"""Ranges of a table's splits, from the one scan at opening.

While a table is scanned it is known which rows test by their hash, but not which are the last ones: where those test,
each chunk's extremes are kept, and the one chunk that lies on both sides is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tapedist.data.tables.split import HashSplit, RowSplit

# Least and greatest value of each column, float64 `[columns]` each.
Extremes = tuple[np.ndarray, np.ndarray]


class ScannedExtremes:
    """Extremes of the kept rows of positive weight.

    Args:
        num_columns: features, then the target and the weight if there are any.
        weighted: whether the last column is a weight.
        by_hash: which rows test; None where the last ones do.
        test_fraction: of the rows.
    """

    def __init__(self, num_columns: int, *, weighted: bool, by_hash: HashSplit | None, test_fraction: float):
        self._weighted, self._by_hash = weighted, by_hash
        self._per_chunk = by_hash is None and test_fraction > 0
        splits = 2 if by_hash else 1
        self._low, self._high = np.full((splits, num_columns), np.inf), np.full((splits, num_columns), -np.inf)
        self._chunks: list[Extremes] = []

    def add(self, columns: Sequence[np.ndarray], number: int, ends: np.ndarray, dropped: np.ndarray | None) -> None:
        """Takes in a chunk.

        Args:
            columns: its cells.
            number: of the chunk.
            ends: minimum and maximum of each column, `[columns, 2]`, or beyond them.
            dropped: the rows that are not used, boolean, or None.
        """
        if self._per_chunk:
            found = (ends[:, 0], ends[:, 1])
            counts = self._counts(columns, dropped)
            self._chunks.append(found if counts is None else _extremes(columns, counts))
            return
        # Few chunks hold a new extreme; only those are looked at row by row.
        new = (ends[:, 0] < self._low.max(axis=0)) | (ends[:, 1] > self._high.min(axis=0))
        if not new.any():
            return
        counts = self._counts(columns, dropped)
        tests = self._by_hash.tests(number, len(columns[0])) if self._by_hash else None
        chosen = [columns[position] for position in np.flatnonzero(new).tolist()]
        for split in range(len(self._low)):
            of_split = None if tests is None else tests == bool(split)
            picked = of_split if counts is None else counts if of_split is None else counts & of_split
            low, high = _extremes(chosen, picked)
            self._low[split, new] = np.minimum(self._low[split, new], low)
            self._high[split, new] = np.maximum(self._high[split, new], high)

    def of(self, split: str, rows: RowSplit, read: Callable[[str, range], Sequence[np.ndarray]]) -> Extremes:
        """Extremes of a split.

        Args:
            split: "train" or "test".
            rows: which rows are whose.
            read: `(split, rows) -> columns`, for the chunk that holds rows of both splits.
        """
        if not self._per_chunk:
            place = ("train", "test").index(split)
            return self._low[place], self._high[place]
        trains, ends = rows.count("train"), rows.kept_ends
        lies_on_both = np.flatnonzero((ends[:-1] < trains) & (ends[1:] > trains))
        whole = ends[1:] <= trains if split == "train" else ends[:-1] >= trains
        found = [self._chunks[chunk] for chunk in np.flatnonzero(whole)]
        for chunk in lies_on_both.tolist():
            part = range(ends[chunk], trains) if split == "train" else range(ends[chunk + 1] - trains)
            columns = read(split, part)
            counts = self._counts(columns, None)
            found.append(_extremes(columns, counts))
        if not found:
            return self._low[0], self._high[0]
        lows, highs = zip(*found, strict=True)
        return np.min(lows, axis=0), np.max(highs, axis=0)

    @property
    def least_weight(self) -> float:
        """The least positive weight."""
        return float(min([low[-1] for low, _ in self._chunks], default=self._low[:, -1].min()))

    def _counts(self, columns: Sequence[np.ndarray], dropped: np.ndarray | None) -> np.ndarray | None:
        """Which rows count, or None if all do."""
        if self._weighted and not (columns[-1] > 0).all():
            return columns[-1] > 0 if dropped is None else (columns[-1] > 0) & ~dropped
        return None if dropped is None else ~dropped


def _extremes(columns: Sequence[np.ndarray], picked: np.ndarray | None) -> Extremes:
    """Infinite where no row is picked."""
    values = columns if picked is None else [column[picked] for column in columns]
    # `fmin` passes over cells that await their column's mean.
    low = [np.fmin.reduce(column, initial=np.inf) for column in values]
    return np.array(low), np.array([np.fmax.reduce(column, initial=-np.inf) for column in values])
