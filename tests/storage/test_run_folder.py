"""A run folder is ours or new: what is not is refused and not touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tapedist.errors import InputError, StateError
from tapedist.storage.run_folder import RunFolder, check


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything under `folder`: file contents, link targets, None for directories."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found


def refused(path: object, match: str) -> None:
    """`check` and `open` refuse `path` with one line."""
    for attempt in (check, RunFolder.open):
        with pytest.raises(InputError, match=match) as caught:
            attempt(path)  # type: ignore[arg-type]
        assert len(caught.value.problems) == 1
        assert str(caught.value).isprintable()
        assert str(caught.value).startswith("--run_dir=")


def test_a_missing_folder_and_its_parents_are_made_and_marked(tmp_path: Path) -> None:
    check(tmp_path / "a" / "b" / "run")
    assert contents(tmp_path) == {}
    with RunFolder.open(tmp_path / "a" / "b" / "run") as folder:
        assert folder.root == tmp_path / "a" / "b" / "run"
        assert sorted(os.listdir(folder.root)) == [".tapedist", ".tapedist.lock"]
        assert json.loads((folder.root / ".tapedist").read_text()) == {"format": "tapedist run folder", "schema": 1}


def test_where_things_lie(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as folder:
        names = {name: path.name for name, path in vars(folder).items() if isinstance(path, Path) and name != "root"}
    assert names == {
        "metrics": "metrics.jsonl",
        "flags": "config.flags",
        "environment": "env.json",
        "model": "model.json",
        "checkpoints": "checkpoints",
        "events": "events",
        "plots": "plots",
        "report": "report.html",
        "export": "export",
        "done": "done.json",
    }


def test_our_own_folder_is_opened_again_with_all_that_is_in_it(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as folder:
        folder.metrics.write_text("{}\n")
        (folder.root / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with RunFolder.open(str(tmp_path) + "/") as folder:
        assert folder.metrics.read_text() == "{}\n"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", [".tapedist.lock", ".tapedist-1-.tapedist", ".tapedist"])
def test_a_run_killed_before_its_marker_was_there_leaves_a_folder_that_works(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    with RunFolder.open(tmp_path):
        pass
    RunFolder.find(tmp_path)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _foreign(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").touch()


def _foreign_marker(path: Path) -> None:
    _foreign(path)
    (path / ".tapedist").write_text('{"format": "something else", "schema": 1}')


def _saved_model(path: Path) -> None:
    path.mkdir()
    (path / "saved_model.pb").touch()


def _link_outside(path: Path) -> None:
    (path.parent.parent / "outside").mkdir()
    path.symlink_to(path.parent.parent / "outside")


def _member_link(path: Path) -> None:
    with RunFolder.open(path) as folder:
        (path.parent / "elsewhere").mkdir()
        folder.checkpoints.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Path.touch, "is a file; give a folder"),
        (_fifo, "is a file; give a folder"),
        (_foreign, "is not empty and not a run folder .it holds 'thesis.tex'.; give a new or an empty folder"),
        (_foreign_marker, "is not empty and not a run folder"),
        (_saved_model, "is not empty and not a run folder"),
        (_link_outside, "is a link that leads outside its folder, to '.*outside'; give that path itself"),
        (lambda path: path.symlink_to(path), "is a link to .*, which is no folder; remove the link"),
        (lambda path: path.symlink_to("nowhere"), "is a link to '.*nowhere', which is no folder"),
        (_member_link, "holds a link in the place of checkpoints; remove it"),
    ],
    ids=["file", "fifo", "foreign", "marker", "model", "outside", "loop", "dangling", "member"],
)
def test_what_is_not_ours_is_refused_and_not_touched(tmp_path: Path, make: Callable[[Path], None], match: str) -> None:
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "run"
    make(path)
    before = contents(tmp_path)
    refused(path, match)
    refused(str(path) + "/", match)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("", "must name a folder"),
        ("gs://bucket/run", "must be a local path, because saving needs rename and fsync; train into a local"),
        ("s3://bucket/run", "must be a local path"),
        ("file:///tmp/run", "must be a local path"),
        ("a\0b", "must not hold control characters; rename the path"),
        ("a\nb", "must not hold control characters"),
        ("\x1b[31mred", "must not hold control characters"),
        ("\udcff", "must not hold control characters"),
        ("/dev/null", "is a file; give a folder"),
        ("/dev/null/run", "its parent '/dev/null' is a file"),
        ("/" + "x" * 300, "cannot be looked at .File name too long.; use another path"),
        ("/", "is not empty and not a run folder"),
    ],
)
def test_bad_names_are_refused(path: str, match: str) -> None:
    refused(path, match)


def test_a_link_beside_its_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "latest").symlink_to("first")
    with RunFolder.open(tmp_path / "latest") as folder:
        assert folder.root == tmp_path / "first"


_AS_NOBODY = """
import os, sys
from tapedist.errors import TapedistError
from tapedist.storage.run_folder import RunFolder
if os.geteuid() == 0:
    os.setuid(65534)
for path in sys.argv[1:]:
    try:
        RunFolder.open(path)
    except TapedistError as error:
        print(error.exit_code, error)
"""


def test_a_folder_or_parent_without_permission_is_refused(child_env: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:  # Not below tmp_path, which only its owner may enter.
        folder = Path(name) / "closed"
        folder.mkdir(mode=0o555)
        Path(name).chmod(0o755)
        command = [sys.executable, "-c", _AS_NOBODY, str(folder), str(folder / "run")]
        result = subprocess.run(command, env=child_env, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines() == [
            f"2 --run_dir='{folder}': is not writable; use another folder or change its permissions",
            f"2 --run_dir='{folder}/run': its parent '{folder}' is not writable; use another folder or change its "
            "permissions",
        ]
        assert contents(Path(name)) == {str(folder): None}


def test_a_folder_that_cannot_be_written_to_after_all_is_exit_6(tmp_path: Path, child_env: dict[str, str]) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))" + _AS_NOBODY.replace("65534", "0")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    result = subprocess.run(command, env=child_env, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(
        f"6 cannot lock the run folder by '{tmp_path}/run/.tapedist.lock': File too large; "
    )
    with RunFolder.open(tmp_path / "run"):
        pass


def test_a_folder_of_a_later_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".tapedist").write_text('{"format": "tapedist run folder", "schema": 2}')
    for attempt in (check, RunFolder.open, RunFolder.find):
        with pytest.raises(StateError, match=r"was made by a later version .schema 2"):
            attempt(tmp_path)


def test_find_takes_run_folders_only(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="is no run folder; give the --run_dir of a training run"):
            RunFolder.find(path)
    assert contents(tmp_path) == {}
    with RunFolder.open(tmp_path / "run") as folder:
        assert RunFolder.find(tmp_path / "run").root == folder.root  # Reading needs no lock.
