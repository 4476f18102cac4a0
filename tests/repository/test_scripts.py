"""scripts/train.sh and scripts/test.sh on a machine without an environment; Python is a stand-in that keeps a diary."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPO

# It claims to be Python 3.11, "makes" an environment that holds a copy of itself, and writes down the rest.
_STAND_IN = """#!/usr/bin/env bash
case "$*" in
  --version) echo "Python 3.11.0" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") [[ $0 == */bin/python ]] ;;
  "-m pip install"*) echo "pip in $PWD: $*" >>"$DIARY"; exit "${PIP_EXIT:-0}" ;;
  "-c "*) exit 0 ;;
  *) echo "run in $PWD: $*" >>"$DIARY"; exit 7 ;;
esac
"""

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without .venv, in a folder with a space in its name."""
    checkout = tmp_path / "check out"
    shutil.copytree(REPO / "scripts", checkout / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, checkout)
    return checkout


@pytest.fixture
def script(checkout: Path, tmp_path: Path) -> Script:
    """Runs a script of the checkout from elsewhere; the stand-in is the only Python there is."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "basename", "dirname", "mkdir", "cat", "cksum", "cp", "flock"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    stand_in = tools / "python3.11"
    stand_in.write_text(_STAND_IN)
    stand_in.chmod(0o755)

    def run(name: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "diary").write_text("")
        return subprocess.run(
            [checkout / "scripts" / name, *words],
            env={"PATH": str(tools), "DIARY": str(tmp_path / "diary"), **env},
            cwd=tools,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def _diary(tmp_path: Path) -> list[str]:
    return (tmp_path / "diary").read_text().splitlines()


def test_train_installs_once_and_trains(script: Script, checkout: Path, tmp_path: Path):
    tools, constraints = tmp_path / "tools", checkout / "constraints.txt"
    install = (
        f"pip in {tools}: -m pip install --quiet --disable-pip-version-check --constraint {constraints} "
        f"--editable {checkout}"
    )
    train = f"run in {tools}: -m tapedist train --flagfile=a b.flags --seed=3"
    words = ("--flagfile=a b.flags", "--seed=3")
    assert script("train.sh", *words).returncode == 7  # tapedist's own exit code.
    assert _diary(tmp_path) == [install, train]
    assert script("train.sh", *words).returncode == 7
    assert _diary(tmp_path) == [train]
    with constraints.open("a") as file:
        file.write("# Changed.\n")
    script("train.sh", *words)
    assert _diary(tmp_path) == [install, train]
    script("train.sh", *words, TAPEDIST_EXTRAS="gpu,tensorboard")
    assert _diary(tmp_path) == [f"{install}[gpu,tensorboard]", train]


def test_test_installs_dev_which_train_can_use(script: Script, checkout: Path, tmp_path: Path):
    assert script("test.sh", "-k", "a or b").returncode == 7
    pip, tests = _diary(tmp_path)
    assert pip.endswith(f"--editable {checkout}[dev]")
    assert tests.startswith(f"run in {checkout}: -m pytest --numprocesses=")
    assert tests.endswith(" -k a or b")
    script("train.sh")
    assert _diary(tmp_path) == [f"run in {tmp_path / 'tools'}: -m tapedist train"]


def test_a_failed_install_is_said_and_tried_again(script: Script, tmp_path: Path):
    failed = script("train.sh", PIP_EXIT="1")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("train.sh: error: pip could not install tapedist;")
    assert len(_diary(tmp_path)) == 1
    assert script("train.sh").returncode == 7
    assert len(_diary(tmp_path)) == 2


def test_without_python(script: Script, tmp_path: Path):
    (tmp_path / "tools" / "python3.11").unlink()
    finished = script("train.sh")
    assert finished.returncode == 2
    assert finished.stderr == (
        "train.sh: error: needs Python 3.11, 3.12 or 3.13 with its venv module; no python was found\n"
    )


@pytest.mark.parametrize(
    ("refused", "reason"),
    [("version_info", "python3 is Python 3.10.1"), ("ensurepip", "python3 lacks its venv module")],
)
def test_with_an_unfit_python(refused: str, reason: str, script: Script, tmp_path: Path):
    (tmp_path / "tools" / "python3.11").unlink()
    unfit = tmp_path / "tools" / "python3"
    unfit.write_text(f'#!/usr/bin/env bash\n[[ $1 != --version ]] || echo "Python 3.10.1"\n[[ $* != *{refused}* ]]\n')
    unfit.chmod(0o755)
    finished = script("train.sh")
    assert finished.returncode == 2
    assert reason in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_scripts_can_be_executed():
    for path in [*(REPO / "scripts").glob("*.sh"), REPO / ".ci" / "run"]:
        assert os.access(path, os.X_OK) != path.name.startswith("_"), path
