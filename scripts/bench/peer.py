"""One peer in a process of its own, so that frameworks share neither memory nor threads.

    PYTHON peer.py MODULE [WORD ...]

The process answers requests, one JSON object a line: `{"prepare": task, "as": name}` makes the data and warms up,
`{"measure": calls, "as": name}` does the work that often, `{"drop": name}` forgets it. Answers go to the original
stdout; what a framework prints goes to stderr. A framework that is not installed answers `{"missing": reason}`.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RATE = 0.001
SLOPE, BIAS = 9.0, -2.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What one measurement does.

    Attributes:
        run: does it once and waits until it is done; returns facts about the outcome, such as the first weight.
        scale: what one call's seconds are multiplied by, where a slow peer does only a part.
        note: how it was set, in words.
    """

    run: Callable[[], dict[str, Any]]
    scale: float = 1.0
    note: str = ""


def make_rows(n: int, d: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """`x` `[n, d]` (`[n]` for one feature) and `y` `[n]` of the tutorial's line, standard normal `x` and noise."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((n, d), dtype=dtype)
    y = generator.standard_normal(n, dtype=dtype)
    y += SLOPE * x.sum(1) + BIAS
    return (x[:, 0] if d == 1 else x), y


def starts(n: int, batch: int, steps: int) -> np.ndarray:
    """First rows of `steps` batches that go round the whole batches of `n` rows."""
    return (np.arange(steps) % (n // batch) * batch).astype(np.int32)


def _prepare(make: Callable[[dict[str, Any]], Work], task: dict[str, Any]) -> tuple[Work | None, dict[str, Any]]:
    begin = time.perf_counter()
    try:
        work = make(task)
        made = time.perf_counter()
        outcome = {} if task.get("cold") else work.run()
        warm = time.perf_counter()
        second = 0.0
        if not task.get("cold"):
            outcome = work.run()
            second = time.perf_counter() - warm
    except Exception as error:  # The others go on without it, and the table says why.
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None, {"failed": line}
    facts = {"make_seconds": made - begin, "first_call_seconds": warm - made, "second_call_seconds": second}
    return work, facts | {"scale": work.scale, "note": work.note, "outcome": outcome}


def _measure(work: Work, calls: int) -> dict[str, Any]:
    seconds, outcome = [], {}
    for _ in range(calls):
        begin = time.perf_counter()
        outcome = work.run()
        seconds.append((time.perf_counter() - begin) * work.scale)
    return {"seconds": seconds, "outcome": outcome}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        make = importlib.import_module(sys.argv[1]).make
    except ImportError as error:
        answers.write(json.dumps({"missing": str(error)}) + "\n")
        return
    version = sys.modules[make.__module__].VERSION
    answers.write(json.dumps({"version": version}) + "\n")
    works: dict[str, Work] = {}
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        if "prepare" in request:
            work, answer = _prepare(make, request["prepare"])
            if work:
                works[request["as"]] = work
        elif "measure" in request:
            answer = _measure(works[request["as"]], request["measure"])
        else:
            works.pop(request["drop"], None)
            gc.collect()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
