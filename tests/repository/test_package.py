"""What pyproject.toml, constraints.txt, CITATION.cff and the CI's workflow say is true of the package."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib import metadata

import pytest
from conftest import REPO
from packaging.specifiers import SpecifierSet

import tapedist
from tapedist import cli

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PINS = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines())
# Distributions whose modules have another name.
_MODULES = {"absl-py": "absl", "tensorflow-datasets": "tensorflow_datasets"}


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match[0]


def test_the_command_exists():
    assert PROJECT["scripts"] == {"tapedist": "tapedist.cli:entry_point"}
    assert callable(cli.entry_point)
    assert re.fullmatch(r"\d+\.\d+\.\d+", tapedist.__version__)
    assert (REPO / "tapedist" / "py.typed").exists()


def test_constraints_are_names_and_versions_of_what_is_installed():
    for name, version in PINS.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert re.fullmatch(r"[0-9][A-Za-z0-9.!+]*", version)
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for name in map(_name, required):
        assert PINS[name] == metadata.version(name), name


@pytest.mark.parametrize("name", [_name(requirement) for requirement in PROJECT["dependencies"]])
def test_each_dependency_is_imported(name: str):
    imported = set()
    for path in (REPO / "tapedist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    assert _MODULES.get(name, name) in imported


def test_the_citation_is_of_this_version():
    fields = dict(re.findall(r"^([a-z-]+): (.+)$", (REPO / "CITATION.cff").read_text(), re.MULTILINE))
    assert (fields["title"], fields["version"]) == (PROJECT["name"], tapedist.__version__)
    assert fields["license"] == PROJECT["license"]


def test_ci_runs_on_supported_versions_of_python():
    workflow = (REPO / ".github" / "workflows" / "ci.yml").read_text()
    (listed,) = re.findall(r"^ *python-version: \[(.+)\]$", workflow, re.MULTILINE)
    versions, supported = re.findall(r'"(3\.\d+)"', listed), SpecifierSet(PROJECT["requires-python"])
    assert len(versions) >= 2
    assert all(supported.contains(version) for version in versions)
    assert "run: .ci/run\n" in workflow


def test_pre_commit_runs_the_checks_of_the_script():
    script = (REPO / "scripts" / "check.sh").read_text()
    checks = re.findall(r'^"\$venv/bin/python" -m ([a-z]+(?: [a-z]+)?)', script, re.MULTILINE)
    entries = re.findall(
        r"^ +entry: \.venv/bin/python -m (.+)$", (REPO / ".pre-commit-config.yaml").read_text(), re.MULTILINE
    )
    assert len(checks) == 3
    assert [entry.removesuffix(" --check") for entry in entries] == checks


def test_what_the_sdist_includes_is_there():
    for name in PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (REPO / name.removeprefix("/")).exists(), name
