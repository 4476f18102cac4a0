"""What every test may use. Nothing here imports TensorFlow: a test that needs it pays for it itself."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from preforked import preforked_python
from topology import use_all_cores

REPO = Path(__file__).resolve().parent.parent
# What a developer's shell may hold that would change what a run does.
_HOSTILE = ("TF_CONFIG", "CUDA_VISIBLE_DEVICES", "TPU_NAME", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
# XLA reads its flags once, when it first compiles: tests in this process must meet the ones that tapedist sets, and so
# they are set here, once, before the first test.
os.environ.pop("XLA_FLAGS", None)
import tapedist  # noqa: E402, F401

# A shell ignores SIGINT for what it starts in the background, nohup SIGHUP, and children would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# The files that take minutes. Files run side by side, and one that began last would be waited for alone.
_LONG = (
    "bit_matrix",
    "equivalence",
    "multiworker",
    "mutants",
    "resume",
    "fault_injection",
    "examples",
    "bench",
    "signals",
    "train",
    "own_data",
    "steps",
    "join",
    "tables",
    "doctor",
)


def pytest_configure() -> None:
    """Gives each process of a distributed run cores of its own: threads that spin for work take it from each other.

    A test that wants to see threads side by side asks for all of them, by the fixture `all_cores`.
    """
    worker, count = (os.environ.get(f"PYTEST_XDIST_WORKER{end}") for end in ("", "_COUNT"))
    if worker and count and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.environ["TESTS_ALL_CORES"] = ",".join(map(str, cores))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: int(count)])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in _LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished command: exit code, what it wrote, and its wall-clock time in seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that are tapedist's own errors."""
        return [line for line in self.err.splitlines() if line.startswith("tapedist: error: ")]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _HOSTILE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """All cores for this process's new threads and for its children."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    use_all_cores()
    yield
    if own:
        os.sched_setaffinity(0, own)


@pytest.fixture
def child_env() -> dict[str, str]:
    """The environment of a child process that is to import tapedist from this checkout, from any folder, quietly."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    ours = ("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS")  # The child is to set them itself, as a user's process does.
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return {**inherited, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "default"}


@pytest.fixture
def run_python(child_env: dict[str, str], tmp_path: Path) -> Callable[..., Finished]:
    """Runs this interpreter on some words, in an empty folder; a warm one has imported TensorFlow already."""

    def run(
        *words: str,
        env: Mapping[str, str] | None = None,
        cwd: Path = tmp_path,
        stdin: str = "",
        timeout: float = 300,
        warm: bool = False,
    ) -> Finished:
        started = time.perf_counter()
        process = subprocess.run(
            [*(preforked_python() if warm else [sys.executable]), *words],
            env={**child_env, **(env or {})},
            cwd=cwd,
            input=stdin,
            timeout=timeout,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
        return Finished(process.returncode, process.stdout, process.stderr, time.perf_counter() - started)

    return run


@pytest.fixture
def tapedist_command(run_python: Callable[..., Finished]) -> Callable[..., Finished]:
    """Runs `tapedist WORDS` in a process of its own; takes `env`, `cwd`, `stdin`, `timeout`, `warm` as well."""

    def run(*words: str, **kwargs: object) -> Finished:
        return run_python("-m", "tapedist", *words, **kwargs)

    return run


@pytest.fixture
def parse_flags() -> Callable[[Sequence[str]], object]:
    """`tapedist train WORDS` up to its config."""
    from tapedist.config import TrainConfig
    from tapedist.flags import CommandLine

    return lambda words: CommandLine(TrainConfig, words).options()
