"""`tapedist verify`: a run recomputed by the reference, and whether what it stored are the same numbers."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from tapedist import reference
from tapedist.command_options import VerifyOptions
from tapedist.errors import StateError
from tapedist.training.checkpoints import Checkpoint
from tapedist.training.state import TrainingState
from tapedist.verification.comparison import check_checkpoint, check_model, check_path
from tapedist.verification.recomputation import Moment, Recomputation
from tapedist.verification.rules import AskedRules
from tapedist.verification.stored import StoredRun, path_of

_PROGRESS_SECONDS = 5.0


def verify(options: VerifyOptions, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Recomputes a run and prints whether it is equal to what is stored, number by number.

    Args:
        options: which run.
        clock: in seconds, for the progress.

    Raises:
        InputError: if there is no such run, or none that can be recomputed.
        StateError: if something is stored that cannot be trusted, or differs; with the first that does.
    """
    stored = StoredRun.read(options.run_dir)
    say = _progress_line
    source = stored.open_rows()
    print("rows: equal fingerprint")
    run = Recomputation(stored.config, source, say=say)
    given = _start(stored, options.epochs * run.per_epoch) if options.epochs else None
    rules, begin = AskedRules(run), run.start()
    if given:
        begin = _taken(given, run)
        rules.take_up(given.arrays["stop_memory"])
        print(f"start: {given.path.name}, whose state after {given.step} updates is taken as given")
    verification = _Verification(stored, run, rules, first=begin.step)
    for moment in _paced(run, begin, verification.last, clock=clock, say=say):
        verification.look(moment)
    print(verification.outcome(begin))


class _Verification:
    """What is stored, by the step at which the recomputation can tell.

    Args:
        stored: the run.
        run: its recomputation.
        rules: that may have stopped it.
        first: the step from which on something is recomputed.

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
        """Compares what is stored of this step.

        Raises:
            StateError: if it differs.
        """
        step = moment.step
        for name, theta in self._paths.get(step, ()):
            check_path(name, theta, moment, self._run)
        for checkpoint in self._checkpoints.get(step, ()):
            if step > self._first or not step:  # The one to start from was taken as given.
                check_checkpoint(checkpoint, moment, self._run)
                self._tell(checkpoint.path.name, f"{len(moment.vector)} numbers after {step} updates")
        if self._model and step == self._model_step:
            check_model(self._model, moment, self._run)
            self._tell("model.json", f"parameters, digest and losses after {step} updates")
        self._ask(moment)

    def _ask(self, moment: Moment) -> None:
        """Asks the rules: they must stop the run where it ended, and nowhere before."""
        stopped = self._model.content["stopped"] if self._model and moment.step == self._model_step else ""
        if self._rules.obstacle:
            self._asked = f"; its stop rule was not asked again, because {self._rules.obstacle}" if stopped else ""
            return
        reason = self._rules.reason(moment)
        if (moment.step == self._model_step and reason != stopped) or (reason and moment.step < self.last):
            raise StateError(
                f"differs: the stop rules after {moment.step} updates: stored {stopped or 'that it goes on'}, "
                f"recomputed {reason or 'that it goes on'}"
            )
        if stopped:
            print(f"stop rule after {moment.step} updates: equal ({stopped})")

    def _tell(self, name: str, what: str) -> None:
        self._compared.append(name)
        print(f"{name}: equal, {what}")

    def outcome(self, begin: Moment) -> str:
        """The last line."""
        start = f"the state after {begin.step} updates" if begin.step else "the start"
        return (
            f"equal: {', '.join(self._compared)} and {self.last - begin.step} updates from {start}, bit for bit"
            f"{self._asked}"
        )


def _start(stored: StoredRun, updates: int) -> Checkpoint | None:
    """The newest checkpoint that is at least so many updates before the newest state; None if there is none."""
    steps = [checkpoint.step for checkpoint in stored.checkpoints]
    last = max([*steps, *([int(stored.model.content["steps"])] if stored.model else [])])
    early = [checkpoint for checkpoint in stored.checkpoints if 0 < checkpoint.step <= last - updates]
    return early[-1] if early else None


def _taken(checkpoint: Checkpoint, run: Recomputation) -> Moment:
    """The state of a checkpoint."""
    state, count = TrainingState.from_arrays(checkpoint.arrays), run.objective.num_parameters
    theta, slots = state.vector[:count], state.vector[count:].reshape(-1, count)
    at = reference.Step(state.step, theta, slots, float("nan"), float("nan"))
    return Moment(at, state.first_loss, state.epoch_sums)


def _paced(
    run: Recomputation, begin: Moment, last: int, *, clock: Callable[[], float], say: Callable[[str], None]
) -> Iterator[Moment]:
    """The run up to its step `last`, with a line of progress now and then.

    Raises:
        StateError: if the recomputation diverges before.
    """
    yield begin
    started = told = clock()
    moment, states = begin, run.after(begin)
    while moment.step < last:
        try:
            moment = next(states)
        except reference.Diverged as error:
            raise StateError(f"differs: the recomputation {error}; stored are {last} updates") from None
        if clock() - told >= _PROGRESS_SECONDS:
            told = clock()
            left = (told - started) / (moment.step - begin.step) * (last - moment.step)
            say(f"{moment.step} of {last} updates, about {left:.0f} s left")
        yield moment


def _progress_line(text: str) -> None:
    print(f"verify: {text}", file=sys.stderr, flush=True)
