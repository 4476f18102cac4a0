"""The README's claims that a machine can check: its Python runs, its commands parse, its links and files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tapedist import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("code", PYTHON, ids=[str(number) for number in range(len(PYTHON))])
def test_python_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    digest = capsys.readouterr().out.split()[-1]
    assert re.fullmatch("[0-9a-f]{64}", digest)


def _arguments(line: str) -> list[str] | None:
    """The words after `tapedist` or `scripts/train.sh` (which adds `train`), if the line is such a command."""
    words = shlex.split(line)
    for place, word in enumerate(words):
        if word.endswith("scripts/train.sh"):
            return ["train", *words[place + 1 :]]
        if word.endswith("tapedist"):
            return words[place + 1 :]
    return None


COMMANDS = [line for line in SHELL if _arguments(line)]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    called: list[Any] = []
    commands = {name: cli.dataclasses.replace(command, run=called.append) for name, command in cli.COMMANDS.items()}
    assert cli.main(_arguments(line), commands=commands) == 0
    assert called or "--help" in line


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 1


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"\b((?:scripts|configs|tests)/[\w./-]*\w)", README))
    named |= set(re.findall(r"\]\(([^)#]+)\)", README))
    missing = [name for name in named if "://" not in name and not (ROOT / name).exists()]
    assert not missing


def test_no_marker_is_left() -> None:
    assert "@@" not in README
