"""Files of a run folder that are written whole: either the old one or the new one is there, never a part."""

from __future__ import annotations

import os
from pathlib import Path

from tapedist.errors import StorageError
from tapedist.results.words import printable


def storage_error(path: Path, error: Exception) -> StorageError:
    """The one-line error for a file that the system would not write."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
    return StorageError(
        f"{printable(str(path))}: cannot be written ({reason}); free space or fix the permission, then try again"
    )


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it.

    Raises:
        StorageError: if the folder cannot be written; an older file stays as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise storage_error(path, error) from error
