"""A file of a table, and whether it is still what it was when the table was opened."""

from __future__ import annotations

import dataclasses
import os
import stat

from tapedist.errors import InputError, StateError


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
