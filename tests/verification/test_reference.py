"""The specification itself: against exact fractions, textbook formulas, and what the package keeps as it is."""

from __future__ import annotations

import itertools
import math
import runpy
import sys
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
from conftest import REPO

from tapedist import reference as ref
from tapedist.data import permutations
from tapedist.data.orders import split_sizes
from tapedist.data.synthetic import SyntheticSource
from tapedist.regression.curvature import curvature
from tapedist.training.model import LinearModel

DTYPES = ["float32", "float64"]
FULL = 2**14  # Terms of one float64 sum.


def _rows(n: int, d: int, *, weighted: bool = False, seed: int = 0) -> ref.Chunk:
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, d)) * 10.0 ** g.integers(-3, 4, d) + g.normal(size=d)
    y = x.sum(axis=1) + g.normal(size=n)
    return x, y, g.random(n) * (g.random(n) < 0.8) if weighted else None


def _cut(chunk: ref.Chunk, order: np.ndarray, edges: list[int]) -> list[ref.Chunk]:
    """The rows in another order, as chunks that end at `edges`."""
    pieces = itertools.pairwise([0, *edges, len(order)])
    return [tuple(None if c is None else c[order[a:b]] for c in chunk) for a, b in pieces]


def _exact(values: np.ndarray) -> Fraction:
    return sum(map(Fraction, np.ravel(values).tolist()), Fraction(0))


@pytest.mark.parametrize(
    ("number", "power"), [(1.0, 1.0), (1.0000000000000002, 2.0), (3.0, 4.0), (2.0**-300, 2.0**-300)]
)
def test_pow2_is_the_least_power_not_below(number, power):
    assert ref.pow2(number) == power


def test_trim_rounds_to_nearest_halves_away_from_zero():
    assert ref.trim(1 + 2.0**-26, 27) == 1 + 2.0**-25
    assert ref.trim(-(1 + 2.0**-26), 27) == -(1 + 2.0**-25)
    assert ref.trim(1 + 2.0**-27, 27) == 1.0
    assert ref.trim(0.1, 0) == 0.1


def test_trimmed_factors_have_exact_products():
    g = np.random.default_rng(0)
    x, r, at = g.normal(size=1000).astype(np.float32).astype(float), g.normal(size=1000), g.normal(size=1000)
    for a, b in ((x, ref.trim(at, 24)), (x, ref.trim(r, 27)), (ref.trim(r, 27), ref.trim(r, 27))):
        assert all(Fraction(p) * Fraction(q) == Fraction(p * q) for p, q in zip(a.tolist(), b.tolist(), strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_folded_adds_halves(count):
    terms = list(np.random.default_rng(count).normal(size=count))
    padded = terms + [0.0] * ((1 << (count - 1).bit_length()) - count)
    while len(padded) > 1:
        half = len(padded) // 2
        padded = [a + b for a, b in zip(padded[:half], padded[half:], strict=True)]
    assert ref.folded(np.array(terms)) == padded[0]


@pytest.mark.parametrize("bound", [1.0, 0.9999999, 2.0**-160, 3e38, 2.0**500])
@pytest.mark.parametrize("levels", [1, 2])
def test_sums_are_exact_on_their_grids_in_any_order(bound, levels):
    g = np.random.default_rng(1)
    cases = [np.full(FULL, bound), -np.full(FULL, bound), bound * g.uniform(-1, 1, FULL + 1),
             bound * 10.0 ** -g.uniform(0, 30, 100)]  # fmt: skip
    for terms in cases:
        column = terms[:, np.newaxis]
        sums = ref.integers(column, bound, levels)
        shuffled = column[g.permutation(len(column))]
        assert (sums == ref.integers(shuffled[:40], bound, levels) + ref.integers(shuffled[40:], bound, levels)).all()
        steps = [Fraction(float(ref.pow2(bound))) * Fraction(2) ** (14 - 53 - 40 * level) for level in range(levels)]
        found = sum(int(k) * step for k, step in zip(sums[:, 0], steps, strict=True))
        assert abs(found - _exact(terms)) <= len(terms) * steps[-1] / 2
        # Python's integers become float64 by one rounding.
        assert float(ref.value(sums, bound)[0]) == sum(
            float(int(k) * s) for k, s in zip(sums[:, 0], steps, strict=True)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
@pytest.mark.parametrize("weighted", [False, True])
def test_totals_have_no_order_and_are_near_the_exact_gradient(dtype, loss, weighted):
    problem = ref.Problem(dtype=dtype, loss=loss, delta=0.7)
    raw = _rows(999, 3, weighted=weighted)
    chunk = ref.as_trained(*raw, problem.kind)
    limits = ref.bounds(ref.ranges([raw]), problem.kind)
    theta = np.array([0.9, 1.1, 1.0, 0.3])
    whole = ref.totals(theta, [chunk], limits, problem)
    parts = ref.totals(theta, _cut(chunk, np.random.default_rng(5).permutation(999), [1, 700]), limits, problem)
    assert whole.rows == parts.rows == 999
    assert all((a == b).all() for a, b in zip(whole[1:], parts[1:], strict=True))
    loss_sum, weight, sums = ref.loss_and_gradient_sums(theta, whole, limits, problem)

    x, y, w = chunk
    w = np.ones(999) if w is None else w
    r = [sum((Fraction(a) * Fraction(b) for a, b in zip([*row, 1.0], theta, strict=True)), -Fraction(t))
         for row, t in zip(x.tolist(), y.tolist(), strict=True)]  # fmt: skip
    delta = Fraction(0.7)
    slope = {
        "squared": lambda v: 2 * v,
        "absolute": lambda v: (v > 0) - (v < 0),
        "huber": lambda v: max(-delta, min(delta, v)),
    }
    value = {"squared": lambda v: v * v, "absolute": abs,
             "huber": lambda v: v * v / 2 if abs(v) <= delta else delta * (abs(v) - delta / 2)}  # fmt: skip
    terms = [Fraction(a) * slope[loss](v) for a, v in zip(w.tolist(), r, strict=True)]
    losses = [Fraction(a) * value[loss](v) for a, v in zip(w.tolist(), r, strict=True)]
    relative = 1e-13 if dtype == "float64" else 3e-7
    for j in range(4):
        column = [t * Fraction(float(x[i, j]) if j < 3 else 1.0) for i, t in enumerate(terms)]
        assert abs(Fraction(float(sums[j])) - sum(column)) <= relative * sum(map(abs, column))
    assert loss_sum == pytest.approx(float(sum(losses)), rel=relative)
    assert weight == float(_exact(w))


def test_bounds_hold_every_residual():
    """Rows and parameters whose products are all at their bound."""
    for dtype, d in itertools.product(DTYPES, [1, 5, 300]):
        problem = ref.Problem(dtype=dtype)
        row = np.random.default_rng(d).normal(size=(1, d)) * 10.0 ** np.arange(d)[::-1].clip(0, 20)
        raw = (row, np.array([-3.0]), None)
        limits = ref.bounds(ref.ranges([raw]), problem.kind)
        theta = np.append(np.sign(row[0]), 2.0)
        of_loss, of_gradient = ref.term_bounds(theta, limits, problem)
        residual = float(np.abs(row.astype(dtype)).astype(float).sum()) + 5
        assert residual**2 <= of_loss <= residual**2 * (1 + 1e-5)
        assert (np.append(np.abs(row[0]), 1.0) * residual <= of_gradient * (1 + 1e-7)).all()


def test_rows_of_weight_zero_do_not_count():
    problem = ref.Problem()
    x, y, w = np.array([[1.0], [1e30], [2.0]]), np.array([1.0, np.nan, 2.0]), np.array([1.0, 0.0, 0.5])
    found = ref.ranges([(x, y, w)])
    assert found.high.tolist() == [2.0, 2.0]
    assert found.weight == 1.0
    chunk = ref.as_trained(x, y, w, problem.kind)
    limits = ref.bounds(found, problem.kind)
    sums = ref.loss_and_gradient_sums(np.zeros(2), ref.totals(np.zeros(2), [chunk], limits, problem), limits, problem)
    assert sums[:2] == (3.0, 1.5)
    assert sums[2].tolist() == [-6.0, -4.0]


def test_ranges_of_no_rows_are_zeros():
    found = ref.ranges([(np.ones([2, 3]), np.ones(2), np.zeros(2))])
    assert found.low.tolist() == found.high.tolist() == [0.0] * 4
    assert found.weight == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["denormal", "zero column", "one row", "weights", "far apart", "no weight"])
def test_edges(dtype, case):
    """What is summed is finite and, rounded as it is, right."""
    g = np.random.default_rng(3)
    x, w = g.normal(size=(1 if case == "one row" else 500, 2)), None
    y = x @ [2.0, -1.0]
    if case == "denormal":
        x, y = x * [1e-37, 1e-39], y * 1e-38
    elif case == "zero column":
        x = x * [0.0, 1.0]
    elif case == "weights":
        w = np.where(g.random(500) < 0.3, 0.0, 10.0 ** -g.uniform(0, 30, 500))
    elif case == "no weight":
        w = np.zeros(500)
    elif case == "far apart":
        x, y = x * [1e15, 1e-15], y * 1e-15
    problem = ref.Problem(dtype=dtype)
    limits = ref.bounds(ref.ranges([(x, y, w)]), problem.kind)
    chunk = ref.as_trained(x, y, w, problem.kind)
    theta = np.array([0.5, -0.25, 0.125])
    found = ref.totals(theta, [chunk], limits, problem)
    loss, weight, sums = ref.loss_and_gradient_sums(theta, found, limits, problem)
    a, b, c = chunk
    c = np.ones(len(b)) if c is None else c
    r = a @ theta[:2] + theta[2] - b
    assert loss == pytest.approx(float((c * r * r).sum()), rel=1e-6)
    assert weight == pytest.approx(float(c.sum()), rel=1e-15)
    sizes = np.abs(2 * (c * r)) @ np.column_stack([np.abs(a), np.ones(len(b))])
    assert (np.abs(sums - 2 * (c * r) @ np.column_stack([a, np.ones(len(b))])) <= 1e-6 * sizes + 1e-300).all()


@pytest.mark.parametrize("theta", [1e40, np.inf, np.nan])
def test_residuals_that_could_leave_the_range_mean_divergence(theta):
    limits = ref.Bounds(np.ones(1), 1.0, None)
    with pytest.raises(ref.Diverged):
        ref.totals(np.array([theta, 0.0]), [], limits, ref.Problem())


def test_standard_units():
    x, y = ref.standardized(
        np.array([[3.0, 5.0]], np.float32), np.array([7.0]), center=np.array([1.0, 5.0]), factor=np.array([0.5, 0.0]),
        target_center=2.0,
    )  # fmt: skip
    assert x.tolist() == [[1.0, 0.0]]
    assert y.tolist() == [5.0]


def _textbook(name: str, problem: ref.Problem, theta: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The optimisers as their papers write them, with powers of the betas."""
    theta, v, m = theta.copy(), np.zeros_like(theta), np.zeros_like(theta)
    factors = np.append(np.ones(len(theta) - 1), 0.0)
    for t, data in enumerate(gradients, start=1):
        g = data + 2 * problem.l2 * factors * theta
        if name == "sgd":
            theta -= problem.rate * g
        elif name in ("momentum", "nesterov"):
            v = problem.momentum * v - problem.rate * g
            theta += problem.momentum * v - problem.rate * g if name == "nesterov" else v
        elif name == "adam":
            m = problem.beta_1 * m + (1 - problem.beta_1) * g
            v = problem.beta_2 * v + (1 - problem.beta_2) * g**2
            rate = problem.rate * math.sqrt(1 - problem.beta_2**t) / (1 - problem.beta_1**t)
            theta -= rate * m / (np.sqrt(v) + problem.epsilon)
        else:
            rate = 1 / (1 / problem.rate + problem.curvature * max(t - problem.hold, 0))
            theta -= rate * problem.metric @ g
    return theta


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "metric"])
def test_updates_are_those_of_the_textbooks(name):
    g = np.random.default_rng(7)
    metric = g.normal(size=(3, 3))
    problem = ref.Problem(
        optimizer=name, rate=0.1, l2=0.01, hold=3, curvature=0.5, metric=metric @ metric.T, dtype="float64"
    )
    theta = g.normal(size=3)
    sums = list(g.normal(size=(8, 3)))
    expected = _textbook(name, problem, theta, [s / 7 for s in sums])
    slots = ref.first_slots(3, problem)
    for step, s in enumerate(sums):
        theta, slots = ref.update(theta, slots, s, 7.0, problem, step=step)
    np.testing.assert_allclose(theta, expected, rtol=1e-12)


def test_the_penalty_leaves_the_bias_alone():
    assert ref.penalty(np.array([3.0, 4.0, 5.0]), ref.Problem(l2=0.5)) == 12.5
    assert ref.penalty(np.array([3.0, 4.0]), ref.Problem(l2=0.5, fit_intercept=False)) == 12.5


def test_no_weight_moves_nothing():
    theta = np.array([1.0, 2.0])
    assert ref.update(theta, np.zeros([0, 2]), np.zeros(2), 0.0, ref.Problem())[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("batch", [None, 300, 64])
@pytest.mark.parametrize("shuffle", ["none", "batches", "rows"])
def test_training_finds_the_truth(batch, shuffle):
    g = np.random.default_rng(2)
    x = g.normal(size=(300, 2))
    y = x @ [1.5, -2.0] + 0.5
    problem = ref.Problem(dtype="float64", rate=0.2)
    limits = ref.bounds(ref.ranges([(x, y, None)]), problem.kind)
    start = ref.initial_parameters(3, init="zeros", seed=0)
    if batch is None:
        steps = ref.full_batch(lambda: [(x[:7], y[:7], None), (x[7:], y[7:], None)], start, limits, problem)
    else:
        steps = ref.mini_batch(
            lambda rows: (x[rows], y[rows], None), start, limits, problem,
            num_rows=300, batch_size=batch, shuffle=shuffle, seed=4,
        )  # fmt: skip
    last = next(itertools.islice(steps, 199, None))
    assert last.step == 200
    np.testing.assert_allclose(last.theta, [1.5, -2.0, 0.5], atol=1e-12)


def test_one_batch_of_all_rows_is_a_full_batch():
    x, y, w = _rows(200, 2, weighted=True)
    problem = ref.Problem(dtype="float64", optimizer="adam", loss="huber")
    limits = ref.bounds(ref.ranges([(x, y, w)]), problem.kind)
    rows = ref.as_trained(x, y, w, problem.kind)
    whole = ref.full_batch(lambda: [rows], np.zeros(3), limits, problem)
    batches = ref.mini_batch(
        lambda numbers: tuple(c[numbers] for c in rows),
        np.zeros(3),
        limits,
        problem,
        num_rows=200,
        batch_size=500,
        shuffle="rows",
        seed=9,
    )
    for a, b in itertools.islice(zip(whole, batches, strict=False), 20):
        assert ref.digest(a.theta) == ref.digest(b.theta)
        assert (a.loss_sum, a.weight) == (b.loss_sum, b.weight)


def test_a_loss_a_million_times_the_first_means_divergence():
    x, y = np.ones([4, 1]), np.array([0.0, 1.0, 0.0, 1.0])
    problem = ref.Problem(rate=5.0)
    limits = ref.bounds(ref.ranges([(x, y, None)]), problem.kind)
    steps = ref.full_batch(lambda: [(x, y, None)], np.zeros(2), limits, problem)
    with pytest.raises(ref.Diverged, match="diverged after"):
        list(itertools.islice(steps, 20))


def _exact_moments(x: np.ndarray, y: np.ndarray, w: np.ndarray | None):
    columns = [[Fraction(v) for v in column] for column in np.column_stack([x, y]).T.tolist()]
    w = [Fraction(v) for v in (np.ones(len(y)) if w is None else w).tolist()]
    total = sum(w)
    means = [sum(map(Fraction.__mul__, w, c)) / total for c in columns]
    centred = [[sum(v * (a - p) * (b - q) for v, a, b in zip(w, c, e, strict=True))
                for e, q in zip(columns, means, strict=True)] for c, p in zip(columns, means, strict=True)]  # fmt: skip
    return total, means, centred


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_near_the_exact_ones_in_any_order(dtype, weighted, offset):
    kind = ref.KINDS[dtype]
    x, y, w = _rows(300, 2, weighted=weighted)
    raw = (x + offset, y, w)
    columns = ref.columns_of(ref.ranges([raw]), kind)
    chunk = ref.as_trained(*raw, kind)
    sums = ref.moment_integers([chunk], columns)
    parts = [ref.moment_integers([part], columns) for part in _cut(chunk, np.arange(300)[::-1], [1, 150])]
    assert (sums == parts[0] + parts[1] + parts[2]).all()
    found = ref.moments(sums, columns)
    total, means, centred = _exact_moments(*chunk)
    assert found.sum_weights == pytest.approx(float(total), rel=1e-15)
    deviations = np.sqrt(np.diag(np.array(centred, float)) / float(total))
    assert (np.abs(found.means - np.array(means, float)) <= 1e-15 * (np.abs(found.means) + deviations)).all()
    scale = np.sqrt(np.multiply.outer(np.diag(found.centred), np.diag(found.centred)))
    assert (np.abs(found.centred - np.array(centred, float)) <= 1e-14 * scale).all()
    assert (found.centred == found.centred.T).all()


def test_moments_of_small_integers_are_rounded_once():
    """Nothing is left out of their products, so that the results are the exact ones, rounded."""
    g = np.random.default_rng(4)
    x, y = g.integers(-9, 9, (257, 3)).astype(float), g.integers(-9, 9, 257).astype(float)
    for w in (None, g.integers(0, 4, 257) / 4.0):
        columns = ref.columns_of(ref.ranges([(x, y, w)]), ref.KINDS["float32"])
        found = ref.moments(ref.moment_integers([(x, y, w)], columns), columns)
        total, means, centred = _exact_moments(x, y, w)
        assert found.sum_weights == float(total)
        assert found.means.tolist() == [float(mean) for mean in means]
        assert found.centred.tolist() == [[float(v) for v in row] for row in centred]


@pytest.mark.parametrize("value", [0.0, 1e-40, 12345.678, -3e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_column_has_no_spread(value, dtype):
    kind = ref.KINDS[dtype]
    x, y = np.full([50, 1], value), np.arange(50.0)
    columns = ref.columns_of(ref.ranges([(x, y, None)]), kind)
    found = ref.moments(ref.moment_integers([ref.as_trained(x, y, None, kind)], columns), columns)
    assert found.means[0] == ref.as_dtype(value, kind)
    assert found.centred[0].tolist() == [0.0, 0.0]


def test_moments_of_one_row_and_of_none():
    columns = ref.columns_of(ref.Ranges(np.array([2.0, 5.0]), np.array([2.0, 5.0]), 1.0), ref.KINDS["float32"])
    row = (np.array([[2.0]]), np.array([5.0]), np.array([1.0]))
    found = ref.moments(ref.moment_integers([row], columns), columns)
    assert (found.sum_weights, found.means.tolist(), found.centred.tolist()) == (1.0, [2.0, 5.0], [[0.0] * 2] * 2)
    empty = ref.moments(ref.moment_integers([(row[0], row[1], np.zeros(1))], columns), columns)
    assert (empty.sum_weights, empty.centred.tolist()) == (0.0, [[0.0] * 2] * 2)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_epochs_on_moments_follow_the_rows(fit_intercept):
    x, y, w = _rows(400, 3, weighted=True)
    x = x / x.std(axis=0)
    problem = ref.Problem(dtype="float64", fit_intercept=fit_intercept, rate=0.05, l2=0.01, optimizer="momentum")
    found = ref.ranges([(x, y, w)])
    limits, columns = ref.bounds(found, problem.kind), ref.columns_of(found, problem.kind)
    rows = ref.as_trained(x, y, w, problem.kind)
    form = ref.quadratic_form(ref.moments(ref.moment_integers([rows], columns), columns), fit_intercept=fit_intercept)
    start = ref.initial_parameters(3 + fit_intercept, init="normal", seed=1)
    pairs = zip(ref.full_batch(lambda: [rows], start, limits, problem), ref.moment_epochs(form, start, problem))  # noqa: B905
    for by_rows, by_moments in itertools.islice(pairs, 30):
        np.testing.assert_allclose(by_moments.theta, by_rows.theta, rtol=1e-10)
        assert by_moments.loss_sum == pytest.approx(by_rows.loss_sum / by_rows.weight, rel=1e-10)


def test_the_optimum_of_dependent_columns_is_one_of_them():
    g = np.random.default_rng(8)
    x = g.normal(size=(100, 2))
    x = np.column_stack([x, x[:, 0] + x[:, 1], np.full(100, 3.0)])
    columns = ref.columns_of(ref.ranges([(x, x[:, 2], None)]), ref.KINDS["float64"])
    form = ref.quadratic_form(
        ref.moments(ref.moment_integers([(x, x[:, 2], None)], columns), columns), fit_intercept=True
    )
    np.testing.assert_allclose(x @ form.optimum[:4] + form.optimum[4], x[:, 2], atol=1e-12)
    assert form.least == pytest.approx(0, abs=1e-25)
    assert form.optimum[2:4].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_singular_values_keep_their_digits(count):
    """Of a matrix that is well conditioned but for the units of its columns."""
    g = np.random.default_rng(count)
    orthogonal = np.linalg.qr(g.normal(size=(count + 3, count)))[0]
    units = 10.0 ** g.integers(-9, 9, count)
    np.testing.assert_allclose(np.sort(ref.singular_values(orthogonal * units)), np.sort(units), rtol=1e-13)
    matrix = g.normal(size=(count + 3, count))
    np.testing.assert_allclose(
        np.sort(ref.singular_values(matrix))[::-1], np.linalg.svd(matrix, compute_uv=False), rtol=1e-12
    )


def test_columns_of_equal_length_are_rotated_by_45_degrees():
    found = np.sort(ref.singular_values(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])))
    np.testing.assert_allclose(found, [1.0, np.sqrt(3)], rtol=1e-15)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_auto_rate_of_features_far_from_zero(offset):
    """The smallest eigenvalue is below the rounding of the Hessian, but not flat."""
    moments = ref.Moments(100.0, np.array([offset, 0.0]), np.array([[100.0, 0.0], [0.0, 1.0]]))
    rate = ref.auto_rate(moments, fit_intercept=True, l2=np.zeros(1))
    trace = 2 + offset * offset
    assert rate == pytest.approx(1 / trace, rel=1e-8)


def test_auto_rate_leaves_flat_directions_out():
    covariance = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    assert ref.auto_rate(ref.Moments(1.0, np.zeros(3), covariance), fit_intercept=True, l2=np.zeros(2)) == 0.166666667


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_auto_rate_is_that_of_the_curvature(fit_intercept):
    x, y, w = _rows(500, 3, weighted=True)
    columns = ref.columns_of(ref.ranges([(x, y, w)]), ref.KINDS["float64"])
    found = ref.moments(ref.moment_integers([ref.as_trained(x, y, w, ref.KINDS["float64"])], columns), columns)
    l2 = np.array([0.1, 0.2, 0.0])
    rate = ref.auto_rate(found, fit_intercept=fit_intercept, l2=l2)
    assert rate == pytest.approx(curvature(**found._asdict(), fit_intercept=fit_intercept, l2=l2).auto_rate, rel=1e-8)
    assert rate == float(f"{rate:.8e}")


def test_auto_rate_of_features_without_curvature():
    flat = ref.Moments(5.0, np.zeros(2), np.zeros([2, 2]))
    assert ref.auto_rate(flat, fit_intercept=False, l2=np.zeros(1)) == 1.0
    assert ref.auto_rate(flat, fit_intercept=True, l2=np.zeros(1)) == 0.5


SETTINGS = {"m": (2.0, -0.5, 0.25), "c": 1.0, "mean": 0.5, "std": 2.0, "noise_std": 0.1}


@pytest.mark.parametrize("first", [0, 2**32 - 50, 2**40])
def test_synthetic_rows_are_those_of_the_generator(first):
    source = SyntheticSource(n_samples=2**41, test_fraction=0.0, seed=11, **SETTINGS)
    rows = np.arange(first, first + 1000)
    x, y = (column.numpy() for column in source.take("train", tf.constant(rows)))
    own_x, own_y = ref.synthetic_rows(11, rows, **SETTINGS)
    assert own_x.dtype == own_y.dtype == np.float32
    np.testing.assert_allclose(own_x, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own_y, y, rtol=1e-5, atol=1e-5)


def test_synthetic_normals_are_normal():
    z = ref.normals(0, np.arange(2**17), 3).astype(float)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert (np.abs((z**power).mean(axis=0) - moment) < 5 * np.sqrt(variance / 2**17)).all()
    assert np.abs(np.corrcoef(z.T) - np.eye(3)).max() < 5 / np.sqrt(2**17)


def test_normals_end_below_their_bound():
    extremes = np.array([0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], np.uint32)
    tiny = (np.arange(-2000, 2000, dtype=np.int64) * 2**7).astype(np.uint32)
    word0, word1 = (words.ravel() for words in np.meshgrid(extremes, np.concatenate([extremes, tiny])))
    found = np.abs(np.stack(ref.synthetic.box_muller(word0, word1)))
    assert 6.66 < found.max() <= ref.LARGEST_NORMAL


@pytest.mark.parametrize(
    "changed", [{}, {"std": 0.0}, {"mean": -1e6, "std": 1e-3}, {"m": (3e5,) * 3, "noise_std": 0.0}]
)
def test_synthetic_ranges_hold_all_rows(changed):
    settings = SETTINGS | changed
    x, y = ref.synthetic_rows(1, np.arange(20_000), **settings)
    found, seen = ref.synthetic_ranges(**settings), ref.ranges([(x, y, None)])
    assert (found.low <= seen.low).all()
    assert (seen.high <= found.high).all()


@pytest.mark.parametrize("size", [1, 2, 3, 100, 5000, 2**20 + 7, 2**40])
def test_permutations_are_those_of_the_package(size):
    indices = np.random.default_rng(0).integers(0, size, 3000)
    assert np.array_equal(ref.permuted(indices, size, 7, 2, 5), permutations.permuted(indices, size, 7, 2, 5))
    if size <= 5000:
        assert sorted(ref.permuted(np.arange(size), size, 3)) == list(range(size))


@pytest.mark.parametrize("shuffle", ["none", "batches", "rows"])
def test_batches_are_those_of_the_package(shuffle):
    n, batch, window = 1003, 100, 256
    for step in range(25):
        rows = ref.batch_rows(step, num_rows=n, batch_size=batch, shuffle=shuffle, seed=5, window=window)
        epoch, number = divmod(step, 11)
        if shuffle == "batches":
            number = int(permutations.epoch_batches(np.array([number]), num_batches=11, seed=5, epochs=epoch)[0])
        expected = np.arange(number * batch, min(n, number * batch + batch))
        if shuffle == "rows":
            expected = permutations.epoch_rows(expected, num_rows=n, seed=5, epoch=epoch, window=window)
        assert np.array_equal(rows, expected), f"step {step}"


def test_first_parameters_and_splits_are_those_of_the_package():
    for init in ("zeros", "normal"):
        model = LinearModel(4)
        assert np.array_equal(ref.initial_parameters(5, init=init, seed=3), model.initial_parameters(init=init, seed=3))
    for n, fraction in [(100, 0.29), (7, 0.5), (10**17, 0.1), (5, 0.0)]:
        assert ref.split_sizes(n, fraction) == split_sizes(n, fraction)


def test_errors_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["arithmetic_errors.py", "--rows=40"])
    runpy.run_path(str(REPO / "scripts/arithmetic_errors.py"), run_name="__main__")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 14
    for dtype, name, loss, _, gradient, _, covariances, _ in rows:
        most = 1e-9 if dtype == "float64" else 1e-2
        assert float(loss) < most, name
        assert float(gradient) < most, name
        assert float(covariances) < 1e-15, name
