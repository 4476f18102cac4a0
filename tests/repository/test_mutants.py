"""The tests can fail: each deliberate bug in `tests/mutants/*.toml` makes the test that it names fail.

A mutant is a file of the package, a text that occurs in it once, what to put in its place, and a test. It is applied to
a copy of the package and its tests, in which that one test is run by a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a selected test may need beside the package.
COPIED = ("tapedist", "tests", "configs", "pyproject.toml")


class Mutant(NamedTuple):
    """One deliberate bug; see the module."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    Mutant(**record)
    for path in sorted((ROOT / "tests" / "mutants").glob("*.toml"))
    for record in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
]


def copy_of_the_package(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Runs tests of the copy in `folder`, against the package of the copy, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_deliberate_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    file = copy_of_the_package(tmp_path) / mutant.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file} must hold this once, to be broken:\n{mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    result = run_tests(tmp_path, mutant.test)
    # Exit code 1 is a failed test; a selector that finds nothing, or a file that cannot be imported, is another.
    assert result.returncode == 1, f"not caught:\n{result.stdout}{result.stderr}"
    assert re.search(r"^FAILED ", result.stdout, re.MULTILINE), f"broke down instead of failing:\n{result.stdout}"


def test_the_copy_passes_when_nothing_is_broken(tmp_path: Path) -> None:
    """Otherwise a mutant could seem caught because its test cannot run in a copy."""
    result = run_tests(copy_of_the_package(tmp_path), *sorted({mutant.test for mutant in MUTANTS}))
    assert result.returncode == 0, result.stdout + result.stderr
