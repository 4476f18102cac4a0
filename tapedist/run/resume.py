"""Which settings of a stored run may differ from the ones asked for now: those that cannot change the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ABSENT = object()
_MAX_SHOWN = 60


def answer_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compares the settings that decide the answer; empty if a stored run may be continued under `current`.

    Args:
        stored: by name, as JSON gave them back.
        current: by name, of any types that JSON holds (a tuple equals its list).

    Returns:
        One `name: stored value, asked value` for each difference, in the order of `current`, then of `stored`. Of the
        rows, whose value is a hash, only that they differ.
    """
    names = [*current, *(name for name in stored if name not in current)]
    pairs = ((name, _shown(stored.get(name, _ABSENT)), _shown(current.get(name, _ABSENT))) for name in names)
    return [
        "the rows are not the same" if name == "rows" else f"{name}: stored {_short(old)}, asked {_short(new)}"
        for name, old, new in pairs
        if old != new
    ]


def _shown(value: Any) -> str:
    # Compared as text: 1 and 1.0 and true are equal in Python, and give different answers.
    return "nothing" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 2 :]}"
