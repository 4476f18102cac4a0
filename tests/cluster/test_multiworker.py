"""Training on several workers, with real processes under the launcher: same bits, and what happens when one is lost."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import REPO, Finished
from preforked import preforked_python

from tapedist.cluster.network import PortReservation

TRAIN_MANY = str(Path(__file__).parents[1] / "train_many.py")
TIMEOUT = 400

SMALL = ["--n_samples=5123", "--num_features=3", "--num_epochs=7", "--statistics=false"]
WEIGHTED = [
    "--data={table}", "--target=y", "--weight=w", "--num_epochs=3", "--learning_rate=0.1", "--test_fraction=0.2",
    "--statistics=false",
]  # fmt: skip
STREAM, BATCHES = "--full_batch_engine=stream", "--mode=mini_batch"
# Lower limits: small splits are cut into many blocks, and batches are made anew, a few at a time.
BLOCKS = {
    "tapedist.data.orders:RESIDENT_BYTES": 0,
    "tapedist.data.orders:TILE_ROWS": 128,
    "tapedist.data.orders:MOST_PRODUCT_ROWS": 128,
    "tapedist.data.orders:BLOCK_BYTES": 1024,
}
TRANSFERS = {
    "tapedist.training.engines:_RESIDENT_BYTES": 0,
    "tapedist.training.engines:_SUPERBATCH_BYTES": 65536,
}
CASES: dict[str, tuple[list[str], dict[str, int]]] = {
    "batches": ([BATCHES, "--batch_size=1000", "--optimizer=adam", *SMALL], BLOCKS),  # Their test rows are streamed.
    "shuffled_rows": ([BATCHES, "--batch_size=96", "--shuffle=rows", *SMALL], {}),
    "streamed_batches": ([BATCHES, "--batch_size=1000", *SMALL], TRANSFERS),
    "resident": ([STREAM, "--dtype=float64", "--optimizer=momentum", "--eval_every_epochs=3", *SMALL], {}),
    "held": ([STREAM, "--cache=device", *SMALL], BLOCKS),
    "streamed": ([STREAM, "--cache=none", "--eval_every_epochs=3", *SMALL], BLOCKS),
    "moments": (["--full_batch_engine=moments", "--l2=0.01", *SMALL], BLOCKS),
    "whole_moments": (["--full_batch_engine=moments", *SMALL], {}),
    "weighted_batches": ([BATCHES, "--batch_size=100", "--shuffle=rows", *WEIGHTED], {}),
    "weighted_resident": ([STREAM, *WEIGHTED], {}),
    "weighted_streamed": ([STREAM, "--cache=none", *WEIGHTED], BLOCKS),
    "weighted_moments": (["--full_batch_engine=moments", *WEIGHTED], BLOCKS),
    # As a table is fitted without a setting: with a rule that stops, which the chief's word decides.
    "finished": (["--data={table}", "--target=y", "--weight=w"], BLOCKS),
    "finished_huber": (["--data={table}", "--target=y", "--loss=huber"], BLOCKS),
}
FEW = ("batches", "resident", "moments", "weighted_streamed")
# Some thousand gathers: long enough to be killed in the middle on any machine.
LONG = [
    "--mode=mini_batch", "--n_samples=4000", "--batch_size=512", "--num_epochs=800", "--log_every_epochs=20",
    "--checkpoint_every_steps=200", "--statistics=false", "--plots=false",
]  # fmt: skip


def _digests(folder: Path, *flags: str, cases: Iterable[str] = CASES, timeout: float = TIMEOUT) -> dict[str, set[str]]:
    """Digests of cases, by name, of every worker."""
    table = folder / "table.csv"
    rows = np.random.default_rng(3).normal(size=(1201, 3))
    weights = np.arange(len(rows)) % 4  # Some are 0.
    lines = [f"{a:.6f},{b:.6f},{2 * a - b + 0.1 * c:.6f},{w}" for (a, b, c), w in zip(rows, weights, strict=True)]
    table.write_text("\n".join(["a,b,y,w", *lines, ""]))
    told = {name: ([word.format(table=table) for word in CASES[name][0]], CASES[name][1]) for name in cases}
    path = folder / "cases.json"
    path.write_text(json.dumps(told))
    program = (*preforked_python(), TRAIN_MANY)
    code = (
        "import sys; from tapedist.cluster.launch import LaunchConfig, main; from tapedist.flags import CommandLine;"
        f"sys.exit(main(CommandLine(LaunchConfig, sys.argv[1:], rest='worker_argv').options(), program={program!r}))"
    )
    words = [*flags, f"--log_dir={folder / 'logs'}", "--", "train", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=timeout, cwd=REPO, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, set[str]] = {}
    for name, digest in re.findall(r"^(?:\[\d+\] )?(\w+) ([0-9a-f]{64})$", done.stdout, re.MULTILINE):
        found.setdefault(name, set()).add(digest)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    return _digests(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("flags", [["--num_workers=3"], ["--num_workers=2", "--virtual_devices_per_worker=2"]])
def test_all_engines_give_the_bits_of_one_process(flags: list[str], alone: dict[str, set[str]], tmp_path: Path):
    assert set(alone) == set(CASES)
    assert all(len(digests) == 1 for digests in alone.values())
    assert alone["held"] == alone["streamed"]
    assert _digests(tmp_path, *flags) == alone


def test_so_do_more_workers_than_ten(alone: dict[str, set[str]], tmp_path: Path):
    """TensorFlow orders tasks by their names, in which "task:10" comes before "task:2"."""
    found = _digests(tmp_path, "--num_workers=12", cases=FEW, timeout=3 * TIMEOUT)
    assert found == {name: alone[name] for name in FEW}


@pytest.mark.parametrize(("config", "fewer"), [("multi_host", ["--num_epochs=2"]), ("slurm", ["--num_epochs=50"])])
def test_the_configs_for_clusters_run_on_two_workers(
    config: str,
    fewer: list[str],
    launch: Callable[..., Launch],
    tapedist_command: Callable[..., Finished],
    tmp_path: Path,
):
    job = [f"--flagfile={REPO}/configs/{config}.flags", "--n_samples=900000", *fewer, "--plots=false"]
    running = launch("--num_workers=2", "--", "train", *job, f"--run_dir={tmp_path / 'two'}")
    assert running.finish() == 0, running.text
    alone = tapedist_command("train", *job, f"--run_dir={tmp_path / 'one'}", timeout=TIMEOUT, warm=True)
    assert alone.code == 0, alone.err
    assert len(_digest(alone.out)) == 1
    assert _digest(running.text) == _digest(alone.out)


class Launch:
    """`tapedist launch` in a process of its own, whose output can be waited for."""

    def __init__(self, words: list[str], env: dict[str, str], folder: Path):
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tapedist", "launch", f"--log_dir={folder / 'logs'}", *words],
            env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, count: int = 1) -> None:
        """Until `pattern` has been printed `count` times."""

        def found() -> bool:
            return sum(bool(re.search(pattern, line)) for line in self.lines) >= count

        with self._news:
            assert self._news.wait_for(lambda: found() or self._ended, TIMEOUT), self.text
            assert found(), self.text

    def workers(self) -> list[psutil.Process]:
        """Live workers, by rank."""

        def rank(process: psutil.Process) -> int:
            return json.loads(process.environ()["TF_CONFIG"])["task"]["index"]

        return sorted(psutil.Process(self.process.pid).children(), key=rank)

    def finish(self) -> int:
        code = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return code


@pytest.fixture
def launch(child_env: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> Launch:
            started = Launch(list(words), child_env, tmp_path)
            stack.enter_context(started.process)  # Closes its pipes.
            stack.callback(started.process.kill)
            return started

        yield start


def _digest(text: str) -> set[str]:
    return set(re.findall(r"Digest: ([0-9a-f]{64})", text))


def _listening(text: str) -> set[int]:
    """Ports of the cluster that somebody still listens at; connections in TIME_WAIT do not count."""
    ports = {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", text)}
    assert ports
    return ports & {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def test_killed_stopped_and_continued_by_another_number_of_workers(
    launch: Callable[..., Launch], tapedist_command: Callable[..., Finished], tmp_path: Path
):
    job = ["train", *LONG, f"--run_dir={tmp_path / 'run'}"]
    running = launch("--num_workers=2", "--max_restarts=1", "--", *job)
    running.wait_for(r"listens at .*:\d+: open on all interfaces and unauthenticated", 2)
    ports = re.findall(r"worker \d listens at (\S+):(\d+): open", running.text)
    told = re.findall(r"127\.0\.0\.1:(\d+)", running.text.split("logs in")[0])
    assert sorted(port for _, port in ports) == sorted(told)
    assert {host for host, _ in ports} <= {"[::]", "0.0.0.0"}

    running.wait_for(r"Epoch: 100, loss")  # There have been checkpoints.
    running.workers()[1].send_signal(signal.SIGKILL)
    running.wait_for(r"worker 1 was killed by SIGKILL")
    running.wait_for(r"Resuming after \d+ updates")
    running.workers()[1].send_signal(signal.SIGTERM)  # To one of them; both save and leave.
    assert running.finish() == 143, running.text
    for rank in range(2):
        # The launcher hands the signal on; whoever is just leaving by itself may die of it.
        assert re.search(f"worker {rank} (exited with 143|was killed by SIGTERM)", running.text), running.text
    assert not _listening(running.text)

    continued = tapedist_command(*job, "--resume=must", timeout=TIMEOUT, warm=True)
    plain = tapedist_command("train", *LONG, f"--run_dir={tmp_path / 'plain'}", timeout=TIMEOUT, warm=True)
    assert (continued.code, plain.code) == (0, 0), continued.err + plain.err
    assert "Resuming after" in continued.out
    assert _digest(continued.out) == _digest(plain.out)
    assert _steps(tmp_path / "run") == _steps(tmp_path / "plain")


def _steps(run_dir: Path) -> list[tuple[int, str, float]]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["split"], row["loss"]) for row in rows]


@pytest.fixture
def addresses() -> Iterator[tuple[str, ...]]:
    reservation = PortReservation(2)
    yield tuple(f"127.0.0.1:{port}" for port in reservation.ports)
    reservation.close()


def test_a_peer_that_never_comes_is_named(
    tapedist_command: Callable[..., Finished], addresses: tuple[str, ...], tmp_path: Path
):
    workers = f"--workers={','.join(addresses)}"
    words = ["train", workers, "--worker_index=0", "--cluster_timeout_secs=2", f"--run_dir={tmp_path / 'run'}"]
    alone = tapedist_command(*words, warm=True)
    assert alone.code == 75
    assert alone.errors == [
        f"tapedist: error: no answer from {addresses[1]} (rank 1) within --cluster_timeout_secs=2; start the missing "
        "worker, or open its port to this machine, and try again"
    ]


_HANGS = """
import sys, threading
from tapedist.cli import main
from tapedist.training.trainer import Trainer

original, calls = Trainer._take, []

def take_or_hang(*words):
    calls.append(words)
    if len(calls) == 5:
        print("hangs", flush=True)
        threading.Event().wait()
    return original(*words)

if "--worker_index=1" in sys.argv:
    Trainer._take = take_or_hang
sys.exit(main(sys.argv[1:]))
"""


def test_a_worker_that_hangs_while_its_server_answers(
    child_env: dict[str, str], addresses: tuple[str, ...], tmp_path: Path
):
    words = ["train", f"--workers={','.join(addresses)}", *LONG, "--num_epochs=1000000", "--peer_timeout_secs=12"]

    def start(rank: int, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*preforked_python(), "-c", _HANGS, *words, f"--worker_index={rank}", *flags],
            env=child_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    workers = [start(0, "--run_dir=run"), start(1)]
    try:
        assert workers[1].stdout
        assert any(line == "hangs\n" for line in workers[1].stdout)
        began = time.monotonic()
        said = [worker.communicate(timeout=TIMEOUT)[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [75, 75], said
        assert f"this worker, {addresses[1]} (rank 1), has done nothing for 1" in said[1]
        assert "in wait (threading.py:" in said[1]
        assert f"{addresses[1]} (rank 1)" in said[0].split("tapedist: error: ")[1]
        assert time.monotonic() - began < 60  # 10 * --peer_timeout_secs if nobody looked inside.
    finally:
        for worker in workers:
            worker.kill()


def test_workers_with_other_devices_are_named_by_all(
    child_env: dict[str, str], addresses: tuple[str, ...], tmp_path: Path
):
    def start(rank: int, *flags: str) -> subprocess.Popen[str]:
        words = ["train", f"--workers={','.join(addresses)}", f"--worker_index={rank}", *flags]
        return subprocess.Popen(
            [*preforked_python(), "-m", "tapedist", *words],
            env=child_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    workers = [start(0), start(1, "--num_virtual_devices=2")]
    try:
        for worker in workers:
            _, err = worker.communicate(timeout=TIMEOUT)
            assert worker.returncode == 2, err
            problems = [line for line in err.splitlines() if line.startswith("tapedist: error: ")]
            assert len(problems) == 1
            assert f"rank 1 ({addresses[1]}): devices is 2, but 1 on rank 0 ({addresses[0]}); give all" in problems[0]
    finally:
        for worker in workers:
            worker.kill()


def test_workers_on_other_kinds_of_processors_give_one_digest(
    child_env: dict[str, str], addresses: tuple[str, ...], tmp_path: Path
):
    def start(rank: int, isa: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tapedist", "train", f"--workers={','.join(addresses)}", f"--worker_index={rank}",
             "--n_samples=3001", "--num_epochs=7", "--full_batch_engine=stream", "--plots=false"],
            env=child_env | {"XLA_FLAGS": f"--xla_cpu_max_isa={isa}"}, cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    both = [start(rank, isa) for rank, isa in enumerate(("SSE4_2", "AVX2"))]
    ended = [process.communicate(timeout=TIMEOUT) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    alone = subprocess.run(
        [sys.executable, "-m", "tapedist", "train", "--n_samples=3001", "--num_epochs=7",
         "--full_batch_engine=stream", "--plots=false"],
        env=child_env, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(_digest(ended[0][0])) == 1
    assert _digest(ended[0][0]) == _digest(alone.stdout)


def test_a_proxy_for_the_web_is_no_obstacle(launch: Callable[..., Launch], child_env: dict[str, str]):
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        child_env |= {name: "http://127.0.0.1:9", name.upper(): "http://127.0.0.1:9"}
    child_env |= {"no_proxy": "elsewhere.example", "NO_PROXY": "elsewhere.example"}
    running = launch(
        "--num_workers=2", "--", "train", "--n_samples=4000", "--num_epochs=20", "--cluster_timeout_secs=60"
    )
    assert running.finish() == 0, running.text
    assert len(_digest(running.text)) == 1


def test_workers_with_other_settings_are_named_by_all(
    child_env: dict[str, str], addresses: tuple[str, ...], tmp_path: Path
):
    def start(rank: int, *flags: str) -> subprocess.Popen[str]:
        words = ["train", f"--workers={','.join(addresses)}", f"--worker_index={rank}", *flags]
        return subprocess.Popen(
            [*preforked_python(), "-m", "tapedist", *words],
            env=child_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    workers = [start(0, "--learning_rate=0.1", "--run_dir=run"), start(1, "--learning_rate=0.2")]
    try:
        for worker in workers:
            _, err = worker.communicate(timeout=TIMEOUT)
            assert worker.returncode == 2, err
            problems = [line for line in err.splitlines() if line.startswith("tapedist: error: ")]
            assert len(problems) == 1
            assert f"rank 1 ({addresses[1]}): learning_rate is 0.2, but 0.1 on rank 0" in problems[0]
    finally:
        for worker in workers:
            worker.kill()
    assert not (tmp_path / "run" / "done.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers=a:1,b:1"], "--worker_index must say which"),
        (["--workers=a:1,b:1", "--worker_index=2"], "--worker_index=2: must be from 0 to 1"),
        (["--workers=a:1,b", "--worker_index=0"], "has no port"),
        (["--workers=localhost:1,127.0.0.1:01", "--worker_index=0"], "and, as 'localhost:1', to rank 0"),
        (["--workers=nosuchhost.invalid:2222,127.0.0.1:2223", "--worker_index=0"], "cannot look the host up"),
        (["--collective=nccl", "--num_virtual_devices=2"], "--collective=nccl: needs GPUs"),
        (["--worker_index=0"], "needs --workers"),
        (
            ["--workers=a:1,b:1", "--worker_index=0", "--strategy=default"],
            "--strategy=default: cannot use the 2 worker",
        ),
        (["--cluster_timeout_secs=0"], "--cluster_timeout_secs=0: must be finite and above 0"),
        (["--peer_timeout_secs=0.5"], "--peer_timeout_secs=0.5: must be finite and at least 1"),
    ],
)
def test_a_bad_cluster_is_refused_before_tensorflow(
    words: list[str], said: str, run_python: Callable[..., Finished], tmp_path: Path
):
    script = "import sys; from tapedist.cli import main; print(main(sys.argv[1:]), 'tensorflow' in sys.modules)"
    finished = run_python("-c", script, "train", "--run_dir=run", *words)
    assert finished.out == "2 False\n"
    assert said in finished.err
    assert not (tmp_path / "run").exists()


def test_own_port_in_use(run_python: Callable[..., Finished]):
    script = "import sys; from tapedist.cli import main; print(main(sys.argv[1:]), 'tensorflow' in sys.modules)"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        words = [f"--workers=127.0.0.1:{port},127.0.0.1:1", "--worker_index=0"]
        finished = run_python("-c", script, "train", *words)
    assert finished.out == "2 False\n"
    assert f"port {port} of this machine is in use" in finished.err


def test_launch_refuses_a_bad_flag_once(run_python: Callable[..., Finished]):
    finished = run_python("-m", "tapedist", "launch", "--num_workers=2", "--", "train", "--learning_rate=-1")
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert "--learning_rate=-1" in finished.errors[0]
    assert "starting" not in finished.err
