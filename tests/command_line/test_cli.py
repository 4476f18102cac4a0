"""The command: help, exit codes, one line per problem, streams and signals."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPO, Finished

import tapedist
from tapedist import cli, config, errors, process
from tapedist.config import TrainConfig
from tapedist.text import to_text

Run = Callable[..., Finished]


def _commands(run: Callable[[TrainConfig], int | None]) -> dict[str, cli.Command]:
    return {"train": dataclasses.replace(cli.COMMANDS["train"], run=run)}


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--batch_size=0", "--helpfull"]])
def test_help_is_fast_and_without_tensorflow(words: list[str], run_python: Run):
    script = "import sys; from tapedist.cli import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    runs = [run_python("-c", script, *words) for _ in range(3)]
    help_text, modules = runs[0].out.rstrip("\n").rsplit("\n", 1)
    assert help_text.startswith("usage: tapedist ")
    assert not {"tensorflow", "numpy", "matplotlib", "pyarrow"} & set(modules.split())
    assert runs[0].code == 0
    assert runs[0].err == ""
    assert min(run.seconds for run in runs) < 1


def test_help_names_each_flag_with_its_default(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"\n  --{field.name}={to_text(field.default)}" in text
        for choice in field.metadata["choices"] or ():
            assert choice in text
    for heading in config.GROUPS.values():
        assert f"\n{heading}:\n" in text
    assert max(map(len, text.splitlines())) <= 100
    assert set(config.GROUPS) <= {field.name for field in dataclasses.fields(TrainConfig)}
    assert cli.main(["help", "train"]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["help", "trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_the_help_are_valid(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    command = cli.COMMANDS[name]
    for example in command.examples:
        words = shlex.split(example)
        assert words[0] == name
        assert cli.main(words, commands={name: dataclasses.replace(command, run=lambda options: None)}) == 0


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tapedist {tapedist.__version__}\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "the first word must be one of train; tapedist --help shows how"),
        (["--seed=3"], "the first word must be one of train; tapedist --help shows how (got '--seed=3')"),
        (["trian"], "'trian': must be one of train; did you mean train?"),
        (["\x1b[2J"], r"'\x1b[2J': must be one of train; tapedist --help shows how"),
    ],
)
def test_no_command(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words, commands=_commands(lambda options: None)) == 2
    assert capsys.readouterr().err == f"tapedist: error: {problem}\n"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (errors.InputError("--a=1: x", "--b=2: y"), 2, ["--a=1: x", "--b=2: y"]),
        (errors.StateError("step 7: torn"), 3, ["step 7: torn"]),
        (errors.DivergedError("loss is inf"), 4, ["loss is inf"]),
        (errors.StorageError("disk full"), 6, ["disk full"]),
        (errors.PeerLostError("10.0.0.2:1 is gone"), 75, ["10.0.0.2:1 is gone"]),
        (errors.Interrupted(signal.SIGINT), 130, ["stopped by SIGINT; what the run has saved stays"]),
        (errors.Interrupted(signal.SIGTERM, " early"), 143, ["stopped by SIGTERM early"]),
        (errors.Interrupted(0, " early"), 128, ["stopped by a signal early"]),
        (KeyboardInterrupt(), 130, ["stopped by SIGINT"]),
        (MemoryError(), 2, ["out of memory; free some, or lower --batch_size, or use --cache=none"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            6,
            ["cannot write a/b: No space left on device; make room or choose another --run_dir"],
        ),
        (
            ZeroDivisionError("by\nzero\x1b"),
            1,
            [r"bug in tapedist: ZeroDivisionError: by\nzero\x1b; --verbosity=1 shows the traceback, please report it"],
        ),
        (
            AssertionError(),
            1,
            ["bug in tapedist: AssertionError; --verbosity=1 shows the traceback, please report it"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error: BaseException, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]):
    commands = _commands(lambda options: _raise(error))
    assert cli.main(["train"], commands=commands) == code
    assert capsys.readouterr().err.splitlines() == [f"tapedist: error: {line}" for line in lines]

    assert cli.main(["train", "--verbosity=1"], commands=commands) == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith(f"tapedist: error: {lines[-1]}\n")


def test_the_command_chooses_its_exit_code():
    assert cli.main(["train"], commands=_commands(lambda options: 7)) == 7


def test_many_problems_are_cut(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", *(f"junk{i}" for i in range(1000))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "tapedist: error: and 980 more problems like these"


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (["--run_dir=file"], ["--run_dir='file': is a file"]),
        (["--run_dir=file/below"], ["--run_dir='file/below': its parent "]),
        (["--run_dir=full"], ["--run_dir='full': is not empty and not a run folder"]),
        (["--run_dir=new", "--resume=must"], ["--resume=must: --run_dir='new': is no run folder"]),
    ],
)
def test_bad_run_dir_is_refused_before_tensorflow(words: list[str], starts: list[str], run_python: Run, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    script = "import sys; from tapedist.cli import main; print(main(sys.argv[1:]), 'tensorflow' in sys.modules)"
    finished = run_python("-c", script, "train", *words)
    assert finished.out == "2 False\n"
    assert len(finished.errors) == len(starts)
    for line, start in zip(finished.errors, starts, strict=True):
        assert line.startswith(f"tapedist: error: {start}")
    assert sorted(tmp_path.rglob("*")) == before


# A command that prints until told not to, then leaves a file to show that it got to its end.
_CHATTY = textwrap.dedent(
    """
    import dataclasses, pathlib, sys
    from tapedist import cli

    def talk(options):
        for i in range(20_000):
            print("line", i, "\\u00e9")
        sys.stdout.flush()
        print("warning \\u00e9", file=sys.stderr, flush=True)
        pathlib.Path("end").write_text("reached")

    cli.COMMANDS["train"] = dataclasses.replace(cli.COMMANDS["train"], run=talk)
    cli.entry_point()
    """
)


@pytest.mark.parametrize("redirection", ["| head -n 1", ">&-", ">/dev/full", "2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_lost_streams_do_not_disturb_the_run(redirection: str, child_env: dict[str, str], tmp_path: Path):
    (tmp_path / "chatty.py").write_text(_CHATTY)
    line = f"{shlex.quote(sys.executable)} chatty.py train {redirection}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(
        ["bash", "-c", line],
        env={**child_env, "PYTHONIOENCODING": "ascii"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (tmp_path / "end").read_text() == "reached"
    assert process.returncode == 0
    assert process.stderr == ("" if "2>" in redirection else "warning \\xe9\n")


_PATIENT = textwrap.dedent(
    """
    import dataclasses, time
    from tapedist import cli

    def wait(options):
        print("ready", flush=True)
        time.sleep(60)

    cli.COMMANDS["train"] = dataclasses.replace(cli.COMMANDS["train"], run=wait)
    cli.entry_point()
    """
)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_before_training(signum: signal.Signals, child_env: dict[str, str]):
    process = subprocess.Popen(
        [sys.executable, "-c", _PATIENT, "train"],
        env=child_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert err == f"tapedist: error: stopped by {signum.name}\n"


def test_main_restores_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    inside = []
    assert cli.main(["train"], commands=_commands(lambda _: inside.append(signal.getsignal(signal.SIGTERM)))) == 0
    assert inside[0] is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_import_is_fast_and_lazy(run_python: Run):
    script = "import sys, tapedist; print(tapedist.TrainConfig().seed, *sys.modules)"
    runs = [run_python("-c", script) for _ in range(3)]
    assert runs[0].out.startswith("0 ")
    assert not {"tensorflow", "numpy"} & set(runs[0].out.split())
    assert min(run.seconds for run in runs) < 1
    assert set(tapedist.__all__) <= set(dir(tapedist))
    assert tapedist.errors is errors


def test_python_m_is_the_command(tapedist_command: Run):
    finished = tapedist_command("--version", env={"LC_ALL": "C", "HOME": os.devnull})
    assert (finished.code, finished.out, finished.err) == (0, f"tapedist {tapedist.__version__}\n", "")


@pytest.mark.parametrize("reader_gone", [True, False])
def test_only_a_reader_that_goes_away_is_no_failure(reader_gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        if reader_gone:
            os.close(reading)
        stream = process._Stream(open(writing, "w"))  # noqa: SIM115 (closed below)
        stream.write("x" * 1_000_000)
        monkeypatch.setattr(process.sys, "stdout", stream)
        if reader_gone:
            process.check_output()
        else:
            with pytest.raises(errors.StorageError, match=r"standard output: cannot be written: .*; send it elsewhere"):
                process.check_output()
    finally:
        stream.close()
        if not reader_gone:
            os.close(reading)
