"""Reproducible arithmetic: sums over rows in any order, products that no compiler fuses with an addition.

`docs/arithmetic.md` is the specification; everything here is IEEE binary64. A term of a sum is rounded to a grid, the
multiples of a power of two that follows from a bound on the terms. Up to `2**CAP` such terms add up without rounding in
any order, and their sum is a whole number of steps of the grid; whole numbers are added as int64. (Demmel and Nguyen,
"Fast reproducible floating-point summation", 2013, round to grids as well, and find their bound by a pass.)

Legend: `T` rows of a tile, `d` features, `P` parameters, `l` grids of a sum, `K` sums.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

CAP = 14  # A float64 sum takes at most 2**CAP terms: 53 bits of a sum leave 39 for the largest term.
SLACK = 1 + 2.0**-20  # Widens bounds by more than all roundings on the way to what they bound.
_GRID_BITS = 54 - CAP  # From one grid to the next: what a rounding leaves is half a step at most.
LOW_BITS = 27  # Of a number of steps, in the low one of two halves; see `halves`.
_MANTISSA = 52
_SCALARS = 24  # Up to so many sums, their last operations are scalars that XLA merges into other kernels.
MOST_ROWS = 2**20  # Rows of one `grid_sums`: 2**20 terms of at most 2**39 steps leave int64 four bits of room.


@dataclasses.dataclass(frozen=True)
class Kind:
    """Constants of the arithmetic that depend on the type of the rows.

    Attributes:
        dtype: of the rows.
        levels: grids of a gradient's sum.
        short: bits that a residual loses, so that its products with rows and with itself are exact.
        long: bits that parameters and weighted slopes lose, so that their products with rows are exact.
        least: smaller rows and parameters count as 0.
        floor: the least bound of a residual; it keeps every grid so far above the smallest numbers that machines which
            take those for 0 compute the same.
        most: a bound of a residual that is not below it means divergence.
    """

    dtype: tf.DType
    levels: int
    short: int
    long: int
    least: float
    floor: float
    most: float

    @classmethod
    def of(cls, dtype: tf.DType) -> Kind:
        return _FLOAT64 if dtype == tf.float64 else _FLOAT32


# Float32 rows have 24 bits: a parameter of 53 - 24 bits and a residual of 53 - 27 have exact products with them, and a
# residual of 26 bits with itself, so that a fused multiply-add changes nothing. Float64 products must be pinned.
_FLOAT32 = Kind(tf.float32, 1, 27, 24, 2.0**-126, 2.0**-80, 2.0**126)
_FLOAT64 = Kind(tf.float64, 2, 0, 0, 2.0**-250, 2.0**-160, 2.0**250)

# Steps of the grids of a sum, powers of two: `l` tensors, each with a step for each term.
Steps = Sequence[tf.Tensor]

# Of the context, because programs are traced inside of others, and in several threads of a process at once.
_ZERO: contextvars.ContextVar[tf.Tensor | None] = contextvars.ContextVar("zero", default=None)


@contextlib.contextmanager
def pinning(zero: tf.Tensor | None) -> Iterator[None]:
    """A context in which `pin` uses `zero`, an int64 tensor that is 0 when the program runs.

    It must be an argument of the compiled program, or made from one: a constant would be folded away, and the pins
    with it. None pins nothing, where all products are exact.
    """
    token = _ZERO.set(zero)
    try:
        yield
    finally:
        _ZERO.reset(token)


def pinning_unless(exact: bool) -> contextlib.AbstractContextManager[None]:
    """The current `pinning`, or none where products are `exact`."""
    return pinning(None if exact else _ZERO.get())


def pin(value: tf.Tensor) -> tf.Tensor:
    """Returns `value`, a rounded float64 product, quotient or root, so that no compiler fuses it with its consumer.

    Without a pin, whether a product that feeds an addition is rounded depends on the machine's fused multiply-add.
    Outside of `pinning` this is the identity.
    """
    zero = _ZERO.get()
    if zero is None:
        return value
    # XLA and LLVM do not see through the change of type and the XOR with a number that they do not know.
    return tf.bitcast(tf.bitwise.bitwise_xor(tf.bitcast(value, tf.int64), zero), tf.float64)


def times(a: Any, b: Any) -> tf.Tensor:
    """`a * b`, pinned, and so are the products of its gradient.

    Custom losses that are made of it and of `+`, `-`, `tf.minimum`, `tf.maximum`, `tf.abs` and `tf.where` have the
    same bits everywhere.

    Args:
        a: a tensor, or a value that converts to one.
        b: the same; of `a`'s type and shape, or a scalar.
    """
    a = tf.convert_to_tensor(a) if not tf.is_tensor(b) else tf.convert_to_tensor(a, b.dtype)
    b = tf.convert_to_tensor(b, a.dtype)
    return _pinned_product(a, b) if a.dtype == tf.float64 else a * b


@tf.custom_gradient
def _pinned_product(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _reduced(pin(upstream * b), a.shape), _reduced(pin(upstream * a), b.shape)

    return pin(a * b), gradient


def _reduced(gradient: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """The gradient by an operand that may have been a scalar; a scalar's is a sum, which no loss differentiates by."""
    return gradient if gradient.shape == shape else tf.reduce_sum(gradient)


def pow2(value: tf.Tensor) -> tf.Tensor:
    """The least power of two that is not below `value`, by its bits; `value` is positive and normal."""
    below = (1 << _MANTISSA) - 1
    # The sum carries into the exponent unless the mantissa was 0, which is a power of two already.
    bits = tf.bitcast(value, tf.int64) + below
    return tf.bitcast(tf.bitwise.bitwise_and(bits, tf.constant(~below, tf.int64)), tf.float64)


def flushed(value: tf.Tensor, least: float) -> tf.Tensor:
    """`value`, and 0 where it is smaller than `least`."""
    return tf.where(tf.abs(value) < tf.constant(least, tf.float64), tf.zeros_like(value), value)


def trimmed(value: tf.Tensor, bits: int) -> tf.Tensor:
    """`value` without its last `bits`, rounded to nearest, halves away from zero; its gradient is the identity's.

    By integers, because XLA:GPU drops a conversion to float32 and back.
    """
    return _trim(bits)(value) if bits else value


def _trim(bits: int) -> Callable[[tf.Tensor], tf.Tensor]:
    @tf.custom_gradient
    def trim(value: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        kept = tf.constant(-(1 << bits), tf.int64)
        # The bits below the sign are a magnitude: half a unit added to them rounds halves away from zero for either
        # sign, and a carry into the exponent is the next power of two.
        rounded = tf.bitwise.bitwise_and(tf.bitcast(value, tf.int64) + (1 << (bits - 1)), kept)
        return tf.bitcast(rounded, tf.float64), lambda upstream: upstream

    return trim


def trimmed_number(number: float, bits: int) -> float:
    """`trimmed` of a constant."""
    bit_pattern = np.float64(number).view(np.int64) + np.int64((1 << bits) >> 1)
    return float((bit_pattern & np.int64(-(1 << bits))).view(np.float64))


def folded(terms: tf.Tensor) -> tf.Tensor:
    """The sum along the first axis by halves: the second half is added to the first, until one term is left."""
    # Not `reduce_sum`, whose order is the compiler's. Halves are a few elementwise additions of vectors.
    count = terms.shape[0]
    length = 1 << max(0, count - 1).bit_length()
    if length > count:
        terms = tf.concat([terms, tf.zeros([length - count, *terms.shape[1:]], terms.dtype)], 0)
    while length > 1:
        length //= 2
        terms = terms[:length] + terms[length:]
    return terms[0]


def grid_steps(bound: tf.Tensor, levels: int) -> Steps:
    """Steps of grids for terms of at most `bound`, float64 `[K]`; each is `2**40` times finer than the one before."""
    first = pow2(bound) * 2.0 ** (CAP - 53)
    return [first * 2.0 ** (-_GRID_BITS * level) for level in range(levels)]


def absolute_steps(kind: Kind) -> Steps:
    """Steps `[]` of grids for terms of any size: below `_absolute_most`, to the smallest that count.

    Pinned, because XLA removes `(t + M) - M` where `M` is a constant.
    """
    top, levels = _absolute_window(kind)
    steps = [2.0 ** (top + CAP - 53 - _GRID_BITS * level) for level in range(levels)]
    return tf.unstack(pin(tf.constant(steps, tf.float64)))


def absolute_most(kind: Kind) -> float:
    """Terms must be smaller for `absolute_steps`."""
    return 2.0 ** _absolute_window(kind)[0]


def absolute_levels(kind: Kind) -> int:
    """The number of grids of `absolute_steps`."""
    return _absolute_window(kind)[1]


def _absolute_window(kind: Kind) -> tuple[int, int]:
    # Grids 40 bits apart: 7 of them go from 2**128, where float32 ends, down to its smallest numbers; 10 from 2**200 to
    # about 2**-200.
    return (128, 7) if kind.dtype == tf.float32 else (200, 10)


def on_grids(terms: tf.Tensor, steps: Steps) -> list[tf.Tensor]:
    """Rounds `terms` to each grid in turn; what a grid leaves goes to the next.

    Args:
        terms: float64.
        steps: of the grids; each as `terms`, or broadcast.
    """
    found = []
    for step in steps:
        # From 1 to 2 times 2**52 steps, the last place of a float64 is one step. The middle of that range leaves the
        # same room to terms of either sign, so that the processor's own rounding is the rounding to the grid.
        magic = (1.5 * 2.0**_MANTISSA) * step
        rounded = (terms + magic) - magic
        found.append(rounded)
        terms = terms - rounded
    return found


def exact_dot(
    columns: Sequence[tf.Tensor],
    copies: Sequence[tf.Tensor],
    kind: Kind,
    *,
    y_hat: tf.Tensor | None = None,
    real: tf.Tensor | None = None,
    short: bool = False,
) -> tf.Tensor:
    """Predictions of rows, `x_0 * w_0 + x_1 * w_1 + ... + bias`, added from left to right.

    Every row has its own copy of the parameters, so that a tape's gradients by them are the terms of a sum over rows,
    which `grid_sums` then adds.

    Args:
        columns: features of the rows, each `[...]`, of the rows' type.
        copies: float64 `[...]`, the parameters: of each of `columns`, then the bias if there is one.
        kind: of the rows.
        y_hat: the predictions, where they are known already.
        real: which rows count, boolean `[...]`; None for all.
        short: whether slopes of the loss are as short as a residual, and need no trimming.

    Returns:
        float64 `[...]`.
    """
    columns = [tf.cast(column, tf.float64) for column in columns]

    @tf.custom_gradient
    def dot(*copies: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            slopes = upstream if short else trimmed(upstream, kind.long)
            # Selected before the products: padding is zeros, but zero times a slope of infinity is NaN.
            slopes = slopes if real is None else tf.where(real, slopes, tf.zeros_like(slopes))
            return [*(_row_product(slopes * column, kind) for column in columns), slopes][: len(copies)]

        known = y_hat
        if known is None:
            known = chain(None, columns, copies, kind)
            # The bias is last: where columns are far from 0 it cancels most of the sum. As the first summand it would
            # give all rows the same rounding error, which does not average out.
            known = known + copies[-1] if len(copies) > len(columns) else known
        return known, gradient

    return dot(*copies)


def chain(total: tf.Tensor | None, columns: Sequence[tf.Tensor], weights: Sequence[tf.Tensor], kind: Kind) -> tf.Tensor:
    """`total + x_0 * w_0 + x_1 * w_1 + ...` from left to right; of float64."""
    for column, weight in zip(columns, weights, strict=False):
        product = _row_product(column * weight, kind)
        total = product if total is None else total + product
    return total


def _row_product(product: tf.Tensor, kind: Kind) -> tf.Tensor:
    """`product`, pinned unless it is exact, as it is of trimmed factors and float32 rows."""
    return product if kind.long else pin(product)


def grid_sums(
    terms: Sequence[tuple[Sequence[tf.Tensor], Steps]], counts: Sequence[tf.Tensor] = (), *, parts: int = 1
) -> tf.Tensor:
    """Sums over all rows on grids, as int64 numbers of steps, by one loop over the rows.

    The bits of `t + M`, where a step of the grid is the last place of `M`, are those of `M` plus the number of steps in
    `t`. Integers add up in any order, so that the compiler may vectorize one loop over all sums, which it must not do
    for floating-point numbers.

    Args:
        terms: groups of K terms, each float64 `[...]`, all of one shape, with the steps `[K]` of their grids.
        counts: int64 `[...]`, to be summed as they are.
        parts: equal parts along the first axis that are summed apart; each of up to `MOST_ROWS` rows.

    Returns:
        int64 `[sums]`, or `[sums, parts]`: of the counts, then of each group, grid by grid.
    """
    # Counts are summed as they are: the bits of their 0.0 are 0, and nothing is taken off.
    bits, zeros = [*counts], [tf.zeros([], tf.float64)] * len(counts)
    for group, steps in terms:
        for level, step in enumerate(steps):
            by_term = tf.unstack((1.5 * 2.0**_MANTISSA) * step)
            shifted = [term + zero for term, zero in zip(group, by_term, strict=True)]
            bits += [tf.bitcast(term, tf.int64) for term in shifted]
            zeros += by_term
            if level + 1 < len(steps):
                group = [term - (near - zero) for term, near, zero in zip(group, shifted, by_term, strict=True)]
    # The bits of `M` are taken off once for all rows rather than from each. The sum may overflow on the way: int64
    # wraps around, and the difference is right all the same. A row of padding has the term 0, the bits of `M` alone.
    rows, found = bits[0].shape.num_elements() // parts, _added(bits, int(parts > 1))
    if len(bits) <= _SCALARS:
        found = [total - rows * tf.bitcast(zero, tf.int64) for total, zero in zip(found, zeros, strict=True)]
        return tf.stack(found)
    # As one vector: each scalar by itself would be a kernel of its own, 66 of them with 64 features.
    of_zeros = rows * tf.bitcast(tf.stack(zeros), tf.int64)
    return tf.stack(found) - (of_zeros if parts == 1 else of_zeros[:, tf.newaxis])


def _added(columns: Sequence[tf.Tensor], first_axis: int) -> Sequence[tf.Tensor]:
    """The sum of each of the int64 `columns` `[...]` along all axes from `first_axis` on, by one loop."""
    # One reduction of many operands: XLA:CPU makes one loop of it with a register for each sum, where a `reduce_sum`
    # each would go over the rows as many times, about twice as slow.
    scalars = [tf.TensorSpec([], tf.int64)] * (2 * len(columns))
    return gen_xla_ops.xla_variadic_reduce_v2(
        inputs=columns,
        init_values=[tf.zeros([], tf.int64)] * len(columns),
        dimensions_to_reduce=list(range(first_axis, columns[0].shape.rank)),
        reducer=_pairwise_sum.get_concrete_function(*scalars),
    )


@tf.function(autograph=False)
def _pairwise_sum(*numbers: tf.Tensor) -> list[tf.Tensor]:
    half = len(numbers) // 2  # XLA passes all accumulators, then all operands.
    return [a + b for a, b in zip(numbers[:half], numbers[half:], strict=True)]


def integers(sums: Sequence[tf.Tensor], steps: Steps) -> tf.Tensor:
    """Converts sums of terms on each of their grids to int64 numbers of steps."""
    # Steps are powers of two, and so the quotients are exact.
    return tf.stack([tf.cast(total / step, tf.int64) for total, step in zip(sums, steps, strict=True)])


def halves(numbers: tf.Tensor) -> tf.Tensor:
    """Splits int64 numbers into `[2, ...]`, high and low, which add up for `2**40` rows without overflow."""
    # The shift is arithmetic, it rounds down: so `high * 2**27 + low` holds for negative numbers, too.
    low = tf.bitwise.bitwise_and(numbers, tf.constant((1 << LOW_BITS) - 1, tf.int64))
    return tf.stack([tf.bitwise.right_shift(numbers, tf.constant(LOW_BITS, tf.int64)), low])


def whole(totals: tf.Tensor) -> tf.Tensor:
    """Joins sums of halves `[2, K]` of small numbers, such as counts, to int64 `[K]`; `[K]` is returned as it is."""
    return totals if totals.shape.rank == 1 else totals[0] * (1 << LOW_BITS) + totals[1]


def value(totals: tf.Tensor, steps: Steps) -> tf.Tensor:
    """Sums as float64 `[...]`: each grid's rounded once, then added from the last on.

    Args:
        totals: int64, numbers of steps `[l, ...]`, or their halves `[2, l, ...]`.
        steps: of the grids, each `[...]`.
    """
    if totals.shape.rank == 1 + steps[0].shape.rank:
        numbers = [tf.cast(level, tf.float64) for level in tf.unstack(totals)]
    else:
        # The low sum's carry first, so that `low` is below 2**27 again and the only rounding is that of the sum.
        high = totals[0] + tf.bitwise.right_shift(totals[1], tf.constant(LOW_BITS, tf.int64))
        low = tf.bitwise.bitwise_and(totals[1], tf.constant((1 << LOW_BITS) - 1, tf.int64))
        numbers = tf.unstack(tf.cast(high, tf.float64) * 2.0**LOW_BITS + tf.cast(low, tf.float64))
    *first, total = (number * step for number, step in zip(numbers, steps, strict=True))
    # From the finest grid on: the small parts are joined before the large one rounds them.
    for part in reversed(first):
        total = part + total
    return total


def value_of(totals: np.ndarray) -> list[int]:
    """Sums of halves `[2, K]` as Python's integers."""
    return [(high << LOW_BITS) + low for high, low in zip(*totals.tolist(), strict=True)]
