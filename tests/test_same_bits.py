"""The promise in short: one digest and one loss series on any topology. The long form is `pytest -m slow`."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from conftest import Finished

_SCRIPT = """
import json, sys
import tapedist
settings = dict(n_samples=10007, num_features=3, optimizer="momentum", batch_size=96, log_every_epochs=1)
settings["num_virtual_devices"] = int(sys.argv[1])
found = {}
for name, more in {
    "stream": dict(full_batch_engine="stream", num_epochs=60),
    "moments": dict(full_batch_engine="moments", num_epochs=60),
    "mini_batch": dict(mode="mini_batch", num_epochs=2),
}.items():
    result = tapedist.train(tapedist.TrainConfig(**settings, **more))
    found[name] = [result.digest, [(row.step, row.split, row.loss.hex()) for row in result.history]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def known() -> dict[str, object]:
    return {}


@pytest.mark.parametrize("devices", [0, 2, 5])
def test_one_digest(devices: int, run_python: Callable[..., Finished], known: dict[str, object]) -> None:
    finished = run_python("-c", _SCRIPT, str(devices))
    assert finished.code == 0, finished.err
    found = json.loads(finished.out.splitlines()[-1])
    assert len(found) == 3
    for name, outcome in found.items():
        assert len(outcome[1]) > 2
        assert known.setdefault(name, outcome) == outcome, f"{name} differs on {devices} logical CPUs"
