"""A stored run is continued only under settings that give its answer."""

from __future__ import annotations

from tapedist.run.saved_run import answer_differences


def test_differences_name_the_keys() -> None:
    stored = {"learning_rate": 0.001, "m": [9.0, 9.0], "seed": 0, "gone": True}
    assert answer_differences(stored, {"learning_rate": 0.001, "m": (9.0, 9.0), "seed": 0, "gone": True}) == []
    assert answer_differences(stored, {"new": None, "learning_rate": 0.01, "m": (9.0, 9.0), "seed": 0.0}) == [
        "new: stored nothing, asked null",
        "learning_rate: stored 0.001, asked 0.01",
        "seed: stored 0, asked 0.0",
        "gone: stored true, asked nothing",
    ]
    (difference,) = answer_differences({"m": [0.0] * 10_000}, {"m": [1.0] * 10_000})
    assert len(difference) < 160
