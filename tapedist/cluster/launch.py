"""`tapedist launch`: a cluster of processes on this machine, restarted together from the last checkpoint.

The launcher starts processes, passes the cluster to each by `TF_CONFIG`, and restarts them. Training, and the detection
of lost peers, are the workers' own.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tapedist.cluster.exit_policy import Action, Verdict
from tapedist.cluster.network import PortReservation
from tapedist.cluster.resolve import ClusterSpec, check_strategy, resolve
from tapedist.cluster.supervisor import Command, Console, SignalInbox, Supervisor, Worker
from tapedist.config import TrainConfig
from tapedist.errors import InputError
from tapedist.options import ANY, POSITIVE, Options, between, option

_LIST = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
_LIST_SECS = 30.0
_PROGRAM = (sys.executable, "-m", "tapedist")
_HOST = "127.0.0.1"


def found_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """UUIDs of this machine's GPUs, in the driver's order; none without a working NVIDIA driver."""
    try:
        done = subprocess.run(
            _LIST, capture_output=True, text=True, timeout=_LIST_SECS, env=dict(environ), stdin=subprocess.DEVNULL,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip().startswith("GPU-"))


def visible_gpus(found: Sequence[str], visible: str | None) -> tuple[str, ...]:
    """The GPUs that CUDA shows to a program: the words of `visible` that name one, up to the first that does not.

    Args:
        found: UUIDs of the machine's GPUs.
        visible: the value of CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    if visible is None or not found:
        return tuple(found)
    words: dict[str, str] = {}  # GPU -> how it was named; one that is named twice is there once.
    for word in (part.strip() for part in visible.split(",")):
        gpu = _named(found, word)
        if gpu is None:
            break
        words.setdefault(gpu, word)
    return tuple(words.values())


def _named(found: Sequence[str], word: str) -> str | None:
    """The GPU that `word` names: by its number, by the beginning of its UUID, or as a part of one (MIG)."""
    if word.isascii() and word.isdigit():
        return f"number {int(word)}" if int(word) < len(found) else None
    if word.startswith("MIG-"):
        return word
    matching = [uuid for uuid in found if word.startswith("GPU-") and uuid.startswith(word)]
    return matching[0] if len(matching) == 1 else None


def shares(visible: Sequence[str], *, workers: int, per_worker: int) -> list[dict[str, str]]:
    """The additions to the environment of each worker that give it GPUs of its own; empty without GPUs.

    Args:
        visible: the visible GPUs, as CUDA_VISIBLE_DEVICES names them.
        workers: the number of workers.
        per_worker: GPUs of each; 0 divides them evenly.

    Raises:
        InputError: if there are too few of them.
    """
    if not per_worker and (not visible or workers == 1):
        return [{}] * workers
    share = per_worker or len(visible) // workers
    if not visible:
        raise InputError(f"--gpus_per_worker={per_worker}: there is no GPU here; use --gpus_per_worker=0")
    if not 0 < share * workers <= len(visible):
        raise InputError(
            f"--num_workers={workers}{f' --gpus_per_worker={per_worker}' if per_worker else ''}: there are "
            f"{len(visible)} GPU(s) here, and two workers cannot share one; use {_that_fits(len(visible), workers)}, "
            "or set CUDA_VISIBLE_DEVICES=-1 and --gpus_per_worker=0 to train on CPUs"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i * share : (i + 1) * share])} for i in range(workers)]


def _that_fits(gpus: int, workers: int) -> str:
    if gpus >= workers:
        return f"--gpus_per_worker={gpus // workers}"
    return f"--num_workers={gpus} --gpus_per_worker=1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig(Options):
    """Settings of `tapedist launch`.

    Raises:
        InputError: if any field is invalid; `problems` lists every one of them.
    """

    num_workers: int = option(1, "Worker processes to start on this machine.", rule=between(1, 256))
    max_restarts: int = option(0, "How often all workers are restarted after one is lost.", rule=between(0, 1_000_000))
    virtual_devices_per_worker: int = option(
        0, "Split each worker's CPU into this many devices; 0 leaves it whole.", rule=between(0, 256)
    )
    gpus_per_worker: int = option(
        0, "GPUs of each worker, which no other worker sees; 0 divides them evenly.", rule=between(0, 256)
    )
    log_dir: str = option(
        "", "Folder for one log file per worker; empty makes a new one in the temporary folder.", path=True
    )
    stop_timeout_secs: float = option(60.0, "Seconds the workers may take to save after a signal.", rule=POSITIVE)
    worker_argv: tuple[str, ...] = option(("train",), "What each worker runs: the words after '--'.", rule=ANY)

    def _wrong_combinations(self) -> Iterator[str]:
        if "://" in self.log_dir:
            yield f"--log_dir={self.log_dir!r}: must be a local path"
        if self.gpus_per_worker and self.virtual_devices_per_worker:
            yield (
                f"--gpus_per_worker={self.gpus_per_worker}: has no meaning with --virtual_devices_per_worker="
                f"{self.virtual_devices_per_worker}, which computes on CPUs; drop one of them"
            )
        words = self.worker_argv
        if words[:1] != ("train",):
            found = repr(words[0]) if words else "nothing"
            yield f"found {found} after '--', but only train can be launched; write: tapedist launch ... -- train ..."
        if self.num_workers == 1:
            return  # Its cluster may be set from outside, one launcher per host.
        for word in words:
            name = word.lstrip("-").partition("=")[0]
            if word.startswith("-") and name in ("workers", "worker_index"):
                yield (
                    f"--{name}: has no meaning under --num_workers={self.num_workers}, which starts its own cluster; "
                    "drop it, or use --num_workers=1"
                )


def check_training(options: LaunchConfig, config: TrainConfig) -> None:
    """Raises before any worker is started, if every worker would raise.

    Raises:
        InputError: if the strategy cannot use several workers.
    """
    if options.num_workers == 1:
        return  # Its cluster comes from the environment.
    check_strategy(ClusterSpec(("",) * options.num_workers, 0, "--num_workers"), config.strategy)


def main(
    config: LaunchConfig,
    *,
    on_cpus: bool = False,
    program: Sequence[str] = _PROGRAM,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Runs `config.worker_argv` in `config.num_workers` processes until they are done, or cannot go on.

    Must be called in the main thread.

    Args:
        config: the launcher's settings.
        on_cpus: whether the workers' own settings give them logical CPUs, so that none needs a GPU.
        program: the program that gets `config.worker_argv`.
        environ: the environment that the workers inherit.

    Returns:
        0, the code of a worker with a real error, 75 if one was lost too often, or 128 + the signal that stopped them.

    Raises:
        InputError: if the environment names another cluster, there are too few GPUs, or the logs cannot be written;
            nothing was started.
    """
    if config.num_workers > 1 and resolve({"TF_CONFIG": environ.get("TF_CONFIG", "")}).workers:
        raise InputError(
            f"TF_CONFIG: names a cluster, but --num_workers={config.num_workers} starts a cluster of its own; "
            "unset TF_CONFIG, or use --num_workers=1"
        )
    own_gpus = _shares_of_gpus(config, environ, on_cpus)
    log_dir = _make_log_dir(config.log_dir)
    console = Console(sys.stdout, sys.stderr)
    restarts = 0
    with SignalInbox() as inbox:
        supervisor = Supervisor(inbox, console, stop_timeout_secs=config.stop_timeout_secs)
        while True:
            # Free ports, reserved until the attempt ends: no other program can take one while the workers start.
            reservation = PortReservation(config.num_workers if config.num_workers > 1 else 0)
            addresses = tuple(f"{_HOST}:{port}" for port in reservation.ports)
            console.log(f"starting {_workers_at(config.num_workers, addresses)}; logs in {log_dir}")
            commands = [
                _command(
                    rank, addresses, restarts, config, log_dir, [*program, *config.worker_argv], {**environ, **gpus}
                )
                for rank, gpus in enumerate(own_gpus)
            ]
            try:
                verdict, workers = supervisor.run(commands, restarts_left=config.max_restarts - restarts)
            finally:
                reservation.close()
            if verdict.action is not Action.RESTART:
                _report_failure(verdict, workers, console)
                return verdict.code
            restarts += 1
            console.log(f"restarting all workers from the last checkpoint ({restarts} of {config.max_restarts})")


def _shares_of_gpus(config: LaunchConfig, environ: Mapping[str, str], on_cpus: bool) -> list[dict[str, str]]:
    """The additions to each worker's environment, so that no two of them use the same GPU."""
    if config.virtual_devices_per_worker or (on_cpus and not config.gpus_per_worker):
        return [{}] * config.num_workers
    if config.num_workers == 1 and not config.gpus_per_worker:
        return [{}]
    visible = visible_gpus(found_gpus(environ), environ.get("CUDA_VISIBLE_DEVICES"))
    return shares(visible, workers=config.num_workers, per_worker=config.gpus_per_worker)


def _make_log_dir(log_dir: str) -> Path:
    if not log_dir:
        return Path(tempfile.mkdtemp(prefix="tapedist-launch-"))
    path = Path(log_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(
            f"--log_dir={log_dir!r}: cannot be written ({error.strerror}); name a folder that can"
        ) from None
    return path


def _workers_at(num_workers: int, addresses: Sequence[str]) -> str:
    return f"{num_workers} workers at {', '.join(addresses)}" if addresses else "1 worker"


def _command(
    rank: int,
    addresses: tuple[str, ...],
    restarts: int,
    config: LaunchConfig,
    log_dir: Path,
    argv: Sequence[str],
    environ: Mapping[str, str],
) -> Command:
    """The command of worker `rank`; of a flag given twice, the last counts."""
    flags = []
    if config.virtual_devices_per_worker:
        flags.append(f"--num_virtual_devices={config.virtual_devices_per_worker}")
    if restarts:  # `--resume=never` and `--resume=must` are about the state before the first start.
        flags.append("--resume=auto")
    own = {"PYTHONUNBUFFERED": "1"}  # Into a pipe, Python would hold back output until its buffer is full.
    if addresses:
        own["TF_CONFIG"] = ClusterSpec(addresses, rank, "tapedist launch").to_tf_config()
    return Command([*argv, *flags], dict(environ) | own, log_dir / f"worker-{rank}.log")


def _report_failure(verdict: Verdict, workers: Sequence[Worker], console: Console) -> None:
    """Repeats the last lines of the worker that ended the run; those of a single worker are at the end already."""
    if not verdict.code or verdict.rank is None or len(workers) == 1:
        return
    worker = workers[verdict.rank]
    console.log(f"worker {worker.rank} ended the run; the end of {worker.log}:")
    for line in worker.tail:
        console.write(console.err, f"[{worker.rank}] {line}\n")
