"""Whether a path may be the folder of a run: it is ours, or it is new. Only looks; `run_folder.py` makes and fills it.

A folder is ours when it holds the marker `.tapedist`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from tapedist.errors import InputError, StateError
from tapedist.storage.files import OWN_PREFIX

SCHEMA = 1
_FORMAT = "tapedist run folder"
MARKER = OWN_PREFIX
LOCK = f"{OWN_PREFIX}.lock"


def marker_text() -> str:
    """What the marker of a folder of ours holds."""
    return json.dumps({"format": _FORMAT, "schema": SCHEMA}) + "\n"


def read_marker(folder: str | Path) -> int | None:
    """The schema that a folder's marker names; None if it is missing or not ours."""
    try:
        fd = os.open(os.path.join(folder, MARKER), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        try:
            marker = json.loads(file.read(4096))
            known = marker["format"] == _FORMAT and type(marker["schema"]) is int
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return int(marker["schema"]) if known else None


def check(path: str | Path, *, write: bool, members: Iterable[str]) -> None:
    """Refuses a path that may not be the folder of a run.

    A link is followed only to a folder beside it (`latest -> 2026-11-23`): one that leads elsewhere may have been
    placed there by somebody else.

    Args:
        path: the folder, which may be missing.
        write: whether it must be writable.
        members: names of what a run keeps in it.

    Raises:
        InputError: if it may not; `problems` says why.
        StateError: if a later version of tapedist made it.
    """
    text = os.fspath(path)
    problem = _wrong_name(text)
    try:
        problem = problem or _wrong_link(text) or _wrong_place(text, write) or _wrong_content(text, write, members)
    except OSError as error:
        problem = f"cannot be looked at ({error.strerror}); use another path"
    if problem:
        raise InputError(f"--run_dir={text!r}: {problem}")


def _wrong_name(text: str) -> str | None:
    if not text:
        return "must name a folder"
    if not text.isprintable():
        return "must not hold control characters; rename the path"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return "must be a local path, because saving needs rename and fsync; train into a local folder and copy it out"
    return None


def _wrong_link(text: str) -> str | None:
    link = text.rstrip("/") or text
    if not os.path.islink(link):
        return None
    target = os.path.realpath(link)
    if not os.path.isdir(target):
        return f"is a link to {target!r}, which is no folder; remove the link"
    if os.path.dirname(target) != os.path.realpath(os.path.dirname(os.path.abspath(link))):
        return f"is a link that leads outside its folder, to {target!r}; give that path itself"
    return None


def _wrong_place(text: str, write: bool) -> str | None:
    """Judges the folder, or of a missing one the nearest parent that exists."""
    place = os.path.realpath(text)
    while True:
        try:
            mode = os.stat(place).st_mode
            break
        except (FileNotFoundError, NotADirectoryError):
            place = os.path.dirname(place)
    shown = "" if place == os.path.realpath(text) else f"its parent {place!r} "
    if not stat.S_ISDIR(mode):
        return f"{shown}is a file; give a folder"
    if write and not os.access(place, os.W_OK | os.X_OK):
        return f"{shown}is not writable; use another folder or change its permissions"
    return None


def _wrong_content(text: str, write: bool, members: Iterable[str]) -> str | None:
    try:
        names = os.listdir(text)
    except FileNotFoundError:
        return None
    # Listed before the marker is read: whatever a run beside us writes, it writes the marker first.
    foreign = sorted(name for name in names if not name.startswith(OWN_PREFIX))
    marker = read_marker(text)
    if marker is None and foreign:
        fix = "give a new or an empty folder" if write else "give the --run_dir of a training run"
        return f"is not empty and not a run folder (it holds {foreign[0]!r}); {fix}"
    if marker is not None and marker > SCHEMA:
        raise StateError(
            f"--run_dir={text!r}: was made by a later version (schema {marker}, this one knows up to {SCHEMA}); "
            "continue with that version"
        )
    for name in (MARKER, LOCK, *members):
        if os.path.islink(os.path.join(text, name)):
            return f"holds a link in the place of {name}; remove it"
    return None
