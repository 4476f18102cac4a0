"""The outer loop: when to log, evaluate, save and stop.

Steps are in `steps.py`, the access to rows in `engines.py`.

Rows of `metrics.jsonl` are made from the records of steps, and depend on step numbers only, never on how many steps a
call ran. A run has diverged when its loss or an update is not finite, or its loss is a million times the first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, NoReturn

import numpy as np

from tapedist.errors import DivergedError, Interrupted
from tapedist.training.engines import Call, Engine, evaluator
from tapedist.training.interfaces import Consensus, Decision, Observer, Row, SingleProcess, StopRequest
from tapedist.training.schedule import CallLength, Schedule
from tapedist.training.state import TrainingState
from tapedist.training.steps import CallResult
from tapedist.training.stopping import Stopping

_FACTOR = 1e6  # Divergence, relative to the first loss: see `docs/arithmetic.md`.


class Trainer:
    """Runs the epochs of a state.

    Args:
        engine: computes steps.
        schedule: the milestones.
        observer: receives rows of metrics and progress.
        evaluate: `vector -> (loss, penalty)` on the test split, or None without test rows; may raise `Interrupted`.
        save: `(state, engine's progress) -> None`; called between calls.
        save_every_secs: time between saves; 0 saves at the end only.
        call_length: the number of steps of a call.
        train_rows: rows visited per epoch, for rates.
        stop: checked between calls.
        stopping: rules that end the run early.
        consensus: shares decisions among the processes of the run.
        clock: monotonic seconds.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        schedule: Schedule,
        observer: Observer,
        evaluate: Callable[[np.ndarray], tuple[float, float]] | None,
        save: Callable[[TrainingState, Mapping[str, np.ndarray]], None],
        save_every_secs: float,
        call_length: CallLength,
        train_rows: int,
        stop: StopRequest,
        stopping: Stopping = Stopping(),  # noqa: B008  (it is frozen)
        consensus: Consensus = SingleProcess(),  # noqa: B008  (it holds nothing)
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._engine = engine
        self._full_batch = engine.full_batch
        self._schedule = schedule
        self._observer = observer
        self._evaluate = evaluate
        self._save = save
        self._save_every_secs = save_every_secs
        self._call_length = call_length
        self._train_rows = train_rows
        self._stop = stop
        self._stopping = stopping
        self._consensus = consensus
        self._clock = clock
        self._wall_clock = wall_clock
        self._rate = 0.0
        self._last_loss = math.nan

        self._last_save, self._saved_step = clock(), -1

    def fit(self, state: TrainingState) -> None:
        """Runs to the last epoch, or until a rule stops it; `state` is that of whole steps at any time.

        Raises:
            DivergedError: if the loss or an update is not finite, or the loss passes a million times the first. The
                update is not applied.
            Interrupted: if a signal asked to stop; the state has been saved.
        """
        # The state at the start needs no save: it is step 0, or the checkpoint that was resumed.
        self._last_save, self._saved_step = self._clock(), state.step
        while state.step < self._schedule.num_steps:
            wanted = self._between_calls(state)
            if state.stopped:
                return
            call = Call(
                state=state.vector,
                step=state.step,
                num_steps=wanted,
                limit=loss_limit(state.first_loss),
                interrupted=lambda: self._consensus.interrupted(self._stop.signum or int(self._save_is_due())),
                measured=self._schedule.measured,
            )
            start = self._clock()
            result = self._engine.run(call)
            if result is not None:  # Else interrupted before a step was whole: by a stop, or because a save is due.
                self._take(state, result, call.limit, self._clock() - start)

    def _between_calls(self, state: TrainingState) -> int:
        """Handles a stop, saves and evaluates if due, and returns the number of steps of the next call.

        Raises:
            Interrupted: see `fit`.
        """
        schedule = self._schedule
        # The clock, the signal and the length of a call are this process's own, but all processes must make the same
        # calls: one that saves while another steps would wait for it forever.
        decision = self._consensus.agree(
            Decision(self._stop.signum or 0, self._call_length.steps(), self._save_is_due())
        )
        if decision.stop:
            self._leave(state, decision.stop)
        if decision.save or (schedule.saves(state.step) and state.step != self._saved_step):
            self._save(state, self._engine.progress())
            self._last_save, self._saved_step = self._clock(), state.step
        try:
            self._look(state)
        except Interrupted as error:
            self._leave(state, error.signum)
        wanted = min(decision.steps, schedule.steps_to_milestone(state.step))
        if math.isnan(state.first_loss):
            # No call goes beyond the first epoch: its mean loss is the measure of divergence for all later steps. A
            # single batch may fit by chance.
            wanted = min(wanted, self._engine.steps_per_epoch - state.step)
        return wanted

    def close(self, state: TrainingState) -> tuple[float | None, float | None]:
        """Measures the final parameters: `(train loss, test loss)`, and records them.

        In mini-batch mode the train loss is the last epoch's mean, which has a row already.

        Raises:
            Interrupted: if a signal asked to stop; nothing has been saved, because nothing has changed.
        """
        decision = self._consensus.agree(Decision(self._stop.signum or 0, 0, False))
        if decision.stop:
            raise _stopped(state, decision.stop)
        train_loss, train = None, None
        try:
            if self._full_batch:
                train_loss, penalty = evaluator(self._engine)(state.vector)
                epoch = state.step // self._engine.steps_per_epoch
                train = self._row(state.step, epoch, "train", train_loss, penalty)
            elif state.step:
                train_loss = float(state.epoch_sums[0] / state.epoch_sums[1])
            test = self._test_row(state)
        except Interrupted as error:
            raise _stopped(state, error.signum) from None
        # Recorded only when both are known: an interrupted pass leaves no row that a resume would write again.
        for row in filter(None, [train, test]):
            self._observer.record(row)
        return train_loss, test.loss if test else None

    def _look(self, state: TrainingState) -> None:
        """Evaluates the test split and the stopping rules, if they are due at this step.

        Raises:
            Interrupted: if a signal asked to stop meanwhile; nothing has been saved.
        """
        # After an interruption inside a step this step number comes up again, and has its test row already.
        if self._schedule.evaluates(state.step) and state.tested_step != state.step:
            if row := self._test_row(state):
                self._observer.record(row)
            state.tested_step = state.step
        if self._schedule.checks(state.step):
            reason = self._stopping.reason(state.vector, state.step, state.memory)
            # The chief's answer for all processes, which must stop together.
            state.stopped = self._consensus.broadcast_text(reason)

    def _save_is_due(self) -> bool:
        return 0 < self._save_every_secs <= self._clock() - self._last_save

    def _take(self, state: TrainingState, result: CallResult, limit: float, seconds: float) -> None:
        """Records the steps of a call that took `seconds`, and updates the state."""
        self._call_length.observe(len(result.records), seconds)
        self._rate = self._train_rows / self._engine.steps_per_epoch * len(result.records) / max(seconds, 1e-9)
        losses = result.losses
        # Before the state changes: rows and epochs are counted from the step where the call began.
        self._book(state, result.records[: result.applied], result.paths)
        state.vector = result.state
        state.step += result.applied
        if math.isnan(state.first_loss) and state.step == self._engine.steps_per_epoch:
            first = losses[0] if self._full_batch else state.epoch_sums[0] / state.epoch_sums[1]
            state.first_loss = float(first)
        if result.applied < len(result.records):
            raise diverged(state.step, losses, limit=limit, known=self._last_loss)
        measured = losses[~np.isnan(losses)]
        self._last_loss = float(measured[-1]) if len(measured) else self._last_loss
        self._observer.advance(
            epoch=state.step // self._engine.steps_per_epoch,
            step=state.step,
            loss=self._last_loss,
            examples_per_sec=self._rate,
        )

    def _book(self, state: TrainingState, records: np.ndarray, paths: np.ndarray) -> None:
        """Makes rows of metrics from the records of applied steps, and adds parameters to the path."""
        per_epoch, schedule = self._engine.steps_per_epoch, self._schedule
        # Epochs whose first step is among these records; `-(-a // b)` rounds up.
        begun = range(-(-state.step // per_epoch), -(-(state.step + len(records)) // per_epoch))
        logged = list(schedule.logged(begun))
        for epoch in logged:
            state.add_to_path(epoch, paths[epoch * per_epoch - state.step])
        if self._full_batch:
            losses = full_batch_losses(records, step=state.step, logged=logged)
        else:
            losses = mini_batch_losses(
                records, state.epoch_sums, step=state.step, per_epoch=per_epoch, logs=schedule.logs
            )
        for step, epoch, loss, penalty in losses:
            self._observer.record(self._row(step, epoch, "train", loss, penalty))

    def _test_row(self, state: TrainingState) -> Row | None:
        if self._evaluate is None:
            return None
        epoch = state.step // self._engine.steps_per_epoch
        return self._row(state.step, epoch, "test", *self._evaluate(state.vector))

    def _row(self, step: int, epoch: int, split: str, loss: float, penalty: float) -> Row:
        return Row(
            step=step, epoch=epoch, split=split, loss=loss, penalty=penalty,
            examples_per_sec=self._rate or None, seconds=self._wall_clock(),
        )  # fmt: skip

    def _leave(self, state: TrainingState, signum: int) -> NoReturn:
        self._save(state, self._engine.progress())
        raise _stopped(state, signum)


def _stopped(state: TrainingState, signum: int) -> Interrupted:
    return Interrupted(signum, f" after {state.step} updates")


class EpochLoss(NamedTuple):
    """The numbers of a training row.

    Attributes:
        step: updates done when the loss is known.
        epoch: the epoch it belongs to.
        loss: weighted mean of the per-example loss.
        penalty: the L2 penalty at the epoch's first parameters.
    """

    step: int
    epoch: int
    loss: float
    penalty: float


def full_batch_losses(records: np.ndarray, *, step: int, logged: Iterable[int]) -> Iterator[EpochLoss]:
    """Each step is an epoch, and its record is the loss over the whole split at the parameters before its update.

    Args:
        records: float64 `[steps, columns]`, see `steps.py`.
        step: updates done before the first record.
        logged: epochs that have a row.
    """
    for epoch in logged:
        loss, weight, penalty = records[epoch - step, :3]
        yield EpochLoss(epoch, epoch, float(loss / weight), float(penalty))


def mini_batch_losses(
    records: np.ndarray, sums: np.ndarray, *, step: int, per_epoch: int, logs: Callable[[int], bool]
) -> Iterator[EpochLoss]:
    """The weighted mean over an epoch's batches, each at the parameters before its update.

    Args:
        records: float64 `[steps, columns]`, see `steps.py`.
        sums: float64 `[3]`, changed in place: `(sum w*loss, sum w, first penalty)` of the epoch under way.
        step: updates done before the first record.
        per_epoch: steps in an epoch.
        logs: whether an epoch has a row.
    """
    begin = 0
    while begin < len(records):
        epoch, within = divmod(step + begin, per_epoch)
        end = min(len(records), begin + per_epoch - within)
        if within == 0:
            sums[:] = 0.0, 0.0, records[begin, 2]
        # Added one after the other (`sum` adds pairwise), so that the sum does not depend on where calls end.
        sums[:2] = np.add.accumulate(np.vstack([sums[:2], records[begin:end, :2]]), axis=0)[-1]
        if within + end - begin == per_epoch and logs(epoch):
            yield EpochLoss(step + end, epoch, float(sums[0] / sums[1]), float(sums[2]))
        begin = end


def loss_limit(first_loss: float) -> float:
    """The loss above which a run has diverged; infinite before the first loss is known (NaN), or if that is 0."""
    return _FACTOR * first_loss if first_loss > 0 else math.inf


def diverged(step: int, losses: np.ndarray, *, limit: float, known: float) -> DivergedError:
    """The error for a call whose last step failed.

    Args:
        step: updates applied.
        losses: the call's losses, the failed step's last.
        limit: what the loss must not pass.
        known: the last loss of the calls before; NaN if there was none.
    """
    last, before = float(losses[-1]), np.append(known, losses[:-1])
    before = before[np.isfinite(before)]
    if not math.isfinite(last):
        what = f"the loss is {last}"
    elif last > limit:
        what = f"the loss reached {last:.6g}, a million times the first"
    else:
        what = f"the next parameters would not be finite (the loss is {last:.6g})"
    suffix = f"; the last good loss was {before[-1]:.6g}" if len(before) else ""
    return DivergedError(f"diverged after {step} updates: {what}{suffix}")
