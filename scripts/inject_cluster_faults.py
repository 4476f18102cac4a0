#!/usr/bin/env python3
"""Kills and stops workers of `tapedist launch` at random moments, and holds what the runs end with against an
undisturbed run of one process.

    scripts/inject_cluster_faults.py --kills=30 --stops=10 --launcher_kills=3 --output=scripts/fault_results/cluster.md

    kill       SIGKILL of a random worker, at a random moment of start or training
    stop       SIGSTOP of a random worker in training: the others must notice, name it and leave; all are restarted
    launcher   SIGKILL of the launcher: no worker may survive ten seconds

After `kill` and `stop` the launcher restarts all workers, and the run must end with the digest of the undisturbed one.
After every trial no process of the cluster may be left, and none of its ports may be in LISTEN. A trial whose run had
ended before the fault could fall is repeated. The result document is written anew after every trial.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent
LIMIT_SECS = 20.0
JOB = [
    "--mode=mini_batch", "--n_samples=4000", "--batch_size=512", "--num_epochs=300", "--log_every_epochs=10",
    "--checkpoint_every_steps=100", "--statistics=false", "--plots=false", f"--peer_timeout_secs={LIMIT_SECS:g}",
]  # fmt: skip
_TOO_LONG_SECS = 900.0
_ORPHAN_SECS = 10.0
_NAMED = re.compile(r"error: .*127\.0\.0\.1:\d+ \(rank \d\)")
_IN_TRAINING = re.compile(r"Epoch: \d+, loss")


@dataclasses.dataclass
class Trial:
    """What happened: `problems` is empty if all went well."""

    kind: str
    moment: str
    seconds: float = 0.0
    noticed_secs: float | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


class Cluster:
    """A `tapedist launch` whose lines and workers are watched."""

    def __init__(self, folder: Path, workers: int):
        words = ["launch", f"--num_workers={workers}", "--max_restarts=5", f"--log_dir={folder / 'logs'}"]
        train = ["--", "train", *JOB, f"--run_dir={folder / 'run'}"]
        self.lines: list[tuple[float, str]] = []
        self.seen: set[psutil.Process] = set()
        self._news = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tapedist", *words, *train],
            cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self.lines.append((time.monotonic(), line))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait_for(self, pattern: re.Pattern[str], count: int = 1) -> None:
        """Until `count` lines match, or the end."""
        with self._news:
            self._news.wait_for(
                lambda: self._ended or sum(bool(pattern.search(line)) for _, line in self.lines) >= count,
                _TOO_LONG_SECS,
            )

    def workers(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen |= set(found)
        return found

    def ports(self) -> set[int]:
        return {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", self.text)}

    def strike(self, signum: int, random_source: random.Random) -> bool:
        """Sends `signum` to a random worker, once there is one; False if the run had ended before."""
        while self.process.poll() is None:
            if found := self.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    random_source.choice(found).send_signal(signum)
                    return True
            time.sleep(0.01)
        return False

    def leftovers(self) -> list[str]:
        """Processes and listening ports that outlived the launcher by ten seconds."""
        _, alive = psutil.wait_procs(list(self.seen), timeout=_ORPHAN_SECS)
        listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        return [f"process {p.pid} is left" for p in alive] + [f"port {p} listens" for p in self.ports() & listening]


def kill(cluster: Cluster, source: random.Random, usual_secs: float) -> str:
    """Deals the fault, as those below do, and says when; empty if the run had ended before."""
    moment = source.uniform(0, usual_secs)
    time.sleep(moment)
    return f"{moment:.1f} s after the start" if cluster.strike(signal.SIGKILL, source) else ""


def stop(cluster: Cluster, source: random.Random, usual_secs: float) -> str:
    epochs = source.randint(1, 20)
    cluster.wait_for(_IN_TRAINING, epochs)
    return f"after {epochs} lines of training" if cluster.strike(signal.SIGSTOP, source) else ""


def launcher(cluster: Cluster, source: random.Random, usual_secs: float) -> str:
    epochs = source.randint(0, 10)
    cluster.wait_for(_IN_TRAINING, epochs)
    alive = cluster.workers()
    cluster.process.kill()
    return f"after {epochs} lines of training" if alive else ""


def attempt(kind: str, folder: Path, *, workers: int, source: random.Random, usual_secs: float, digest: str) -> Trial:
    """One trial, in a folder of its own; its `moment` is empty if the run had ended before the fault could fall."""
    cluster = Cluster(folder, workers)
    begun = time.monotonic()
    trial = Trial(kind, {"kill": kill, "stop": stop, "launcher": launcher}[kind](cluster, source, usual_secs))
    struck = time.monotonic()
    while cluster.process.poll() is None and time.monotonic() - struck < _TOO_LONG_SECS:
        cluster.workers()
        time.sleep(0.2)
    cluster.wait_for(re.compile(r"\0"))  # The end of its output.
    trial.seconds = time.monotonic() - begun
    trial.problems += cluster.leftovers()
    if kind != "launcher":
        found = set(re.findall(r"Digest: ([0-9a-f]{64})", cluster.text))
        if cluster.process.poll() != 0 or found != {digest}:
            trial.problems.append(f"ended with {cluster.process.poll()}, digest {found}: {cluster.text[-500:]!r}")
    if kind == "stop":
        named = [moment for moment, line in cluster.lines if _NAMED.search(line) and moment > struck]
        trial.noticed_secs = named[0] - struck if named else None
        if not named:
            trial.problems.append("the stopped worker was not named")
        elif named[0] - struck > LIMIT_SECS:
            trial.problems.append(f"the stopped worker was named after {named[0] - struck:.1f} s")
    cluster.process.kill()
    return trial


def undisturbed(folder: Path, workers: int) -> tuple[str, float]:
    """Digest of a run of one process, and the seconds of a run of `workers`."""
    command = [sys.executable, "-m", "tapedist", "train", *JOB, f"--run_dir={folder / 'alone'}"]
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    digest = json.loads((folder / "alone" / "done.json").read_text())["digest"]
    begun = time.monotonic()
    cluster = Cluster(folder / "together", workers)
    code = cluster.process.wait(_TOO_LONG_SECS)
    assert code == 0, cluster.text
    return digest, time.monotonic() - begun


def report(trials: list[Trial], *, digest: str, workers: int, usual_secs: float) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    model = cpu[1] if cpu else platform.machine()
    lines = [
        f"# Cluster fault injection, {dt.date.today():%Y-%m-%d}",
        "",
        f"`scripts/inject_cluster_faults.py`: {workers} workers on {os.cpu_count()} cores ({model}), Python "
        f"{platform.python_version()}, TensorFlow {metadata.version('tensorflow')}; an undisturbed run takes "
        f"{usual_secs:.0f} s there. Job: `tapedist launch --num_workers={workers} --max_restarts=5 -- train "
        f"{' '.join(JOB)}`. Digest of one process, undisturbed: `{digest}`.",
        "",
        "| fault | trials | right digest, nothing left | problems |",
        "|---|---|---|---|",
    ]
    for kind in ("kill", "stop", "launcher"):
        mine = [trial for trial in trials if trial.kind == kind]
        good = sum(not trial.problems for trial in mine)
        lines.append(f"| {kind} | {len(mine)} | {good} | {'; '.join(p for t in mine for p in t.problems)} |")
    noticed = [trial.noticed_secs for trial in trials if trial.noticed_secs is not None]
    if noticed:
        lines += [
            "",
            f"A stopped worker was named after {min(noticed):.1f} to {max(noticed):.1f} s (limit {LIMIT_SECS:g} s).",
        ]
    lines += ["", "For `launcher`, nothing left means: no worker alive and no port in LISTEN ten seconds later."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--launcher_kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=2, help="clusters at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most_secs", type=float, default=float("inf"), help="start no trial after this time")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    source, trials, begun = random.Random(options.seed), [], time.monotonic()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tapedist-faults-") as name, ThreadPoolExecutor(options.parallel) as pool:
        folder = Path(name)
        digest, usual_secs = undisturbed(folder, options.workers)
        kinds = ["kill"] * options.kills + ["stop"] * options.stops + ["launcher"] * options.launcher_kills
        source.shuffle(kinds)

        def tried(number: int, kind: str) -> Trial | None:
            for again in range(10):
                if time.monotonic() - begun > options.most_secs:
                    return None
                trial = attempt(
                    kind, folder / f"{number}-{again}", workers=options.workers, source=source, usual_secs=usual_secs,
                    digest=digest,
                )  # fmt: skip
                if trial.moment or trial.problems:
                    return trial
            return Trial(kind, "never", problems=["every run had ended before the fault could fall"])

        for future in as_completed([pool.submit(tried, *pair) for pair in enumerate(kinds)]):
            if not (trial := future.result()):
                continue
            trials.append(trial)
            print(f"{dt.datetime.now():%H:%M:%S}  {len(trials)} of {len(kinds)}: {trial}", flush=True)
            if options.output:
                options.output.write_text(report(trials, digest=digest, workers=options.workers, usual_secs=usual_secs))
    return int(any(trial.problems for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
