"""A file of a table: what it is, by its name and first bytes, and whether it has changed since it was opened."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import stat

from tapedist.errors import InputError, StateError

FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".npy": "npy", ".npz": "npz"}
KNOWN = "CSV (.csv), TSV (.tsv), Parquet (.parquet, .pq), .npy and .npz"

# Suffix -> the command that unpacks a file of that name and leaves nothing packed beside it.
_UNPACK = {
    ".gz": "gzip -d {}",
    ".bz2": "bzip2 -d {}",
    ".xz": "xz -d {}",
    ".lzma": "xz -d {}",
    ".zst": "zstd -d --rm {}",
    ".lz4": "lz4 -d --rm {0} {2}",
    ".zip": "unzip {0} -d {1} && rm {0}",
    ".tar": "tar -xf {0} -C {1} && rm {0}",
    ".tgz": "tar -xf {0} -C {1} && rm {0}",
}
_PACKED = frozenset(
    {*_UNPACK, ".7z", ".rar", ".br", ".z", ".snappy", ".sz", ".lzo", ".zstd", ".gzip", ".bz", ".tbz2", ".txz"}
)
# Other files that hold rows for certain; what is none of all these may be a note or a picture.
_UNREADABLE = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".xlsb", ".ods"), "a spreadsheet"),
    **dict.fromkeys((".h5", ".hdf5", ".hdf"), "an HDF5 file"),
    **dict.fromkeys((".feather", ".arrow", ".ipc"), "a Feather or Arrow file"),
    **dict.fromkeys((".jsonl", ".ndjson"), "lines of JSON"),
    ".orc": "an ORC file",
    ".avro": "an Avro file",
    ".tfrecord": "a TFRecord file",
    ".dta": "a Stata file",
    ".sav": "an SPSS file",
    ".sas7bdat": "a SAS file",
    ".psv": "text with bars",
    ".tab": "text with tabs",
}
# How a file begins -> what it is, and the suffix that says so.
_BEGINNINGS = (
    (re.compile(rb"\x1f\x8b"), "gzip-compressed", ".gz"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bzip2-compressed", ".bz2"),
    (re.compile(rb"\xfd7zXZ\0"), "xz-compressed", ".xz"),
    (re.compile(rb"[\x22-\x28]\xb5\x2f\xfd"), "zstd-compressed", ".zst"),
    (re.compile(rb"\x04\x22\x4d\x18"), "lz4-compressed", ".lz4"),
    (re.compile(rb"PK\x03\x04"), "a zip archive or a spreadsheet", ".zip"),
    (re.compile(rb"PAR1"), "Parquet", ".parquet"),
    (re.compile(rb"\x93NUMPY"), "a NumPy array", ".npy"),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "a spreadsheet", ".xls"),
    (re.compile(rb"ARROW1"), "a Feather or Arrow file", ".feather"),
    (re.compile(rb"\x89HDF"), "an HDF5 file", ".h5"),
    (re.compile(rb"Obj\x01"), "an Avro file", ".avro"),
    (re.compile(rb"ORC[\x00-\x1f\x80-\xff]"), "an ORC file", ".orc"),
    (re.compile(rb"SQLite format 3\0"), "an SQLite database", ".sqlite"),
)
HEAD_BYTES = 16
# What a good file of each format begins with; text may begin with anything else.
_EXPECTED = {"parquet": ".parquet", "npy": ".npy", "npz": ".zip"}
_TEXT = re.compile(rb"(\xef\xbb\xbf)?[\t\r\n\x20-\x7e\x80-\xff]+")


def display(text: str) -> str:
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
            raise InputError(f"--data={display(path)}: {why.lower()}; give the path of a table") from None
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"--data={display(path)}: not a regular file; copy the table into one")
        if not status.st_size:
            raise InputError(f"--data={display(path)}: the file is empty; a table needs a header and rows")
        if not os.access(path, os.R_OK):
            raise InputError(f"--data={display(path)}: permission denied; make the file readable")
        return cls(path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))

    @property
    def name(self) -> str:
        """The path as messages show it."""
        return display(self.path)

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


def suffix(path: str) -> str:
    """The last suffix of a name, in lower case."""
    return os.path.splitext(path)[1].lower()


def table_format(path: str) -> str:
    """The format of a table, by its name; a value of `FORMATS`, or empty."""
    return FORMATS.get(suffix(path), "")


def holds_rows(path: str) -> bool:
    """Whether a file that cannot be read holds rows for all one can tell by its name."""
    return suffix(path) in _PACKED or suffix(path) in _UNREADABLE


def name_problem(path: str) -> str:
    """Why a file cannot be read, by its name, and the fix; the file has no suffix of `FORMATS`."""
    end = suffix(path)
    if end in _PACKED:
        how = f": {_unpacking(path)}" if end in _UNPACK else ", and move the packed file away"
        return f"is compressed; unpack it{how}"
    if end in _UNREADABLE:
        return f"unknown kind of table; known are {KNOWN}; this is {_UNREADABLE[end]}, so save it as one of them"
    return f"unknown kind of table; known are {KNOWN}; rename it if it is one of them"


def content_problem(path: str, head: bytes) -> str:
    """Why a file is not what its name says, and the fix; empty if it may be.

    Args:
        path: a file with a suffix of `FORMATS`.
        head: its first `HEAD_BYTES` bytes.
    """
    kind = table_format(path)
    found, end = next(((what, end) for start, what, end in _BEGINNINGS if start.match(head)), ("", ""))
    if not found and kind == "parquet" and _TEXT.fullmatch(head):
        found, end = "text", ".csv"
    if not found or end == _EXPECTED.get(kind):
        return ""
    ends = f"holds data that is {found}, not what {suffix(path)} says"
    if end in _UNPACK:
        # What is inside may well be what the name says.
        renamed = path + end
        return f"{ends}; unpack it: {_command('mv {} {}', path, renamed)} && {_unpacking(renamed)}"
    if end in FORMATS:
        return f"{ends}; rename it: {_command('mv {} {}', path, os.path.splitext(path)[0] + end)}"
    return f"{ends}; save it as one of {KNOWN}"


def _unpacking(path: str) -> str:
    return _command(_UNPACK[suffix(path)], path, os.path.dirname(path) or ".", os.path.splitext(path)[0])


def _command(words: str, *paths: str) -> str:
    """A line for a shell; with a placeholder where the path cannot be typed."""
    return words.format(*(shlex.quote(path) if path.isprintable() else "FILE" for path in paths))
