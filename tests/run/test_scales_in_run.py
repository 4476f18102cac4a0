"""Runs on numbers of extreme sizes: weights count in proportion only, losses are never below 0, R2 has one meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapedist import cli
from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.errors import InputError
from tapedist.run.train import train

_RANDOM = np.random.default_rng(11)
_X = _RANDOM.normal(size=(80, 2))
_Y = _X @ [2.0, -3.0] + 1 + 0.1 * _RANDOM.normal(size=80)
_W = _RANDOM.uniform(0.1, 1, size=80)
_SETTINGS: dict[str, Any] = {"learning_rate": "auto", "num_epochs": 200, "plots": False, "standardize": "true"}


def _table(path: Path, **columns: np.ndarray) -> Path:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [",".join(columns), *(",".join(map(repr, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _best(w: np.ndarray) -> np.ndarray:
    root = np.sqrt(w)[:, np.newaxis]
    return np.linalg.lstsq(root * np.column_stack([_X, np.ones(80)]), root[:, 0] * _Y, rcond=None)[0]


@pytest.mark.parametrize("settings", [{}, {"full_batch_engine": "stream"}, {"mode": "mini_batch"}], ids=str)
def test_a_power_of_two_in_the_weights_changes_no_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    if "mode" in settings:
        settings = {**settings, "learning_rate": 0.01, "batch_size": 16, "num_epochs": 5}
    digests = set()
    for power in (0, -140, 1000):
        w = np.ldexp(_W, power)
        data = _table(tmp_path / "t.csv", a=_X[:, 0], b=_X[:, 1], y=_Y, w=w)
        config = TrainConfig(data=data, target="y", weight="w", test_fraction=0, **{**_SETTINGS, **settings})
        result = train(config)
        arrays = TrainConfig(**{**_SETTINGS, **settings})
        digests |= {result.digest, train(arrays, source=ArraySource(_X, _Y, w)).digest}
        if not settings:
            np.testing.assert_allclose(result.parameters, _best(_W), rtol=1e-5)
            assert result.statistics
            assert result.statistics.fit.sum_weights == pytest.approx(np.ldexp(_W.sum(), power), rel=1e-12)
    assert len(digests) == 1


def test_weights_that_lose_their_digits_are_refused_and_larger_ones_work(tmp_path: Path, capsys: Any) -> None:
    words = ["train", "--target=y", "--weight=w", "--learning_rate=auto", "--test_fraction=0", "--num_epochs=200"]
    for scale, code in ((1e-310, 2), (1e-310 * 1e200, 0)):
        data = _table(tmp_path / "t.csv", a=_X[:, 0], b=_X[:, 1], y=_Y, w=_W * scale)
        assert cli.main([*words, f"--data={data}", f"--run_dir={tmp_path / f'run{code}'}"]) == code
        captured = capsys.readouterr()
        if code:
            assert "--weight=w: its largest weight is 9." in captured.err
            assert "multiply the column by a large number, which changes no result" in captured.err
            assert len(captured.err.splitlines()) == 1
    content = json.loads((tmp_path / "run0" / "model.json").read_text())
    np.testing.assert_allclose(content["parameters"], _best(_W), rtol=1e-5)
    small = np.full(80, 1e-40, np.float32)
    with pytest.raises(InputError, match=r"w: its largest weight is 9\.99995e-41; must be at least 1\.18e-38"):
        ArraySource(_X, _Y, small)
    ArraySource(_X, _Y, small * np.float32(1e30))


def test_weights_of_which_the_sum_overflows(tmp_path: Path, capsys: Any) -> None:
    w = _W / _W.max() * 1.7e308
    data = _table(tmp_path / "t.csv", a=_X[:, 0], b=_X[:, 1], y=_Y, w=w)
    folder = tmp_path / "run"
    for dtype in ("float32", "float64"):
        config = TrainConfig(data=data, target="y", weight="w", test_fraction=0, dtype=dtype, **_SETTINGS)
        np.testing.assert_allclose(train(config).parameters, _best(_W), rtol=1e-5)
    train(TrainConfig(data=data, target="y", weight="w", test_fraction=0, run_dir=folder, **_SETTINGS))
    content = json.loads((folder / "model.json").read_text(), parse_constant=pytest.fail)
    assert content["statistics"]["sum_weights"] is None
    assert cli.main(["evaluate", f"--run_dir={folder}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    errors = _X @ _best(_W)[:2] + _best(_W)[2] - _Y
    assert f"MSE {np.average(errors**2, weights=_W):.6g}" in line


@pytest.mark.parametrize("settings", [{}, {"eval_every_epochs": 10}, {"mode": "mini_batch", "learning_rate": 0.01}])
def test_a_test_split_that_weighs_nothing_has_no_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    columns = {"a": _X[:, 0], "b": _X[:, 1], "y": _Y}
    split = {"test_fraction": 0.25, "target": "y", "weight": "w"}
    from tapedist.data.tables.scan import HashSplit

    chosen = np.flatnonzero(HashSplit(0.25, 0).tests(0, 80))
    data = _table(tmp_path / "t.csv", **columns, w=np.where(np.isin(np.arange(80), chosen), 0.0, _W))
    folder = tmp_path / "run"
    result = train(TrainConfig(data=data, run_dir=folder, **{**_SETTINGS, **split, **settings}))
    assert result.test_loss is None
    assert not any("Test loss" in line for line in result.lines())
    assert cli.main(["report", f"--run_dir={folder}"]) == 0
    assert "NaN" not in (folder / "metrics.jsonl").read_text() + (folder / "report.html").read_text()
    assert json.loads((folder / "model.json").read_text(), parse_constant=pytest.fail)["test_loss"] is None
    assert cli.main(["evaluate", f"--run_dir={folder}"]) == 0


def test_r2_without_an_intercept_is_named_in_every_place(tmp_path: Path, capsys: Any) -> None:
    y = _Y + 5
    data = _table(tmp_path / "t.csv", a=_X[:, 0], b=_X[:, 1], y=y)
    folder = tmp_path / "run"
    config = TrainConfig(data=data, target="y", test_fraction=0, run_dir=folder, fit_intercept=False, **_SETTINGS)
    result = train(config)
    errors = ((_X @ result.weights - y) ** 2).sum()
    about_0, about_mean = 1 - errors / (y @ y), 1 - errors / ((y - y.mean()) ** 2).sum()
    both = f"R2 about 0 {about_0:.6g}", f"R2 about the mean {about_mean:.6g}"
    assert " | ".join(both) in "\n".join(result.lines())
    assert cli.main(["evaluate", f"--run_dir={folder}"]) == 0
    assert capsys.readouterr().out.strip().endswith(", ".join(both))
    assert cli.main(["report", f"--run_dir={folder}"]) == 0
    page = (folder / "report.html").read_text()
    for name in ("R2 about 0 (optimum)", "R2 about the mean (optimum)", "R2 about 0, train split"):
        assert f">{name}</th>" in page
    assert ">R2 (optimum)<" not in page


def test_a_loss_is_never_below_0_or_below_the_square_of_a_mean(tmp_path: Path) -> None:
    """More features than rows: the second moments have eigenvalues that rounding makes negative."""
    x = np.round(_RANDOM.normal(size=(10, 30)), 3)
    for seed in range(3):
        source = ArraySource(x, x[:, seed])
        config = TrainConfig(
            learning_rate="auto", num_epochs=200_000, dtype="float64", log_every_epochs=1000, init="normal", seed=seed,
            full_batch_engine="moments", plots=False,
        )  # fmt: skip
        result = train(config, source=source)
        losses = [row.loss for row in result.history]
        assert min(losses) >= 0
        assert min(losses) < 1e-13
        assert result.statistics
        mae, loss = result.statistics.mae, result.statistics.learned.loss
        assert mae is not None
        assert loss is not None
        assert loss >= mae**2


def test_microseconds_since_1970(tmp_path: Path) -> None:
    """The residual is not rounding: integers below 2**53 are not rounded."""
    time = np.arange(300)
    level = np.round(time + 0.3 * np.random.default_rng(5).normal(size=300), 3)
    data = _table(tmp_path / "t.csv", t_us=1_700_000_000_000_000 + time, level=level)
    result = train(TrainConfig(data=data, target="level", test_fraction=0, dtype="float64", **_SETTINGS))
    assert result.statistics
    fit, centred = result.statistics.fit, time - time.mean()
    slope = centred @ level / (centred @ centred)
    left = level - level.mean() - slope * centred
    std = np.sqrt(left @ left / 298)
    assert fit.weights[0] == pytest.approx(slope, rel=1e-12)
    assert fit.residual_std == pytest.approx(std, rel=1e-10)
    assert fit.coefficients[0].standard_error == pytest.approx(std / np.sqrt(centred @ centred), rel=1e-10)
    assert fit.r2 == pytest.approx(1 - left @ left / ((level - level.mean()) ** 2).sum(), rel=1e-12)
    mae, loss = result.statistics.mae, result.statistics.learned.loss
    assert mae is not None
    assert loss is not None
    assert loss >= mae**2
