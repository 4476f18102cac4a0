"""The house keeps its order: imports go one way, and each thing that must have one home has one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tapedist"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Rooms from the ground up; a module may import from its own floor's room and from the floors below. The longest prefix
# counts.
FLOORS = {
    "errors": 0,
    "exact_arithmetic": 0,
    "own_matplotlib": 0,
    "without_keras": 0,
    "numerics": 0.1,
    "text_values": 0,
    "options": 0.4,
    "settings": 0.8,
    "config": 1,
    "filesystem": 1,
    "process": 1,
    "reference": 0,
    "quiet": 1,
    "signals": 1,
    "flags": 2,
    "command_options": 2,
    "help_text": 2,
    "data.blocks": 2,
    "data": 3,
    "training": 3,
    "training.bounds": 3.1,
    "training.steps": 4,
    # On the steps stand blocks, moments and their quadratic form; on those the engines; on those the trainer.
    "training.slot_steps": 4.1,
    "training.loss_steps": 4.1,
    "training.block_pass": 4.1,
    "training.block_steps": 4.2,
    "training.host_moments": 2,
    "training.moments": 3.2,
    "training.moment_steps": 4.2,
    "training.schedule": 4.2,
    "training.quadratic": 4.4,
    "training.known_answer": 4.45,
    "training.engines.engine": 4.5,
    "training.engines.setup": 4.5,
    "training.engines": 4.6,
    "training.measures": 4.8,
    "training.trainer": 5,
    "training.persistence": 5.5,
    "cluster": 6,
    "results": 6,
    "run_lock": 3,
    "run_place": 3,
    "run_folder": 4,
    "rates": 6,
    "linear_units": 6.2,
    "objective": 6.4,
    "run_optimum": 6.5,
    "run_rate": 6.5,
    "engine_choice": 6.5,
    "run_files": 6.5,
    "kept_run": 6.6,
    "session": 6.8,
    "verification": 6.9,
    "surroundings": 6.8,
    "commands": 7,
    "sklearn": 8,
    "run": 7,
    "cli": 8,
    "": 9,  # tapedist/__init__.py and __main__.py
}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)


def _room(module: str) -> str:
    while module not in FLOORS:
        assert "." in module, f"tapedist/{module}.py has no floor: add it to FLOORS"
        module = module.rpartition(".")[0]
    return module


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
        assert room == own or FLOORS[room] < FLOORS[own], f"{_name(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_numerics_comes_before_tensorflow(path: Path):
    imports = [
        (node.lineno, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    tensorflow = [line for line, name in imports if name.split(".")[0] in ("tensorflow", "tensorflow_datasets")]
    numerics = [line for line, name in imports if name == "tapedist.numerics"]
    assert not tensorflow or (numerics and min(numerics) < min(tensorflow))


def _uses(path: Path, attribute: str, owner: str = "") -> bool:
    """Whether `path` says `X.attribute`, where X's source ends with `owner`."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == attribute and ast.unparse(node.value).endswith(owner)
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_one_home_for_the_tape_and_for_strategy_run():
    # The probe is a program of its own, with which the doctor looks at a machine.
    probe = {"cluster.probe"}
    assert {_name(path) for path in MODULES if _uses(path, "GradientTape")} <= {"training.row_sums", *probe}
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
