"""`tapedist verify`: recomputes a run by the reference, and compares its stored numbers."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from tapedist import reference
from tapedist.command_options import VerifyOptions
from tapedist.errors import StateError
from tapedist.storage.checkpoints import Checkpoint
from tapedist.training.state import TrainingState
from tapedist.verification.comparison import check_checkpoint, check_model, check_path
from tapedist.verification.recomputation import AskedRules, Moment, Recomputation
from tapedist.verification.stored import StoredRun, path_of

_PROGRESS_SECONDS = 5.0


def verify(options: VerifyOptions, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Recomputes a run, compares every stored number, and prints the outcome.

    Args:
        options: the run.
        clock: in seconds, for the progress.

    Raises:
        InputError: if there is no such run, or it cannot be recomputed.
        StateError: if a stored file is damaged, or a number differs; with the first that does.
    """
    stored = StoredRun.read(options.run_dir)
    source, progress = stored.open_rows(), _Progress(clock)
    _log(f"rows: equal, fingerprint {source.fingerprint()[:12]}...")
    run = Recomputation(stored.config, source, report=progress.rows)
    given = _start(stored, options.epochs * run.per_epoch) if options.epochs else None
    rules, begin = AskedRules(run), run.start()
    if given:
        begin = _taken(given, run)
        rules.restore(given.arrays["stop_memory"])
        _log(f"start: {given.path.name}, whose state after {given.step} updates is taken as given")
    verification = _Verification(stored, run, rules, first=begin.step)
    for moment in _recomputed(run, begin, verification.last, progress):
        verification.look(moment)
    _log(verification.outcome(begin))


def _log(line: str) -> None:
    print(line, flush=True)  # The next one may be hours away.


class _Verification:
    """The stored numbers, by the step at which they can be compared.

    Args:
        stored: the run.
        run: its recomputation.
        rules: the rules that may have stopped it.
        first: the step at which the recomputation begins.

    Attributes:
        last: the step of the newest state.
    """

    def __init__(self, stored: StoredRun, run: Recomputation, rules: AskedRules, *, first: int):
        self._run, self._rules, self._first = run, rules, first
        self._checkpoints: dict[int, list[Checkpoint]] = defaultdict(list)
        self._paths: dict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)
        for checkpoint in stored.checkpoints:
            self._checkpoints[checkpoint.step].append(checkpoint)
            for epoch, theta in path_of(checkpoint):
                self._paths[epoch * run.per_epoch].append((checkpoint.path.name, theta))
        self._model = stored.model
        model_step = [int(stored.model.content["steps"])] if stored.model else []
        self.last = max([*self._checkpoints, *model_step])
        self._model_step = model_step[0] if model_step else -1
        self._compared: list[str] = []
        self._asked = ""

    def look(self, moment: Moment) -> None:
        """Compares the stored numbers of this step.

        Raises:
            StateError: if it differs.
        """
        step = moment.step
        # Paths overlap, because each checkpoint stores its own from the start: every copy is compared.
        for name, theta in self._paths.get(step, ()):
            check_path(name, theta, moment, self._run)
        for checkpoint in self._checkpoints.get(step, ()):
            if step > self._first or not step:  # The checkpoint that the recomputation began from is not compared.
                self._add(checkpoint.path.name, check_checkpoint(checkpoint, moment, self._run))
        if self._model and step == self._model_step:
            check_model(self._model, moment, self._run)
            self._add("model.json", f"parameters, digest and losses after {step} updates")
        self._check_rules(moment)

    def _check_rules(self, moment: Moment) -> None:
        """Checks the stopping rules: they must stop the run at its end, and not before."""
        stopped = self._model.content["stopped"] if self._model and moment.step == self._model_step else ""
        if self._rules.obstacle:
            self._asked = f"; its stop rule was not asked again, because {self._rules.obstacle}" if stopped else ""
            return
        # At every step, because the rules have a state, such as the best test loss so far.
        reason = self._rules.reason(moment)
        if (moment.step == self._model_step and reason != stopped) or (reason and moment.step < self.last):
            raise StateError(
                f"differs: the stop rules after {moment.step} updates: stored {stopped or 'that it goes on'}, "
                f"recomputed {reason or 'that it goes on'}"
            )
        if stopped:
            _log(f"stop rule after {moment.step} updates: equal ({stopped})")

    def _add(self, name: str, what: str) -> None:
        self._compared.append(name)
        _log(f"{name}: equal, {what}")

    def outcome(self, begin: Moment) -> str:
        """The last line."""
        start = f"the state after {begin.step} updates" if begin.step else "the start"
        return (
            f"equal: {', '.join(self._compared)} and {self.last - begin.step} updates from {start}, bit for bit"
            f"{self._asked}"
        )


def _start(stored: StoredRun, updates: int) -> Checkpoint | None:
    """The newest checkpoint that is at least `updates` before the newest state; None if there is none."""
    steps = [checkpoint.step for checkpoint in stored.checkpoints]
    last = max([*steps, *([int(stored.model.content["steps"])] if stored.model else [])])
    early = [checkpoint for checkpoint in stored.checkpoints if 0 < checkpoint.step <= last - updates]
    return early[-1] if early else None


def _taken(checkpoint: Checkpoint, run: Recomputation) -> Moment:
    """The state of a checkpoint."""
    state, count = TrainingState.from_arrays(checkpoint.arrays), run.objective.num_parameters
    theta, slots = state.vector[:count], state.vector[count:].reshape(-1, count)
    # The sums of the step before are not stored; nothing that follows depends on them.
    at = reference.Step(state.step, theta, slots, float("nan"), float("nan"))
    return Moment(at, state.first_loss, state.epoch_sums)


class _Progress:
    """Prints the progress of a recomputation on stderr.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._started = self._printed = clock()
        self._updates = ""

    def rows(self, place: str) -> None:
        """Takes the place of a pass."""
        if self._clock() - self._printed >= _PROGRESS_SECONDS:
            self._printed = self._clock()
            print("verify: " + "; ".join(filter(None, [self._updates, place])), file=sys.stderr, flush=True)

    def updates(self, step: int, *, first: int, last: int) -> None:
        """Takes the number of the last update."""
        left = (self._clock() - self._started) / (step - first) * (last - step)
        self._updates = f"{step} of {last} updates, about {left:.0f} s left"
        self.rows("")


def _recomputed(run: Recomputation, begin: Moment, last: int, progress: _Progress) -> Iterator[Moment]:
    """The run from `begin` to its step `last`.

    Raises:
        StateError: if the recomputation diverges before.
    """
    yield begin
    moment, states = begin, run.after(begin)
    while moment.step < last:
        try:
            moment = next(states)
        except reference.Diverged as error:
            raise StateError(f"differs: the recomputation {error}; stored are {last} updates") from None
        progress.updates(moment.step, first=begin.step, last=last)
        yield moment
