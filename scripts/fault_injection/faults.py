"""The modes of training that are disturbed, the faults, and how they are scheduled to runs."""

from __future__ import annotations

import dataclasses
import random
import signal
from collections.abc import Iterator

_SAVING = ["--checkpoint_every_secs=0.05"]
# name -> flags. Saves are constantly under way; training takes some seconds, and so does no single step.
MODES = {
    "resident": ["--full_batch_engine=stream", "--num_epochs=2000", "--checkpoint_every_steps=20"],
    # Several rounds an epoch, so that saves fall inside epochs too.
    "streamed": [
        "--full_batch_engine=stream", "--cache=none", "--num_features=64", "--n_samples=500000", "--num_epochs=12",
        "--log_every_epochs=1", "--eval_every_epochs=4", *_SAVING,
    ],
    "moments": [
        "--full_batch_engine=moments", "--n_samples=60000000", "--num_epochs=4000", "--eval_every_epochs=1000",
        "--checkpoint_every_steps=100", *_SAVING,
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
FAULTS_PER_RUN = 12


@dataclasses.dataclass(frozen=True)
class Fault:
    """One disturbance: its kind, and for a signal the phase that it should meet."""

    kind: str
    phase: str = "train"

    @property
    def signum(self) -> signal.Signals:
        return {"term": signal.SIGTERM, "move": signal.SIGTERM, "int": signal.SIGINT}.get(self.kind, signal.SIGKILL)


def trials(counts: dict[str, int], modes: list[str], rng: random.Random) -> Iterator[tuple[str, list[Fault]]]:
    """Deals all faults out to runs: each mode its share of each kind, in random order."""
    schedule: dict[str, list[Fault]] = {mode: [] for mode in modes}
    for kind, count in counts.items():
        for i in range(count):
            mode = modes[i % len(modes)]
            if kind == "signal":
                schedule[mode].append(Fault(("term", "int")[i % 2], PHASES[i // len(modes) % len(PHASES)]))
            else:
                early = kind == "kill" and rng.random() < 0.1
                schedule[mode].append(Fault(kind, rng.choice(["start", "load"]) if early else "train"))
    while any(schedule.values()):
        for mode in filter(schedule.get, modes):
            rng.shuffle(schedule[mode])
            yield mode, schedule[mode][:FAULTS_PER_RUN]
            del schedule[mode][:FAULTS_PER_RUN]
