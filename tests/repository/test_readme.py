"""The claims of README and docs/ that a machine can check: their Python runs, and their commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

from tapedist import cli

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def _lines(block: str) -> list[str]:
    """The commands of a block of shell, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


def _named(path: Path, number: int) -> str:
    return f"{path.stem}-{number}"


PYTHON = [
    pytest.param(code, id=_named(page, number)) for page in PAGES for number, code in enumerate(_blocks(page, "python"))
]
SHELL = {page: [line for block in _blocks(page, "sh") for line in _lines(block)] for page in PAGES}


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "page.md", "exec"), {"__name__": "page"})
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


COMMANDS = dict.fromkeys(line for lines in SHELL.values() for line in lines if _arguments(line))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    called: list[Any] = []
    commands = {name: cli.dataclasses.replace(command, run=called.append) for name, command in cli.COMMANDS.items()}
    assert cli.main(_arguments(line), commands=commands) == 0
    assert called or "--help" in line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_begin_with_a_program_that_is_there(page: Path) -> None:
    """A line is `tapedist`, as installed into .venv, or a script of the repository."""
    for line in SHELL[page]:
        program = shlex.split(line)[0]
        assert program == ".venv/bin/tapedist" or (REPO / program).is_file(), line


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 10
    # Their first lines must work word for word where nothing is installed.
    assert "scripts/train.sh --flagfile=configs/tutorial.flags" in SHELL[REPO / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_marker_is_left(page: Path) -> None:
    assert "@@" not in page.read_text()
    assert "(not measured)" not in page.read_text()
