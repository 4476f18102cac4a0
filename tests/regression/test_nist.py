"""Certified reference sets for linear regression: the NIST Statistical Reference Datasets (StRD).

`nist/*.csv` hold the published observations as printed, `nist/certified.json` the published solutions. NIST solved
them in 500-digit arithmetic; here the copy proves itself, because its exact rational solution prints the certified
digits. LRE is the number of correct decimal digits, `-log10 |value - certified| / |certified|`.
"""

from __future__ import annotations

import csv
import json
import math
import pathlib
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tapedist.regression.least_squares import LeastSquares, from_moments, least_squares

_FOLDER = pathlib.Path(__file__).parents[1] / "nist"
_CERTIFIED = json.loads((_FOLDER / "certified.json").read_text())

# Digits that the float64 rounding of the printed decimals (and of the powers of x) leaves: (coefficients, the rest).
# Measured; NIST's own numbers have 15. Filip's design amplifies a rounding of 1e-16 by its condition of 1e9.
_DIGITS = {"filip": (7, 7)}
# Less than 1e-7 of Filip's last power is left beside the others: as R's `lm`, a fit without a tolerance leaves it out.
_TOLERANCE = {"filip": 1e-10}


def _observations(name: str) -> tuple[list[list[str]], list[str]]:
    with (_FOLDER / f"{name}.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    return [row[1:] for row in rows], [row[0] for row in rows]


def _design(name: str, number: type) -> tuple[list[list[Any]], list[Any]]:
    """Features without the column of ones, and targets; powers of x as the set's model says."""
    degree = _CERTIFIED[name]["degree"]
    x, y = _observations(name)
    if degree > 1:
        return [[number(row[0]) ** k for k in range(1, degree + 1)] for row in x], [number(v) for v in y]
    return [[number(v) for v in row] for row in x], [number(v) for v in y]


def _lre(value: float | None, certified: str) -> float:
    assert value is not None
    error = abs(value - float(certified)) / (abs(float(certified)) or 1.0)
    return 15.0 if error == 0 else min(15.0, -math.log10(error))


def _fit(name: str) -> LeastSquares:
    x, y = map(np.array, _design(name, float))
    return least_squares(
        lambda: [(x[:7], y[:7], None), (x[7:], y[7:], None)],
        num_features=x.shape[1],
        fit_intercept=_CERTIFIED[name]["intercept"],
        tolerance=_TOLERANCE.get(name, 1e-7),
    )


def _reached(fit: LeastSquares, name: str) -> dict[str, float]:
    certified = _CERTIFIED[name]
    # NIST lists the intercept first.
    entries = fit.coefficients[-1:] + fit.coefficients[:-1] if fit.fit_intercept else fit.coefficients
    pairs = zip(entries, certified["estimates"], certified["standard_errors"], strict=True)
    found = [(_lre(c.optimum, estimate), _lre(c.standard_error, error)) for c, estimate, error in pairs]
    return {
        "estimates": min(f[0] for f in found),
        "standard errors": min(f[1] for f in found),
        "residual std": _lre(fit.residual_std, certified["residual_std"]),
        "R2": _lre(fit.r2, certified["r2"]),
    }


def _exact_solution(x: list[list[Fraction]], y: list[Fraction]) -> tuple[list[Fraction], list[Fraction], Fraction]:
    """Coefficients, the diagonal of `(X'X)**-1` and the residual sum of squares, by Gauss-Jordan over the rationals."""
    p = len(x[0])
    rows = [
        [sum((r[i] * r[j] for r in x), Fraction(0)) for j in range(p)]
        + [sum((r[i] * t for r, t in zip(x, y, strict=True)), Fraction(0))]
        + [Fraction(int(i == j)) for j in range(p)]
        for i in range(p)
    ]
    for k in range(p):
        rows[k] = [v / rows[k][k] for v in rows[k]]
        for i in range(p):
            if i != k:
                rows[i] = [a - rows[i][k] * b for a, b in zip(rows[i], rows[k], strict=True)]
    beta = [row[p] for row in rows]
    fitted = [sum((a * b for a, b in zip(r, beta, strict=True)), Fraction(0)) for r in x]
    rss = sum(((t - f) ** 2 for t, f in zip(y, fitted, strict=True)), Fraction(0))
    return beta, [rows[i][p + 1 + i] for i in range(p)], rss


def _root(value: Fraction) -> Fraction:
    with localcontext() as context:
        context.prec = 60
        return Fraction((Decimal(value.numerator) / Decimal(value.denominator)).sqrt())


@pytest.mark.parametrize("name", _CERTIFIED)
def test_the_data_files_prove_themselves(name: str) -> None:
    certified = _CERTIFIED[name]
    x, y = _design(name, Fraction)
    if certified["intercept"]:
        x = [[Fraction(1), *row] for row in x]
    beta, inverse, rss = _exact_solution(x, y)
    variance = rss / (len(y) - len(beta))
    mean = sum(y) / len(y) if certified["intercept"] else 0
    pairs = [
        *zip(beta, certified["estimates"], strict=True),
        *zip((_root(v * variance) for v in inverse), certified["standard_errors"], strict=True),
        (_root(variance), certified["residual_std"]),
        (1 - rss / sum((v - mean) ** 2 for v in y), certified["r2"]),
    ]
    for exact, printed in pairs:
        # Half a unit of the fifteenth digit, and a little for NIST's own truncations.
        assert abs(exact - Fraction(printed)) <= abs(Fraction(printed)) * Fraction(6, 10**15), (
            name,
            float(exact),
            printed,
        )


@pytest.mark.parametrize("name", _CERTIFIED)
def test_certified_digits(name: str) -> None:
    reached = _reached(_fit(name), name)
    for_estimates, for_the_rest = _DIGITS.get(name, (12, 12))
    assert reached.pop("estimates") >= for_estimates, reached
    assert min(reached.values()) >= for_the_rest, reached


def test_filip_is_aliased_as_by_lm() -> None:
    """The others have the least squares of a polynomial of degree nine, as R prints it with NA for the tenth power."""
    x, y = map(np.array, _design("filip", float))
    fit = least_squares(lambda: [(x, y, None)], num_features=10)
    assert fit.left_out() == ["x10 is a linear combination of x1, x2, x3, x4, x5, x6, x7, x8 and 1 more"]
    exact, inverse, rss = _exact_solution(
        [[Fraction(1), *map(Fraction, row[:9])] for row in x.tolist()], [*map(Fraction, y)]
    )
    for entry, value, unit in zip(fit.coefficients[:9], exact[1:], inverse[1:], strict=True):
        assert entry.optimum == pytest.approx(float(value), rel=1e-10)
        assert entry.standard_error == pytest.approx(float(_root(unit * rss / (len(y) - 10))), rel=1e-10)
    assert fit.degrees_of_freedom == len(y) - 10


@pytest.mark.parametrize("name", ["norris", "noint1", "noint2", "longley", "filip", "wampler3"])
def test_plain_moments_keep_nine_digits_or_decline(name: str) -> None:
    x, y = map(np.array, _design(name, float))
    table = np.column_stack([x, y])
    centred = table - table.mean(axis=0)
    fit = from_moments(
        num_rows=len(y),
        sum_weights=float(len(y)),
        means=table.mean(axis=0),
        centred=centred.T @ centred,
        fit_intercept=_CERTIFIED[name]["intercept"],
    )
    assert (fit is None) == (name in ("filip", "wampler3"))
    if fit is not None:
        assert min(_reached(fit, name).values()) >= 9


def _table(name: str, path: pathlib.Path) -> pathlib.Path:
    """The set as a user would write it: a CSV with a column a feature, powers of x included."""
    x, y = _design(name, float)
    rows = [["y", *(f"x{j}" for j in range(1, len(x[0]) + 1))]]
    rows += [[repr(value) for value in (t, *row)] for row, t in zip(x, y, strict=True)]
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("standardize", ["true", "false"])
@pytest.mark.parametrize("name", [name for name in _CERTIFIED if name not in _TOLERANCE])
def test_certified_digits_of_a_run(name: str, standardize: str, tmp_path: pathlib.Path) -> None:
    """What `train` stores and prints has the digits of the optimum, however far gradient descent is from it."""
    from tapedist.config import TrainConfig
    from tapedist.run.train import train

    config = TrainConfig(
        data=_table(name, tmp_path / "t.csv"), target="y", dtype="float64", test_fraction=0, num_epochs=2,
        learning_rate=1e-30, fit_intercept=_CERTIFIED[name]["intercept"], standardize=standardize, plots=False,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    result = train(config)
    stored = json.loads((tmp_path / "run" / "model.json").read_text())["statistics"]
    for_estimates, for_the_rest = _DIGITS.get(name, (12, 12))
    certified, coefficients = _CERTIFIED[name], stored["coefficients"]
    entries = coefficients[-1:] + coefficients[:-1] if certified["intercept"] else coefficients
    for entry, estimate, error in zip(entries, certified["estimates"], certified["standard_errors"], strict=True):
        assert _lre(entry["optimum"], estimate) >= for_estimates
        assert _lre(entry["standard_error"], error) >= for_the_rest
    assert _lre(stored["residual_std"], certified["residual_std"]) >= for_the_rest
    assert _lre(stored["r2"], certified["r2"]) >= for_the_rest
    assert any("Least squares: " in line for line in result.lines())


def test_gradient_descent_reaches_ten_digits_on_norris(tmp_path: pathlib.Path) -> None:
    from tapedist.config import TrainConfig
    from tapedist.run.train import train

    for engine in ("moments", "stream"):
        config = TrainConfig(
            data=_table("norris", tmp_path / "t.csv"), target="y", dtype="float64", test_fraction=0, num_epochs=200,
            learning_rate=0.4, full_batch_engine=engine, standardize="true",
        )  # fmt: skip
        result = train(config)
        intercept, slope = _CERTIFIED["norris"]["estimates"]
        assert _lre(float(result.weights[0]), slope) >= 10
        assert _lre(result.bias, intercept) >= 10


def test_filip_has_every_digit_that_its_rounded_powers_leave() -> None:
    """The 7 digits are the data's: against the exact solution of the float64 numbers themselves, 11 are right."""
    x, y = _design("filip", float)
    exact, inverse, rss = _exact_solution([[Fraction(1), *map(Fraction, row)] for row in x], [Fraction(v) for v in y])
    fit = _fit("filip")
    for entry, value, unit in zip(fit.coefficients, exact[1:] + exact[:1], inverse[1:] + inverse[:1], strict=True):
        assert entry.standard_error is not None
        assert entry.optimum == pytest.approx(float(value), rel=1e-11)
        assert entry.standard_error == pytest.approx(float(_root(unit * rss / (len(y) - 11))), rel=1e-11)
