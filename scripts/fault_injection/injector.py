"""Puts runs through their faults, and holds what they end with against a run that nobody disturbed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

from scripts.fault_injection.faults import MODES, REPLICAS, Fault
from scripts.fault_injection.outcome import Tally, outcome
from scripts.fault_injection.process import TrainingProcess, Watch, newest_save

_lines_lock = threading.Lock()


def log(line: str) -> None:
    with _lines_lock:
        print(f"{dt.datetime.now():%H:%M:%S}  {line}", flush=True)


@dataclasses.dataclass
class Reference:
    """What an undisturbed run of a mode ended with, and the seconds of its phases."""

    outcome: dict[str, object]
    start_secs: float
    train_secs: float


class Injector:
    """Puts runs of one mode through their faults.

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
            raise SystemExit(f"inject_faults: the undisturbed {self.mode} run left with {code}: {process.errors}")
        reference = Reference(outcome(run_dir), start, time.monotonic() - process.began - start)
        log(f"{self.mode}: undisturbed, {start:.1f} s to start, {reference.train_secs:.1f} s to train")
        return reference

    def run_trial(self, faults: list[Fault]) -> None:
        """Runs until all faults have fallen and the last run is finished and compared."""
        replicas, run_dir = 1, self._fresh()
        waiting = list(faults)
        while waiting:
            plots = waiting[0].phase == "plot"
            process = TrainingProcess(self._flags(plots=plots), run_dir, replicas)
            self.tally.starts += 1
            fell = self._strike(process, waiting[0])
            if not process.running and process.end() == 0:
                self._compare(run_dir)
                run_dir = self._fresh()
            if fell:
                fault = waiting.pop(0)
                self.tally.faults[self.mode, fault.kind] += 1
                if fault.kind == "move":
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

    def _strike(self, process: TrainingProcess, fault: Fault) -> bool:
        """Deals one fault; False if the process ended before it could fall."""
        if not self._moment(process, fault):
            process.end()
            return False
        struck = time.monotonic()
        process.send(fault.signum)
        code = process.end()
        seconds = time.monotonic() - struck
        if code == 0:
            return False  # It had finished in between.
        # Before its handlers are there, and after they are gone, a process dies by the signal itself.
        if code not in (-fault.signum, 128 + fault.signum):
            self._fail(f"{process.run_dir.name}: {fault} left with {code}: {process.errors}")
        if fault.signum != signal.SIGKILL:
            self.tally.leaving_secs.append(seconds)
        log(f"{self.tally.left:3} left  {self.mode}: {fault.kind:6} in {fault.phase:5} -> {code} after {seconds:.2f} s")
        if fault.kind == "save":
            return any(name.startswith("tmp-") for name in os.listdir(process.run_dir / "checkpoints"))
        if fault.kind == "double":
            second = TrainingProcess(self._flags(), process.run_dir, 1)
            self.tally.starts += 1
            fell = self._moment(second, Fault("kill", self.rng.choice(["start", "load", "resumed"])))
            second.send(signal.SIGKILL)
            return second.end() != 0 and fell
        return True

    def _moment(self, process: TrainingProcess, fault: Fault) -> bool:
        """Waits for the moment of a fault; False if the process ended before."""
        sometime = self.rng.random()
        if fault.kind == "save":
            return self._save_under_way(process, appearance=self.rng.randrange(8))
        if fault.phase == "start":
            return process.wait_for(lambda: time.monotonic() - process.began > sometime * self.reference.start_secs)
        if fault.phase == "plot":
            return process.wait_for((process.run_dir / "model.json").exists) and self._pause(process, sometime * 0.5)
        if fault.phase == "load":
            return process.wait_for(process.loading.is_set) and self._pause(process, sometime * 0.5)
        # Counted in saves, not in seconds, which another load of the machine would make all or nothing of the run.
        before = newest_save(process.run_dir)
        saves = self.rng.randrange(2 if fault.phase == "resumed" else 8)
        return (
            process.wait_for(process.training.is_set)
            and process.wait_for(lambda: newest_save(process.run_dir) >= before + saves)
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
            log(f"{self.mode}: finished, equal")
            shutil.rmtree(run_dir)

    def _fail(self, what: str) -> None:
        self.tally.failures.append(what)
        log(f"FAILED  {what}")
