#!/usr/bin/env python3
"""Kills training processes at random moments, and holds what the resumed runs end with against an undisturbed run.

    scripts/torture.py --kills=100 --output=scripts/torture_results/today.md

Every process is a real `tapedist train`. A run folder lives through a random list of blows:

    kill    SIGKILL, at a random moment of start or training
    save    SIGKILL while a checkpoint is being written (what it had written must still lie there)
    double  SIGKILL in training, then SIGKILL of the process that resumes, before it trains or soon after
    term    SIGTERM, and
    int     SIGINT, at a random moment of one phase: start, load, train, plot
    move    SIGTERM in training; what follows runs on another number of replicas

and is then left alone to finish. Its digest, summary, final checkpoint and metrics (but for `time` and
`examples_per_sec`) must equal those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import ctypes
import dataclasses
import datetime as dt
import json
import os
import platform
import random
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
SAVING = ["--checkpoint_every_secs=0.05"]
# name -> flags. Saves are constantly under way, and training takes some seconds.
MODES = {
    "resident": ["--full_batch_engine=stream", "--num_epochs=2000", "--checkpoint_every_steps=20"],
    "streamed": [
        "--full_batch_engine=stream", "--cache=none", "--n_samples=3000000", "--num_epochs=40", "--log_every_epochs=1",
        "--eval_every_epochs=4", *SAVING,
    ],
    "moments": [
        "--full_batch_engine=moments", "--n_samples=200000000", "--num_epochs=4000", "--eval_every_epochs=1000",
        "--checkpoint_every_steps=100", *SAVING,
    ],
    "momentum": [
        "--mode=mini_batch", "--optimizer=momentum", "--batch_size=96", "--num_epochs=12", "--log_every_epochs=1",
        "--eval_every_epochs=5", "--checkpoint_every_steps=7", "--learning_rate=0.0001",
    ],
    "adam_streamed": [
        "--mode=mini_batch", "--optimizer=adam", "--cache=none", "--n_samples=1000000", "--batch_size=65536",
        "--num_epochs=8", "--log_every_epochs=1", "--eval_every_epochs=3", "--checkpoint_every_steps=1",
    ],
}  # fmt: skip
REPLICAS = (1, 2, 3, 5)
PHASES = ("start", "load", "train", "train", "plot")
BLOWS_PER_RUN = 8
_WALL_CLOCK = ("time", "examples_per_sec")
_TOO_LONG_SECS = 600.0
_lines_lock = threading.Lock()


def say(line: str) -> None:
    with _lines_lock:
        print(f"{dt.datetime.now():%H:%M:%S}  {line}", flush=True)


@dataclasses.dataclass(frozen=True)
class Blow:
    """One disturbance: its kind, and for a signal the phase that it should meet."""

    kind: str
    phase: str = "train"

    @property
    def signum(self) -> signal.Signals:
        return {"term": signal.SIGTERM, "move": signal.SIGTERM, "int": signal.SIGINT}.get(self.kind, signal.SIGKILL)


class TrainingProcess:
    """One `tapedist train`, and how far it has come by what it prints."""

    def __init__(self, flags: list[str], run_dir: Path, replicas: int):
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
        devices = [f"--num_virtual_devices={replicas}"] if replicas > 1 else []
        self.began = time.monotonic()
        self.run_dir = run_dir
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tapedist", "train", f"--run_dir={run_dir}", *flags, *devices],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        self.loading, self.training = threading.Event(), threading.Event()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=self._read_output), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("Strategy:"):
                self.loading.set()
            elif line.startswith("Training samples:"):
                self.training.set()

    def _read_errors(self) -> None:
        assert self._process.stderr
        self._errors.extend(self._process.stderr)

    @property
    def errors(self) -> str:
        return "".join(line for line in self._errors if line.startswith("tapedist:") or "Error" in line).strip()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, happened: Callable[[], bool], pause: float = 0.002) -> bool:
        """Waits until something happened; False if the process ended before."""
        while self.running:
            if happened():
                return True
            time.sleep(pause)
        return False

    def send(self, signum: int) -> None:
        if self.running:
            self._process.send_signal(signum)

    def end(self) -> int:
        try:
            code = self._process.wait(_TOO_LONG_SECS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = 999
        for reader in self._readers:
            reader.join()
        return code


class Watch:
    """Names made in a directory, told by the kernel as they appear (Linux only)."""

    _IN_CREATE = 0x100

    def __init__(self, directory: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_CLOEXEC)
        if libc.inotify_add_watch(self._descriptor, os.fsencode(directory), self._IN_CREATE) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def made(self, *, seconds: float) -> list[str]:
        """Names that were made since the last call, or within some seconds."""
        names = []
        if select.select([self._descriptor], [], [], seconds)[0]:
            events = os.read(self._descriptor, 1 << 16)
            while events:
                _, _, _, length = struct.unpack("iIII", events[:16])
                names.append(os.fsdecode(events[16 : 16 + length].rstrip(b"\0")))
                events = events[16 + length :]
        return names


@dataclasses.dataclass
class Reference:
    """What an undisturbed run of a mode ended with, and the seconds of its phases."""

    outcome: dict[str, object]
    start_secs: float
    train_secs: float


def outcome(run_dir: Path) -> dict[str, object]:
    """All of a finished run that must not depend on what it went through."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((run_dir / "checkpoints").iterdir(), key=lambda path: path.name)
    with np.load(last / "state.npz") as state:
        arrays = {name: state[name].tobytes() for name in state.files if name != "metrics_position"}
    return {
        "metrics": [{name: value for name, value in row.items() if name not in _WALL_CLOCK} for row in rows],
        "done": json.loads((run_dir / "done.json").read_text()),
        "model": json.loads((run_dir / "model.json").read_text()),
        "state": arrays,
    }


@dataclasses.dataclass
class Tally:
    """What was done and found, over all runs."""

    blows: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    compared: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    starts: int = 0
    leaving_secs: list[float] = dataclasses.field(default_factory=list)
    left_out: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)


class Torturer:
    """Puts runs of one mode through their blows.

    Args:
        mode: a key of `MODES`.
        root: where run folders are made.
        rng: source of every choice.
        tally: told what happened.
    """

    def __init__(self, mode: str, root: Path, rng: random.Random, tally: Tally):
        self.mode, self.root, self.rng, self.tally = mode, root, rng, tally
        self.reference = self._undisturbed()
        self._count = 0

    def _flags(self, *, plots: bool = False) -> list[str]:
        return [*MODES[self.mode], f"--plots={str(plots).lower()}"]

    def _undisturbed(self) -> Reference:
        run_dir = self.root / f"{self.mode}-undisturbed"
        process = TrainingProcess(self._flags(), run_dir, 1)
        process.wait_for(process.training.is_set)
        start = time.monotonic() - process.began
        code = process.end()
        if code:
            raise SystemExit(f"torture: the undisturbed {self.mode} run left with {code}: {process.errors}")
        reference = Reference(outcome(run_dir), start, time.monotonic() - process.began - start)
        say(f"{self.mode}: undisturbed, {start:.1f} s to start, {reference.train_secs:.1f} s to train")
        return reference

    def live(self, blows: list[Blow]) -> None:
        """Runs until all blows have fallen and the last run is finished and compared."""
        replicas, run_dir = 1, self._fresh()
        waiting = list(blows)
        while waiting:
            plots = waiting[0].phase == "plot"
            process = TrainingProcess(self._flags(plots=plots), run_dir, replicas)
            self.tally.starts += 1
            fell = self._strike(process, waiting[0])
            if not process.running and process.end() == 0:
                self._compare(run_dir)
                run_dir = self._fresh()
            if fell:
                blow = waiting.pop(0)
                self.tally.blows[self.mode, blow.kind] += 1
                if blow.kind == "move":
                    replicas = self.rng.choice([r for r in REPLICAS if r != replicas])
        if run_dir.exists():
            process = TrainingProcess(self._flags(), run_dir, replicas)
            self.tally.starts += 1
            code = process.end()
            if code:
                self._fail(f"{run_dir.name}: the last start left with {code}: {process.errors}")
            else:
                self._compare(run_dir)

    def _fresh(self) -> Path:
        self._count += 1
        return self.root / f"{self.mode}-{self.rng.getrandbits(32):08x}-{self._count}"

    def _strike(self, process: TrainingProcess, blow: Blow) -> bool:
        """Deals one blow; False if the process ended before it could fall."""
        if not self._moment(process, blow):
            process.end()
            return False
        struck = time.monotonic()
        process.send(blow.signum)
        code = process.end()
        seconds = time.monotonic() - struck
        if code == 0:
            return False  # It had finished in between.
        # Before its handlers are there, and after they are gone, a process dies by the signal itself.
        if code not in (-blow.signum, 128 + blow.signum):
            self._fail(f"{process.run_dir.name}: {blow} left with {code}: {process.errors}")
        if blow.signum != signal.SIGKILL:
            self.tally.leaving_secs.append(seconds)
        say(f"{self.mode}: {blow.kind:6} in {blow.phase:5} -> {code} after {seconds:.2f} s")
        if blow.kind == "save":
            return any(name.startswith("tmp-") for name in os.listdir(process.run_dir / "checkpoints"))
        if blow.kind == "double":
            second = TrainingProcess(self._flags(), process.run_dir, 1)
            self.tally.starts += 1
            fell = self._moment(second, Blow("kill", self.rng.choice(["start", "load", "resumed"])))
            second.send(signal.SIGKILL)
            return second.end() != 0 and fell
        return True

    def _moment(self, process: TrainingProcess, blow: Blow) -> bool:
        """Waits for the moment of a blow; False if the process ended before."""
        sometime = self.rng.random()
        if blow.kind == "save":
            return self._save_under_way(process, appearance=self.rng.randrange(8))
        if blow.phase == "start":
            return process.wait_for(lambda: time.monotonic() - process.began > sometime * self.reference.start_secs)
        if blow.phase == "plot":
            return process.wait_for((process.run_dir / "model.json").exists) and self._pause(process, sometime * 0.5)
        if blow.phase == "load":
            return process.wait_for(process.loading.is_set) and self._pause(process, sometime * 0.5)
        # Counted in saves, not in seconds, which another load of the machine would make all or nothing of the run.
        before = _newest_save(process.run_dir)
        saves = self.rng.randrange(2 if blow.phase == "resumed" else 8)
        return (
            process.wait_for(process.training.is_set)
            and process.wait_for(lambda: _newest_save(process.run_dir) >= before + saves)
            and self._pause(process, sometime * 0.2)
        )

    def _pause(self, process: TrainingProcess, seconds: float) -> bool:
        until = time.monotonic() + seconds
        return process.wait_for(lambda: time.monotonic() >= until)

    def _save_under_way(self, process: TrainingProcess, appearance: int) -> bool:
        checkpoints = process.run_dir / "checkpoints"
        if not process.wait_for(checkpoints.exists):
            return False
        with Watch(checkpoints) as watch:
            while process.running:
                for name in watch.made(seconds=0.1):
                    appearance -= name.startswith("tmp-")
                    if appearance < 0:
                        return True
        return False

    def _compare(self, run_dir: Path) -> None:
        found, wanted = outcome(run_dir), self.reference.outcome
        different = [name for name in wanted if found[name] != wanted[name]]
        self.tally.compared[self.mode] += 1
        if different:
            self._fail(f"{run_dir.name}: differs from the undisturbed run in {', '.join(different)}")
        else:
            say(f"{self.mode}: finished, equal")
            shutil.rmtree(run_dir)

    def _fail(self, what: str) -> None:
        self.tally.failures.append(what)
        say(f"FAILED  {what}")


def _newest_save(run_dir: Path) -> int:
    """The number of the newest checkpoint; 0 if there is none."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except FileNotFoundError:
        return 0
    return max((int(name.partition("-")[0]) for name in names if name[0].isdigit()), default=0)


def lives(counts: dict[str, int], modes: list[str], rng: random.Random) -> Iterator[tuple[str, list[Blow]]]:
    """Deals all blows out to runs: each mode its share of each kind, in random order."""
    hands: dict[str, list[Blow]] = {mode: [] for mode in modes}
    for kind, count in counts.items():
        for i in range(count):
            mode = modes[i % len(modes)]
            if kind == "signal":
                hands[mode].append(Blow(("term", "int")[i % 2], PHASES[i // len(modes) % len(PHASES)]))
            else:
                early = kind == "kill" and rng.random() < 0.1
                hands[mode].append(Blow(kind, rng.choice(["start", "load"]) if early else "train"))
    while any(hands.values()):
        for mode in filter(hands.get, modes):
            rng.shuffle(hands[mode])
            yield mode, hands[mode][:BLOWS_PER_RUN]
            del hands[mode][:BLOWS_PER_RUN]


def document(options: argparse.Namespace, counts: dict[str, int], tally: Tally, seconds: float) -> str:
    """The result as Markdown."""
    dealt = {kind for _, kind in tally.blows}
    kinds = [kind for kind in ("kill", "save", "double", "term", "int", "move") if kind in dealt]
    lines = [
        f"# Torture, {dt.date.today()}",
        "",
        f"`scripts/torture.py --kills={counts['kill']} --saves={counts['save']} --doubles={counts['double']} "
        f"--signals={counts['signal']} --moves={counts['move']} --seed={options.seed} --modes={options.modes}`",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}, "
        f"Python {platform.python_version()}, TensorFlow {metadata.version('tensorflow')}, "
        f"NumPy {metadata.version('numpy')}. {tally.starts} processes in {seconds / 60:.0f} minutes, "
        f"{options.parallel} at a time, on a machine with other load.",
        "",
        "Compared with an undisturbed run of the same flags on one replica: digest and summary (`done.json`, "
        "`model.json`), every array of the last checkpoint (parameters, optimizer slots, first loss, epoch sums, "
        "parameter path), and every line of `metrics.jsonl` but for `time` and `examples_per_sec`.",
        "",
        "| mode | " + " | ".join(kinds) + " | runs compared |",
        "|---|" + "---:|" * (len(kinds) + 1),
    ]
    for mode in options.modes.split(","):
        cells = [str(tally.blows[mode, kind]) for kind in kinds]
        lines.append(f"| {mode} | {' | '.join(cells)} | {tally.compared[mode]} |")
    totals = [str(sum(count for (_, k), count in tally.blows.items() if k == kind)) for kind in kinds]
    lines += [f"| all | {' | '.join(totals)} | {sum(tally.compared.values())} |", ""]
    if tally.leaving_secs:
        lines += [
            f"Seconds from SIGTERM or SIGINT to the end of the process: median "
            f"{statistics.median(tally.leaving_secs):.2f}, longest {max(tally.leaving_secs):.2f}.",
            "",
        ]
    if tally.left_out:
        lines += [f"The time was up before {tally.left_out} more blows could be dealt.", ""]
    lines += [f"**{len(tally.failures)} failures.**", *(f"* {failure}" for failure in tally.failures), ""]
    lines += ["Modes:", "", *(f"* {mode}: `{' '.join(MODES[mode])}`" for mode in options.modes.split(","))]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; the other counts follow from it")
    for name, share in (("saves", 10), ("doubles", 10), ("signals", 4), ("moves", 5)):
        parser.add_argument(f"--{name}", type=int, default=None, help=f"by default a {share}th of --kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no further run after so many")
    parser.add_argument("--output", type=Path, help="where the result document goes")
    options = parser.parse_args()

    def count(asked: int | None, share: int) -> int:
        return -(-options.kills // share) if asked is None else asked

    counts = {
        "kill": options.kills, "save": count(options.saves, 10), "double": count(options.doubles, 10),
        "signal": count(options.signals, 4), "move": count(options.moves, 5),
    }  # fmt: skip
    began, tally, rng = time.monotonic(), Tally(), random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="tapedist-torture-"))
    modes = options.modes.split(",")
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        torturers = dict(zip(modes, pool.map(lambda mode: Torturer(mode, root, rng, tally), modes), strict=True))

        def live(mode: str, blows: list[Blow]) -> None:
            if time.monotonic() - began < options.minutes * 60:
                torturers[mode].live(blows)
            else:
                tally.left_out += len(blows)

        futures = [pool.submit(live, mode, blows) for mode, blows in lives(counts, modes, rng)]
        for future in concurrent.futures.as_completed(futures):
            future.result()
    text = document(options, counts, tally, time.monotonic() - began)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    print(text)
    if tally.failures:
        print(f"The folders of the runs that failed are in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
