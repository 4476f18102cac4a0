"""The house keeps its order: imports go one way, and each thing that must have one home has one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "tapedist"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Rooms from the ground up. A module may import from its own room, and from those of the floors below.
FLOORS = (
    ("errors", "text", "reference", "runtime_flags", "version"),
    ("options", "process"),
    ("config",),
    ("flags", "command_options"),
    ("data",),
    ("regression",),
    ("training",),
    ("storage", "cluster"),
    ("results",),
    ("run",),
    ("verification",),
    ("commands", "sklearn"),
    ("cli",),
    ("",),  # The package itself, and `python -m tapedist`.
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)


def _room(module: str) -> str:
    room = module.partition(".")[0]
    assert room in FLOOR, f"tapedist/{room} has no floor: add it to FLOORS"
    return room


def _imports(path: Path) -> Iterator[str]:
    """Modules of the package that `path` imports, at any depth, relative to the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            while package == "tapedist" and inner:
                target = PACKAGE.joinpath(*inner.split("."))
                if target.with_suffix(".py").exists() or target.is_dir():
                    yield inner
                    break
                inner = inner.rpartition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_one_way(path: Path):
    own = _room(_name(path))
    for imported in _imports(path):
        room = _room(imported)
        assert room == own or FLOOR[room] < FLOOR[own], f"{_name(path)} imports {imported}"


def _uses(path: Path, attribute: str, owner: str = "") -> bool:
    """Whether `path` says `X.attribute`, where X's source ends with `owner`."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == attribute and ast.unparse(node.value).endswith(owner)
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_the_tape_is_in_the_sums_and_strategy_run_in_one_place():
    # The probe is a program of its own, with which the doctor looks at a machine.
    probe = {"cluster.probe"}
    sums = {f"training.{kind}_sums" for kind in ("row", "linear", "tape")}
    assert {_name(path) for path in MODULES if _uses(path, "GradientTape")} <= sums | probe
    assert {_name(path) for path in MODULES if _uses(path, "run", "strategy")} <= {"training.replicas", *probe}


def test_only_flags_touches_absl_flags():
    users = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            full = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            users |= {_name(path) for name in full if name.startswith(("absl.flags", "absl.app"))}
    assert users == {"flags"}


def test_no_drawer_for_everything():
    assert not [path for path in MODULES if path.stem in ("util", "utils", "helpers", "misc", "common")]
