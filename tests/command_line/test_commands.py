"""`evaluate`, `predict`, `report`, `export` on finished runs: right numbers, one set of bits, harmless refusals."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_tables
import pytest
from conftest import Finished
from pyarrow import parquet

from tapedist import cli
from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.results.result import TrainResult
from tapedist.run.train import train

FEATURES = own_tables.NAMES[:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    return own_tables.write_csv(folder / "t.csv", own_tables.columns())


@pytest.fixture(scope="module")
def result(folder: Path, table: Path) -> TrainResult:
    return train(
        TrainConfig(
            data=table, target="price", features=FEATURES, learning_rate=0.3, num_epochs=300, dtype="float64",
            run_dir=folder / "run",
        )
    )  # fmt: skip


@pytest.fixture
def run(result: TrainResult, tmp_path: Path) -> Path:
    """A run folder that the test may spoil."""
    assert result.run_dir
    return Path(shutil.copytree(result.run_dir, tmp_path / "run"))


def rows() -> np.ndarray:
    table = own_tables.columns()
    return np.stack([table[name] for name in FEATURES], axis=1)


def refused(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 2) -> str:
    assert cli.main([str(word) for word in words]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_no_intervals_without_degrees_of_freedom(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = np.random.default_rng(0).normal(size=6)

    def words(rows: int) -> list[str]:
        np.savez(tmp_path / "t.npz", a=a[:rows], b=a[:rows] ** 2, twice=2 * a[:rows], y=np.arange(rows) ** 2.0)
        return [f"--data={tmp_path / 't.npz'}", f"--run_dir={tmp_path / f'run{rows}'}"]

    settings = ["--target=y", "--num_epochs=5", "--plots=false", "--learning_rate=0.01", "--test_fraction=0"]
    interval = [f"--output={tmp_path / 'p.csv'}", "--interval"]
    few = words(3)
    assert cli.main(["train", *few, *settings]) == 0
    capsys.readouterr()
    line = refused(capsys, "predict", *few, *interval)
    assert line.endswith(
        "no standard errors: 3 rows leave none for 3 parameters; train on more rows, or drop --interval"
    )
    assert cli.main(["predict", *few, f"--output={tmp_path / 'q.csv'}"]) == 0
    enough = words(6)
    assert cli.main(["train", *enough, *settings]) == 0
    assert cli.main(["predict", *enough, *interval]) == 0
    with open(tmp_path / "p.csv") as file:
        assert all(float(row["low"]) < float(row["high"]) for row in csv.DictReader(file))


def test_predictions_have_one_set_of_bits(result: TrainResult, run: Path, table: Path, tmp_path: Path):
    import tensorflow as tf

    expected = result.predict(rows())
    by_one = np.concatenate([result.predict(rows()[i : i + 1]) for i in range(40)])
    assert np.array_equal(by_one, expected[:40])

    assert cli.main(["predict", f"--run_dir={run}", f"--data={table}", f"--output={tmp_path / 'p.parquet'}"]) == 0
    assert np.array_equal(parquet.read_table(tmp_path / "p.parquet")["prediction"].to_numpy(), expected)
    assert cli.main(["predict", f"--run_dir={run}", f"--data={table}", f"--output={tmp_path / 'p.csv'}"]) == 0
    with open(tmp_path / "p.csv") as file:
        assert [float(row["prediction"]) for row in csv.DictReader(file)] == expected.tolist()

    assert cli.main(["export", f"--run_dir={run}"]) == 0
    served = tf.saved_model.load(str(run / "export" / "1")).signatures["serving_default"]
    for size in (1, 7, 1000):
        pieces = [rows()[i : i + size] for i in range(0, len(rows()) if size > 1 else 50, size)]
        predicted = np.concatenate([served(x=tf.constant(piece))["prediction"].numpy() for piece in pieces])
        assert np.array_equal(predicted, expected[: len(predicted)]), size


@pytest.mark.parametrize("d", [1, 2, 5, 64])
def test_served_bits_for_many_features(d: int, tmp_path: Path):
    import tensorflow as tf

    from tapedist.regression.prediction import predict_rows
    from tapedist.results.export import export_model
    from tapedist.storage.model_file import FittedModel

    random = np.random.default_rng(d)
    weights, center = (random.normal(size=d) * 10.0 ** random.integers(-8, 8, d) for _ in range(2))
    model = FittedModel(
        weights=weights, bias=0.1, center=center, bias_at_center=0.3, parameters=np.append(weights, 0.1), digest="",
        feature_names=("x",) * d, target_name="y", content={},
    )  # fmt: skip
    served = tf.saved_model.load(str(export_model(model, tmp_path))).signatures["serving_default"]
    for count in (0, 1, 3, 17, 1000):
        x = random.normal(size=(count, d))
        x[1:2] = np.nan
        found = served(x=tf.constant(x))["prediction"].numpy()
        assert np.array_equal(found, predict_rows(x, weights, 0.3, center), equal_nan=True)


def test_the_exported_graph_takes_rows_of_its_width_only(run: Path):
    import tensorflow as tf

    assert cli.main(["export", f"--run_dir={run}"]) == 0
    loaded = tf.saved_model.load(str(run / "export" / "1"))
    served = loaded.signatures["serving_default"]
    right = rows()[:5]
    wrong = [np.c_[np.arange(5.0), right], right[:, :2], right[:, :1], right[0], right[np.newaxis], np.zeros((0, 4))]
    for x in wrong:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"expected shape \[\?,3\]"):
            served(x=tf.constant(x))
    for dtype in (np.float32, np.int64):
        with pytest.raises(tf.errors.InvalidArgumentError, match="expected to be a double tensor"):
            served(x=tf.constant(right.astype(dtype)))

    expected = served(x=tf.constant(right))["prediction"].numpy()
    for shape in (None, [None, None], [None, 3], [5, 3]):
        call = tf.function(lambda x: served(x=x)["prediction"], input_signature=[tf.TensorSpec(shape, tf.float64)])
        assert np.array_equal(call(tf.constant(right)), expected)
    for shape in (None, [None, None]):
        call = tf.function(lambda x: served(x=x)["prediction"], input_signature=[tf.TensorSpec(shape, tf.float64)])
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"expected shape \[\?,3\]"):
            call(tf.constant(wrong[0]))


def test_export_counts_versions_and_leaves_nothing_half_done(run: Path):
    assert cli.main(["export", f"--run_dir={run}"]) == 0
    (run / "export" / "7").mkdir()
    (run / "export" / "7" / "theirs").write_text("x")
    assert cli.main(["export", f"--run_dir={run}"]) == 0
    assert sorted(path.name for path in (run / "export").iterdir()) == ["1", "7", "8"]


def test_intervals_are_those_of_statsmodels(run: Path, result: TrainResult, table: Path, tmp_path: Path):
    sm = pytest.importorskip("statsmodels.api")
    output = tmp_path / "p.parquet"
    words = ["--interval", "--level=0.9"]
    assert cli.main(["predict", f"--run_dir={run}", f"--data={table}", f"--output={output}", *words]) == 0
    predicted = parquet.read_table(output).to_pydict()

    from tapedist.data.tables.table import open_table

    training = open_table(str(table), target="price", features=FEATURES)
    x, y = training.rows("train", np.arange(training.num_rows("train")))
    frame = sm.OLS(y, sm.add_constant(x, prepend=False)).fit()
    intervals = frame.get_prediction(sm.add_constant(rows(), prepend=False)).conf_int(obs=True, alpha=0.1)
    np.testing.assert_allclose(np.stack([predicted["low"], predicted["high"]], axis=1), intervals, rtol=1e-6)


def test_evaluate_on_its_own_rows_and_on_a_table(
    run: Path, result: TrainResult, table: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["evaluate", f"--run_dir={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"MSE {result.train_loss:.6g}," in next(line for line in lines if line.startswith("train: "))
    assert f"MSE {result.test_loss:.6g}," in next(line for line in lines if line.startswith("test: "))
    assert cli.main(["evaluate", f"--run_dir={run}", f"--data={table}"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    y = own_tables.columns()["price"]
    residuals = y - result.predict(rows())
    r2 = 1 - (residuals**2).sum() / ((y - y.mean()) ** 2).sum()
    wanted = f"RMSE {np.sqrt((residuals**2).mean()):.6g}, MAE {np.abs(residuals).mean():.6g}, R2 {r2:.6g}"
    assert line == f"data: 700 rows, MSE {(residuals**2).mean():.6g}, {wanted}"


def test_evaluate_takes_weights_and_leaves_out_bad_rows(
    run: Path, result: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = own_tables.columns()
    lines = own_tables.write_csv(tmp_path / "bad.csv", content).read_text().splitlines()
    lines[3] = lines[3].replace(",", ",oops", 1)
    (tmp_path / "bad.csv").write_text("\n".join(lines))
    words = ["evaluate", f"--run_dir={run}", f"--data={tmp_path / 'bad.csv'}"]
    line = refused(capsys, *words)
    assert line.endswith("use --on_bad_rows=drop"), "the fix must be one that the command knows"
    assert cli.main([*words, "--on_bad_rows=drop", "--weight=times"]) == 0
    w = np.delete(content["times"], 2)
    residuals = np.delete(content["price"] - result.predict(rows()), 2)
    shown = capsys.readouterr().out
    assert f"data: {(w > 0).sum()} rows, MSE {(w * residuals**2).sum() / w.sum():.6g}," in shown
    assert "columns not used" not in shown
    refusal = refused(capsys, "evaluate", f"--run_dir={run}", "--on_bad_rows=drop")
    assert "--on_bad_rows=drop: needs --data" in refusal


def test_mean_absolute_error_of_the_training_rows(run: Path, table: Path, result: TrainResult):
    from tapedist.data.tables.table import open_table

    training = open_table(str(table), target="price", features=FEATURES)
    x, y = training.rows("train", np.arange(training.num_rows("train")))
    learned = json.loads((run / "model.json").read_text())["statistics"]["learned"]
    assert learned["mae"] == pytest.approx(np.abs(y - result.predict(x)).mean(), rel=1e-12)
    assert "MAE, training rows" in (run / "report.html").read_text()


def test_report_is_made_by_training_and_made_again(run: Path, capsys: pytest.CaptureFixture[str]):
    page = (run / "report.html").read_text()
    assert "area" in page
    assert not [word for word in ("://", "src=", "url(", "@import", "<script") if word in page]
    (run / "report.html").unlink()
    assert cli.main(["report", f"--run_dir={run}"]) == 0
    again = (run / "report.html").read_text()
    assert again.count("<figure") == page.count("<figure")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("env.json", None, "env.json: cannot be read"),
        ("env.json", "{", "env.json: cannot be read"),
        ("metrics.jsonl", None, "metrics.jsonl: cannot be read"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl: line 1 is damaged; restore it, or train again"),
        ("metrics.jsonl", "what is this\n", "metrics.jsonl: line 1 is damaged"),
    ],
)
def test_report_refuses_files_that_are_damaged(
    file: str, content: str | None, says: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    assert says in refused(capsys, "report", f"--run_dir={run}", code=3)


def test_report_and_evaluate_when_the_rows_are_others(
    folder: Path, run: Path, table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    moved = own_tables.write_csv(tmp_path / "t.csv", own_tables.columns(seed=4))
    flags = (run / "config.flags").read_text().replace(str(table), str(moved))
    (run / "config.flags").write_text(flags)
    assert "its rows have changed since it was trained" in refused(capsys, "evaluate", f"--run_dir={run}", code=3)
    assert cli.main(["report", f"--run_dir={run}"]) == 0
    assert "its rows have changed" in capsys.readouterr().err
    page = (run / "report.html").read_text()
    assert "no predictions are drawn" in page
    assert page.count("The rows could not be read again.") == 3
    assert "No rows were held out" not in page


def test_rows_from_python_are_not_said_to_have_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = ArraySource(rows(), own_tables.columns()["price"], test_rows=100)
    train(TrainConfig(num_epochs=1, run_dir=tmp_path / "run"), source=source)
    assert "rows from Python, full batch" in (tmp_path / "run" / "report.html").read_text()
    assert cli.main(["report", f"--run_dir={tmp_path / 'run'}"]) == 0
    said = "it was trained from Python on a source of its own, which no command can open"
    assert capsys.readouterr().err == f"tapedist: warning: the rows are left out of the report: {said}\n"
    assert f"{said}; evaluate by --data=PATH" in refused(capsys, "evaluate", f"--run_dir={tmp_path / 'run'}", code=3)


def test_dropped_rows_keep_their_numbers(run: Path, table: Path, tmp_path: Path):
    lines = table.read_text().splitlines()[:6]
    lines[3] = lines[3].replace(",", ",oops", 1)
    (tmp_path / "bad.csv").write_text("\n".join(lines))
    output = tmp_path / "p.parquet"
    words = [f"--run_dir={run}", f"--data={tmp_path / 'bad.csv'}", f"--output={output}"]
    assert cli.main(["predict", *words]) == 2
    assert not output.exists()
    assert cli.main(["predict", *words, "--on_bad_rows=drop"]) == 0
    assert parquet.read_table(output)["row"].to_pylist() == [0, 1, 3, 4]


def test_outputs_that_are_refused(run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy, there = tmp_path / "in.csv", tmp_path / "there.csv"
    shutil.copy(table, copy)
    there.write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to(copy)
    for output, says in [
        (copy, "is the table that is read"),
        (tmp_path / "link.csv", "is the table that is read"),
        (there, "--overwrite replaces it"),
        (tmp_path / "folder.csv", "is no regular file"),
        (tmp_path / "no" / "p.csv", "its folder does not exist"),
        (tmp_path / "p.txt", "must end in .csv or .parquet"),
        (tmp_path / "a\nb.csv", "must not hold control characters"),
    ]:
        line = refused(capsys, "predict", f"--run_dir={run}", f"--data={copy}", f"--output={output}")
        assert says in line
    assert there.read_text() == "mine"
    words = [f"--run_dir={run}", f"--data={copy}", f"--output={there}", "--overwrite"]
    assert cli.main(["predict", *words]) == 0
    assert len(there.read_text().splitlines()) == 701
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tapedist")]


def test_runs_that_are_refused(
    run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], result: TrainResult
):
    words = [f"--data={table}", f"--output={tmp_path / 'p.csv'}"]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"weights": [1.0]}))
    (tmp_path / "saved" / "variables").mkdir(parents=True)
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for place in ("model.pkl", "saved", "empty", "missing"):
        line = refused(capsys, "predict", f"--run_dir={tmp_path / place}", *words)
        assert line.startswith("tapedist: error: --run_dir=")
        assert "give a new" not in line, "advice for training"
    assert "--run_dir=: must name the folder" in refused(capsys, "export")

    content = json.loads((run / "model.json").read_text())
    for spoiled in ({**content, "weights": [1.0, 2.0, 3.0]}, {"weights": []}, {**content, "digest": "0"}, [], 3):
        (run / "model.json").write_text(json.dumps(spoiled))
        assert "train again" in refused(capsys, "predict", f"--run_dir={run}", *words, code=3)
    (run / "model.json").unlink()
    assert "holds no finished training" in refused(capsys, "predict", f"--run_dir={run}", *words)
    assert not (tmp_path / "p.csv").exists()


def test_tables_that_do_not_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "less.csv").write_text("area,rooms\n1,2\n")
    line = refused(capsys, "predict", f"--run_dir={run}", f"--data={tmp_path / 'less.csv'}", "--output=p.csv")
    assert line.endswith("less.csv: lacks age, which the run was trained on; present: area, rooms")
    line = refused(capsys, "evaluate", f"--run_dir={run}", f"--data={tmp_path / 'less.csv'}")
    assert "less.csv: lacks age, price, which" in line


def test_columns_of_a_table_are_found_by_name(run: Path, result: TrainResult, tmp_path: Path):
    lines = ["note,age,when,area,rooms"]
    lines += [f"q,{age},2024-01-01,{area},{count}" for area, count, age in rows()[:30].tolist()]
    (tmp_path / "other.csv").write_text("\n".join(lines) + "\n")
    output = tmp_path / "p.parquet"
    words = [f"--run_dir={run}", f"--data={tmp_path / 'other.csv'}", f"--output={output}"]
    assert FEATURES == ("area", "rooms", "age")
    assert cli.main(["predict", *words]) == 0
    assert np.array_equal(parquet.read_table(output)["prediction"].to_numpy(), result.predict(rows()[:30]))


def test_predict_needs_no_tensorflow(run: Path, table: Path, run_python: Callable[..., Finished]):
    script = "import sys; from tapedist.cli import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    finished = run_python("-c", script, "predict", f"--run_dir={run}", f"--data={table}", "--output=p.csv")
    assert finished.code == 0, finished.err
    assert "tensorflow" not in finished.out.split()
