"""What README, CONTRIBUTING and docs/ say of the repository: paths, names and links lead to what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO

from tapedist.errors import MEANINGS

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
_PATH = re.compile(r"((?:tapedist|configs|docs|examples|scripts|tests|\.ci|\.github)/[\w./*-]*)")
_ROOT_FILE = re.compile(r"[A-Z]+\.(?:md|cff)|pyproject\.toml|constraints\.txt|\.pre-commit-config\.yaml")


def _prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _paths(page: Path) -> list[str]:
    """Paths of the repository in backticks, also in commands."""
    words = [word for quoted in re.findall(r"`([^`\n]+)`", _prose(page)) for word in quoted.split()]
    names = [word.removeprefix("--flagfile=").rstrip(".,;:") for word in words]
    return [name for name in names if _PATH.fullmatch(name) or _ROOT_FILE.fullmatch(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_exist(page: Path):
    missing = [name for name in _paths(page) if not (list(REPO.glob(name)) if "*" in name else (REPO / name).exists())]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_tests_exist(page: Path):
    """Those that are named without their folder."""
    there = {path.name for path in (REPO / "tests").rglob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", _prose(page))) <= there


def test_paths_are_found_at_all():
    """The guard of the test above: the pages name what everybody must find."""
    named = {name for page in PAGES for name in _paths(page)}
    assert {"tapedist/run/train.py", "tapedist/reference/", "scripts/bench.sh", "configs/flights.flags"} <= named


def _tables(page: Path) -> Iterator[list[list[str]]]:
    """Cells of each table of a page, row after row: the header, the line below it, the rest."""
    for lines in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
        yield [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]


def _rows() -> Iterator[tuple[str, str, str]]:
    """`(page, path, name)` of the rows of tables that have the columns file and name."""
    for page in PAGES:
        for header, _, *rows in _tables(page):
            if {"file", "name"} <= set(header):
                yield from ((page.name, row[header.index("file")], row[header.index("name")]) for row in rows)


def _defined(path: Path) -> set[str]:
    """Functions, classes, and methods as `Class.method`, of a module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


ROWS = list(_rows())


@pytest.mark.parametrize(("page", "path", "name"), ROWS, ids=[name.strip("`") for _, _, name in ROWS])
def test_names_are_defined_where_a_table_says(page: str, path: str, name: str):
    quoted = [re.fullmatch("`([^`]+)`", text) for text in (path, name)]
    assert all(quoted), f"{page}: {path} and {name} must be in backticks"
    file, wanted = (match[1] for match in quoted if match)
    assert wanted in _defined(REPO / file), f"{page}: {wanted} is not in {file}"


def test_design_answers_what_a_reader_asks():
    text = (REPO / "docs" / "design.md").read_text()
    for question in (
        "where the learning rate is settled",
        "where a checkpoint becomes valid",
        "how to add a loss",
        "how to add a table format",
        "where a worker is declared lost",
        "where a row becomes a term of a sum",
    ):
        assert f"| {question} | `tapedist/" in text
    assert len(ROWS) >= 15


def _anchors(page: Path) -> set[str]:
    """Fragments by which a page's headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target


def test_each_exit_code_is_explained():
    text = (REPO / "docs" / "clusters.md").read_text()
    assert not [code for code in MEANINGS if f"\n| {code} | " not in text]


def test_every_page_is_linked_from_the_readme():
    readme = (REPO / "README.md").read_text()
    assert not [page.name for page in (REPO / "docs").glob("*.md") if f"](docs/{page.name})" not in readme]


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 160
