"""The compiled programs that move the parameters: the only `GradientTape` in the package.

Legend: `P` parameters, `V` shards, `u` shards of one replica, `k` rows of one shard, `s` optimizer slots.

The state is one flat float64 vector: the parameters `[P]`, then the optimizer's slots `[s * P]`. A step is

    partials  = one compiled sum per shard                       (each replica, its own shards)
    total     = gather, then fold in shard order                 (every replica, the same numbers)
    new state = divide, add the penalty, apply the update rule   (every replica, the same compiled function)

A compiled program serves all runs of one kind, whatever their rows. What differs between them is handed over with each
call, as one float64 vector, the settings: the limit of the loss and, where the update rule allows it, the weights of
the penalty and the constants of the rule.

A record is what a step leaves for the log: `(sum w*loss, sum w, penalty, parameters...)`, all at the parameters before
its update; the parameters are there only if they are few. Rows with weights are counted beside, in one more number of
each partial and record: without weights `sum w` is their number.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.errors import MissingRowsError
from tapedist.training import partials as fixed_order
from tapedist.training.losses import Loss, checked, is_own
from tapedist.training.model import Model
from tapedist.training.optimizers import Optimizer
from tapedist.training.replicas import Replicas

MAX_STEPS_PER_CALL = 4096
_PACKAGE = __name__.partition(".")[0] + "."
_MAX_RECORDED_PARAMETERS = 16
# Eigen shares the sums of longer products out to threads whatever XLA's flags say, and their bits follow the number of
# threads: with 65 columns of float64 from 256 rows on with 8 threads, from 512 rows on with 2. Up to 192 rows 1 to 64
# agree; so do products of as few rows with an own model's matrix whose sides are both below 256.
PRODUCT_ROWS = 128

# (x [rows, d], y [rows]) or (x, y, w [rows])
Rows = tuple[tf.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class CallResult:
    """What one compiled call did.

    Attributes:
        state: float64 `[P + s * P]` after the applied updates.
        records: float64 `[steps, columns]`, one per step begun; see the module's docstring.
        applied: updates applied; fewer than the records only if the last one would not have been finite.
        rows: float64 `[steps]`, how many rows each step has summed; None if it was computed from their moments.
    """

    state: np.ndarray
    records: np.ndarray
    applied: int
    rows: np.ndarray | None = None

    def complete(self, wanted: int | np.ndarray, split: str) -> CallResult:
        """Itself, if every step has summed each of its rows once.

        Args:
            wanted: the rows of every step, or int64 `[steps or more]`, those of each.
            split: "train" or "test".

        Raises:
            MissingRowsError: if not; whoever asked must not use the state.
        """
        assert self.rows is not None
        check_rows(self.rows, wanted, split)
        return self


def check_rows(found: np.ndarray, wanted: int | np.ndarray, split: str) -> None:
    """Refuses sums over other rows than there are, such as an exchange leaves that lost or repeated some.

    Args:
        found: float64 `[k]`, rows that were summed.
        wanted: rows that there were, in each sum, or int64 `[k or more]`.
        split: "train" or "test".

    Raises:
        MissingRowsError: if they differ.
    """
    wanted = np.full(len(found), wanted) if np.ndim(wanted) == 0 else np.asarray(wanted)[: len(found)]
    wrong = np.flatnonzero(~(found == wanted))
    if len(wrong):
        raise MissingRowsError(
            f"{found[wrong[0]]:.17g} rows were summed where the {split} split has {wanted[wrong[0]]:d} to sum; nothing "
            "of this pass was applied, what the run has saved stays; this is a bug in tapedist or TensorFlow, please "
            "report it"
        )


class StepPrograms(Replicas):
    """What is summed, and how the sum moves the parameters; the loops over steps build on it.

    Args:
        strategy: where replicas live.
        model: what is fitted.
        loss: per-example loss.
        optimizer: the update rule.
        num_shards: `V`.
        l2: weight of the penalty on `model.penalized` parameters.
        dtype: compute type of the rows.
        weighted: whether rows have weights.
    """

    def __init__(
        self,
        *,
        strategy: tf.distribute.Strategy,
        model: Model,
        loss: Loss,
        optimizer: Optimizer,
        num_shards: int,
        l2: float,
        dtype: tf.DType,
        weighted: bool = False,
    ):
        width = model.num_parameters + 2 + weighted
        super().__init__(strategy=strategy, num_shards=num_shards, partial_width=width)
        self.num_parameters = model.num_parameters
        self.num_slots = optimizer.num_slots
        self.dtype = dtype
        self.fusable = model.pure and strategy.num_replicas_in_sync == 1
        self.records_parameters = model.num_parameters <= _MAX_RECORDED_PARAMETERS
        self.record_width = 3 + self.records_parameters * model.num_parameters + weighted
        self.weighted = weighted
        self._model = model
        self._row_loss = loss
        self._loss = checked(loss)
        # Own models and losses need not be finite at rows of zeros, and zero times infinity is not zero.
        self._repeats = not model.pure or is_own(loss)
        self._in_pieces = not model.pure and self.on_cpu
        self._optimizer = optimizer
        self._l2 = l2
        penalty = (l2, model.penalized) if l2 else ()
        constants = [np.asarray(value, np.float64) for value in (*penalty, *optimizer.constants)]
        self._shapes = tuple(value.shape for value in constants)
        self._constants = np.concatenate([np.zeros(0), *(value.ravel() for value in constants)])

    def trace_once(self, *own: Hashable) -> None:
        """Shares the traces with other runs of the same kind; see `Replicas.share_traces`.

        Args:
            *own: what they depend on beside the arguments of this class.
        """
        rule, model = self._optimizer.rule, self._model
        # What the caller wrote may look at anything else, and change with it.
        if model.key is not None and not is_own(self._row_loss) and _is_plain(rule):
            compiled = b"" if self._optimizer.told else self._constants.tobytes()
            kind = (bool(self._l2), self._shapes, compiled, self.num_slots, self.dtype, self.weighted)
            self.share_traces((type(model), model.key, self._row_loss, rule, kind, own))

    def settings(self, limit: float) -> np.ndarray:
        """What a program is told of its run, float64 `[1 + c]`.

        Args:
            limit: a loss above it, or not finite, means divergence.
        """
        return np.concatenate([[limit], self._constants if self._optimizer.told else []])

    @property
    def num_settings(self) -> int:
        return len(self.settings(0.0))

    def _unpacked(self, settings: tf.Tensor) -> tuple[tf.Tensor, list[Any], list[Any]]:
        """The limit; the penalty's weight and what it weighs `[P]`, if there is one; the rule's constants."""
        optimizer = self._optimizer
        if not optimizer.told:
            penalty = [self._l2, tf.constant(self._model.penalized)] if self._l2 else []
            return settings[0], penalty, list(optimizer.constants)
        limit, *flat = tf.split(settings, [1, *(math.prod(shape) for shape in self._shapes)])
        told = [tf.reshape(piece, shape) for piece, shape in zip(flat, self._shapes, strict=True)]
        first = len(told) - len(optimizer.constants)
        return limit[0], told[:first], told[first:]

    def rows_sum(self, masters: tf.Tensor, rows: Rows, count: tf.Tensor, *, even: bool = False) -> tf.Tensor:
        """`(sum w*loss, sum w, sum w*gradient)` of the first `count` of `rows`.

        On a CPU, rows of an own model are summed piece after piece, so short that no product sums over many of them.

        Args:
            masters: float64 `[P]`.
            rows: `(x [k, d], y [k][, w [k]])`; beyond `count`, and where the weight is 0, they must be zeros.
            count: int32.
            even: whether it is `k` as far as anything is made of the sums, which spares a comparison for each row.

        Returns:
            float64 `[P + 2]`, and the count behind them if the rows have weights.
        """
        number = rows[1].shape[0]
        if not self._in_pieces or number <= PRODUCT_ROWS:
            return self._tape_sum(masters, rows, count, even=even)

        def piece_sum(first: tf.Tensor | int, length: int) -> tf.Tensor:
            piece = tuple(slice_rows(column, first, length) for column in rows)
            left = tf.clip_by_value(count - first, 0, length)
            return self._tape_sum(masters, piece, left, even=even)

        whole, rest = divmod(number, PRODUCT_ROWS)
        total = fixed_order.running_sum(
            lambda i: piece_sum(i * PRODUCT_ROWS, PRODUCT_ROWS), count=whole, width=self.partial_width
        )
        return total + piece_sum(whole * PRODUCT_ROWS, rest) if rest else total

    def _tape_sum(self, masters: tf.Tensor, rows: Rows, count: tf.Tensor, *, even: bool) -> tf.Tensor:
        """`rows_sum` in one piece: the tape."""
        real = self._real(rows, None if even else count)
        if self._repeats and real is not None:
            rows = _repeated(rows, real)
        x, y = rows[0], rows[1]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            forward, targets = self._model.bind(masters, self.dtype)
            tape.watch(targets)
            losses = self._loss(forward(x), y)
            if len(rows) == 3:
                losses = rows[2] * losses
            total = tf.reduce_sum(losses if real is None else tf.where(real, losses, tf.zeros([], self.dtype)))
        gradients = tape.gradient(total, targets, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        if self._repeats and real is not None:  # A shard without rows has none to repeat.
            some = tf.reduce_any(real)
            gradients = [tf.where(some, g, tf.zeros([], g.dtype)) for g in gradients]
        # Told, not taken from the shape: a replica's padding has the shape of a shard, and must not count as one.
        number = tf.cast(count, tf.float64)
        weight = tf.reduce_sum(rows[2]) if len(rows) == 3 else number
        pieces = [tf.reshape(total, [1]), tf.reshape(weight, [1]), *(tf.reshape(g, [-1]) for g in gradients)]
        if self.weighted:
            pieces.append(tf.reshape(number, [1]))
        return tf.concat([tf.cast(piece, tf.float64) for piece in pieces], 0)

    def _real(self, rows: Rows, count: tf.Tensor | None) -> tf.Tensor | None:
        """Which of `rows` to sum, boolean `[k]`; None if the others, if there are any, add nothing."""
        if len(rows) == 3:
            return rows[2] > 0 if self._repeats else None
        return None if count is None else tf.range(rows[1].shape[0]) < count

    def shards_sum(self, masters: tf.Tensor, rows: Rows, counts: tf.Tensor, *, even: bool) -> tf.Tensor:
        """`rows_sum` of several shards of equal length at once, in one kernel; for rows without weights.

        Args:
            masters: float64 `[P]`.
            rows: `(x [u * k, d], y [u * k])`.
            counts: int32 `[u]`.
            even: whether they are all `k`, as far as anything is made of the sums.

        Returns:
            float64 `[u, P + 2]`.
        """
        assert self._model.bind_shards, "the model binds to no more than one shard"
        shards = counts.shape[0]
        x, y = (tf.reshape(column, [shards, -1, *column.shape[1:]]) for column in rows)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            forward, targets = self._model.bind_shards(masters, self.dtype, shards=shards)
            tape.watch(targets)
            losses = self._row_loss(forward(x), y)
            if not even:
                real = tf.range(y.shape[1]) < counts[:, tf.newaxis]
                losses = tf.where(real, losses, tf.zeros([], self.dtype))
            total = tf.reduce_sum(losses, 1)
        pieces = [total, counts, *tape.gradient(total, targets)]
        return tf.concat([tf.cast(tf.reshape(piece, [shards, -1]), tf.float64) for piece in pieces], 1)

    def apply(
        self, state: tf.Tensor, partials: tf.Tensor, step: tf.Tensor, settings: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Fold, divide, penalise, update: `(new state, record, ok)`.

        Args:
            state: float64 `[P + s * P]`.
            partials: float64 `[V, P + 2]`, or one more with weights.
            step: int64, updates applied before this one.
            settings: float64, see `settings`; where the run has diverged, the state comes back as it was.
        """
        count = self.num_parameters
        limit, weights, constants = self._unpacked(settings)
        total = fixed_order.fold(partials)
        # A batch whose weights are all zero has no loss, and moves nothing by itself.
        loss_sum, weight = total[0], tf.where(tf.equal(total[1], 0.0), tf.ones_like(total[1]), total[1])
        theta, slots = state[:count], tf.reshape(state[count:], [self.num_slots, count])
        gradient = total[2 : 2 + count] / weight
        penalty = tf.zeros([], tf.float64)
        if self._l2:
            l2, penalized = weights[0], weights[1] * theta
            penalty = l2 * tf.reduce_sum(penalized * theta)
            gradient += 2 * l2 * penalized
        number = tf.cast(step + 1, tf.float64)
        new_theta, new_slots = self._optimizer.update(theta, slots, gradient, number, constants)
        new_state = tf.concat([new_theta, tf.reshape(new_slots, [-1])], 0)
        ok = (loss_sum <= limit * weight) & tf.math.is_finite(loss_sum) & tf.reduce_all(tf.math.is_finite(new_state))
        record = tf.stack([loss_sum, total[1], penalty])
        if self.records_parameters:
            record = tf.concat([record, theta], 0)
        if self.weighted:
            record = tf.concat([record, total[-1:]], 0)
        return tf.where(ok, new_state, state), record, ok

    @functools.cached_property
    def _compiled_apply(self) -> Any:
        return tf.function(self.apply, jit_compile=True, autograph=False)

    def gather_and_apply(self, state: tf.Tensor, partials: tf.Tensor, step: tf.Tensor, settings: tf.Tensor) -> Any:
        """`apply` on all replicas' partials; called on each replica with its own."""
        everyones = fixed_order.gather(partials[: self.replica_width], num_shards=self.num_shards)
        return self._compiled_apply(state, everyones, step, settings)

    def repeat(self, one_step: Callable[..., Any], state: tf.Tensor, num_steps: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Runs `one_step(i, state) -> per-replica (state, record, ok)` until done or not ok, as graph operations.

        Returns:
            `(state, records [num_steps, columns], begun, applied)`.
        """

        def body(i, state, records, applied, _):  # type: ignore[no-untyped-def]
            # All replicas hold the same numbers; the first local one speaks for them.
            state, record, ok = (self.strategy.experimental_local_results(v)[0] for v in one_step(i, state))
            return i + 1, state, records.write(i, record), applied + tf.cast(ok, tf.int32), ok

        records = tf.TensorArray(tf.float64, num_steps, element_shape=[self.record_width])
        start = (tf.constant(0), state, records, tf.constant(0), tf.constant(True))
        begun, state, records, applied, _ = tf.while_loop(
            lambda i, *rest: (i < num_steps) & rest[-1], body, start, parallel_iterations=1
        )
        return state, records.stack(), begun, applied

    def result(self, state: tf.Tensor, records: tf.Tensor, begun: tf.Tensor, applied: tf.Tensor) -> CallResult:
        """A compiled loop's results on the host."""
        found = records.numpy()[: int(begun)]
        if self.weighted:
            return CallResult(state.numpy(), found[:, :-1], int(applied), found[:, -1])
        return CallResult(state.numpy(), found, int(applied), found[:, 1])


def _is_plain(function: Callable[..., Any]) -> bool:
    """Whether all that a function looks at are its arguments, as far as this package can promise."""
    return inspect.isfunction(function) and not function.__closure__ and function.__module__.startswith(_PACKAGE)


def value_and_gradient(function: Callable[[tf.Tensor], tf.Tensor], at: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A scalar function of one tensor, and its gradient there."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(at)
        value = function(at)
    return value, tape.gradient(value, at)


def slice_rows(column: tf.Tensor, first: tf.Tensor, count: int) -> tf.Tensor:
    """Rows `first .. first + count` of a column `[rows]` or `[rows, d]`."""
    if column.shape.rank == 1:
        return tf.slice(column, [first], [count])
    return tf.slice(column, [first, 0], [count, column.shape[1]])


def _repeated(rows: Rows, real: tf.Tensor) -> Rows:
    """`rows` with the first of the real ones in place of each that is not; `real` is boolean `[k]`."""

    def repeated(column: tf.Tensor) -> tf.Tensor:
        # Without weights the real rows come first.
        one = tf.gather(column, tf.argmax(tf.cast(real, tf.int32), 0)[tf.newaxis]) if len(rows) == 3 else column[:1]
        return tf.where(real if column.shape.rank == 1 else real[:, tf.newaxis], column, one)

    return repeated(rows[0]), repeated(rows[1]), *rows[2:]
