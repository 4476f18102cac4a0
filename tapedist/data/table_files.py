"""Which files a table is: a path, a folder or a glob, resolved to regular files in one fixed order."""

from __future__ import annotations

import dataclasses
import glob
import os
import stat

from tapedist.errors import InputError, StateError

FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".npy": "npy", ".npz": "npz"}
_KNOWN = "CSV (.csv), TSV (.tsv), Parquet (.parquet, .pq), .npy and .npz"


def shown(text: str) -> str:
    """`text` for a message: as it is if it can be printed, else with its control characters escaped."""
    return text if text.isprintable() else repr(text)


@dataclasses.dataclass(frozen=True)
class TableFile:
    """One file and what it looked like when the table was opened.

    Attributes:
        path: as found from the user's path.
        size: bytes.
        mtime_ns: time of the last change.
        inode: device and inode, which tell a replaced file from an edited one.
    """

    path: str
    size: int
    mtime_ns: int
    inode: tuple[int, int]

    @classmethod
    def of(cls, path: str) -> TableFile:
        """The regular, readable, non-empty file at `path`.

        Raises:
            InputError: if there is none. The file is not opened before it is known to be regular, because opening a
                FIFO would wait for ever.
        """
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise InputError(f"--data={shown(path)}: {why.lower()}; give the path of a table") from None
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"--data={shown(path)}: not a regular file; copy the table into one")
        if not status.st_size:
            raise InputError(f"--data={shown(path)}: the file is empty; a table needs a header and rows")
        if not os.access(path, os.R_OK):
            raise InputError(f"--data={shown(path)}: permission denied; make the file readable")
        return cls(path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))

    @property
    def name(self) -> str:
        """The path as messages show it."""
        return shown(self.path)

    def check_unchanged(self) -> None:
        """Compares the file with what was opened.

        Raises:
            StateError: if it was changed, replaced or removed.
        """
        try:
            status = os.stat(self.path)
            now = TableFile(self.path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))
        except OSError as error:
            raise StateError(f"{self.name}: {error.strerror} while in use; restore the file and resume") from None
        if now != self:
            raise StateError(f"{self.name}: changed while in use; restore the file and resume, or start a new run")


def find_files(data: str) -> tuple[str, tuple[TableFile, ...]]:
    """The format and the files that `data` names.

    Args:
        data: path of a file, of a folder (read with its subfolders; names that start with `.` or `_` and files that
            are no tables are passed over), or a glob pattern.

    Returns:
        A value of `FORMATS`, and the files, sorted by path: the order of the table's rows.

    Raises:
        InputError: if nothing is there, if it is not readable as a table, or if formats are mixed.
    """
    if "\0" in data:
        raise InputError(f"--data={data!r}: a path cannot hold NUL; give the path of a table")
    if os.path.isdir(data):
        paths = _folder(data)
    elif not os.path.lexists(data) and glob.has_magic(data):
        paths = sorted(path for path in glob.glob(data, recursive=True) if not os.path.isdir(path))
        if not paths:
            raise InputError(f"--data={shown(data)}: no file matches this pattern; check the path")
    else:
        paths = [data]
    files = tuple(map(TableFile.of, paths))
    formats = {FORMATS.get(os.path.splitext(path)[1].lower(), "") for path in paths}
    if "" in formats:
        odd = next(path for path in paths if os.path.splitext(path)[1].lower() not in FORMATS)
        raise InputError(f"--data={shown(odd)}: unknown kind of table; known are {_KNOWN}")
    if len(formats) > 1:
        raise InputError(f"--data={shown(data)}: mixes {' and '.join(sorted(formats))} files; keep one format")
    return formats.pop(), files


def _folder(data: str) -> list[str]:
    paths = []
    for folder, folders, names in os.walk(data):
        folders[:] = [name for name in folders if name[0] not in "._"]
        paths += [
            os.path.join(folder, name)
            for name in names
            if name[0] not in "._" and os.path.splitext(name)[1].lower() in FORMATS
        ]
    if not paths:
        raise InputError(f"--data={shown(data)}: the folder holds no table; known are {_KNOWN}")
    return sorted(paths)
