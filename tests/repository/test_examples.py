"""The programs in examples/, each run as its first line says, by what it prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, Finished

EXAMPLES = REPO / "examples"
DIGEST = "[0-9a-f]{64}"


@pytest.fixture
def example(run_python: Callable[..., Finished]) -> Callable[[str], str]:
    """Runs an example in an empty folder; returns what it prints."""

    def run(name: str) -> str:
        finished = run_python(str(EXAMPLES / f"{name}.py"))
        assert finished.code == 0, finished.err
        return finished.out

    return run


def _numbers(line: str, text: str) -> list[float]:
    """The numbers of the line of `text` that begins with `line`."""
    found = re.search(rf"^{re.escape(line)}: (.*)$", text, re.MULTILINE)
    assert found, text
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", found[1])]


def test_they_say_how_they_are_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"arrays", "custom_module", "own_table", "several_devices"}
    for name in names:
        summary = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
        assert f"`python examples/{name}.py`" in str(summary)


def test_arrays(example: Callable[[str], str]):
    out = example("arrays")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100_000, 3))
    y = x @ [1.0, -2.0, 3.0] + 0.5 + rng.standard_normal(100_000)
    *weights, bias = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))])[:80_000], y[:80_000], rcond=None)[0]
    # 0.01 standard errors of these 80,000 rows are 0.00004; four decimals are printed.
    assert _numbers("weights", out) == pytest.approx(weights, abs=1e-4)
    assert _numbers("bias", out) == pytest.approx([bias], abs=1e-4)
    residuals = (y - x @ weights - bias)[80_000:]
    assert _numbers("test loss", out) == pytest.approx([np.mean(residuals**2)], abs=1e-4)
    assert _numbers("predictions", out) == pytest.approx([weights[0] + bias, weights[1] + bias], abs=2e-4)
    assert re.search(f"^digest: {DIGEST}$", out, re.MULTILINE)


def test_custom_module(example: Callable[[str], str]):
    out = example("custom_module")
    (test_loss,) = _numbers("test loss", out)
    assert 0 < test_loss < 0.002
    pairs = re.findall(r"^predicted (\S+), should be (\S+)$", out, re.MULTILINE)
    assert len(pairs) == 3
    for predicted, wanted in pairs:
        assert float(predicted) == pytest.approx(float(wanted), abs=0.1)
    assert re.search(f"^digest: {DIGEST}$", out, re.MULTILINE)


def test_own_table(example: Callable[[str], str], tmp_path: Path):
    out = example("own_table")
    area, age = _numbers("coefficients", out)
    assert area == pytest.approx(2000, abs=25)  # Six standard errors of 2,000 rows.
    assert age == pytest.approx(-300, abs=50)
    evaluated = re.search(r"^data: 200 rows, .* RMSE (\S+), .* R2 (\S+)$", out, re.MULTILINE)
    assert evaluated, out
    assert float(evaluated[1]) == pytest.approx(10_000, rel=0.2)
    assert float(evaluated[2]) > 0.98
    inside = re.search(r"^(\d+) of 200 prices lie in their 95 % interval$", out, re.MULTILINE)
    assert inside, out
    assert 180 <= int(inside[1]) <= 198
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_several_devices(example: Callable[[str], str]):
    out = example("several_devices")
    digests = dict(re.findall(f"^(\\d) devices?: +({DIGEST})$", out, re.MULTILINE))
    assert set(digests) == {"1", "4"}
    assert digests["1"] == digests["4"]
    assert out.splitlines()[-1] == "the same bits"
