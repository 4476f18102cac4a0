"""Makes the HTML page of a run from its files and rows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tapedist.config import SYNTHETIC_FIELDS, TrainConfig
from tapedist.data.source import Source, row_arrays
from tapedist.regression.inference import Coefficient
from tapedist.regression.least_squares import left_out
from tapedist.regression.prediction import Metrics, evaluate_rows, predict_rows
from tapedist.regression.summary import AGREES_WITHIN
from tapedist.results.console import format_rate
from tapedist.results.report import Parameter, ReportData, render
from tapedist.results.report_charts import Predictions, thinned
from tapedist.text import number
from tapedist.training.interfaces import Row

_MOST_ROWS = 4096
_UNREADABLE = "The rows could not be read again."
_NOT_LINEAR = "The model is not linear, so its predictions are not drawn."


def report_page(
    *,
    config: TrainConfig,
    model: Mapping[str, Any],
    environment: Mapping[str, Any],
    history: Sequence[Row],
    source: Source | None,
) -> str:
    """The page of a run.

    Args:
        config: its settings.
        model: the content of `model.json`.
        environment: the content of `env.json`.
        history: its rows of metrics.
        source: its rows; None if they cannot be read any more, and then no predictions are drawn.
    """
    fit = model.get("statistics") or {}
    sample, custom_source = _sample(source, model), bool(model.get("own_source"))
    notes = [f"Training stopped before its last epoch: {model['stopped']}."] if model.get("stopped") else []
    notes += [f"{_UNREADABLE[:-1]}, so no predictions are drawn."] if source is None else []
    return render(
        ReportData(
            title=f"{model['target_name'] or 'y'} by {_features(model['feature_names'])}",
            subtitle=_subtitle(config, environment, custom_source=custom_source),
            advice=model.get("advice") or (),
            highlights=_highlights(model, fit),
            notes=notes,
            parameters=_parameters(model, fit, source),
            learned_is_optimum=_agrees(fit),
            left_out=_left_out(fit),
            quality=_quality(fit, sample, model),
            history=history,
            predictions=sample,
            no_predictions=_UNREADABLE if source is None else _NOT_LINEAR,
            settings=_settings(config, custom_source=custom_source),
            changed=_changed(config, custom_source=custom_source, custom_model=not model["weights"]),
            speed=_speed(history),
            digest=model["digest"],
            environment={name: _plain(value) for name, value in environment.items()},
        )
    )


def _settings(config: TrainConfig, *, custom_source: bool) -> dict[str, object]:
    """The settings that apply to these rows."""
    of_table = ("target", "features", "weight", "on_bad_rows")
    without: tuple[str, ...]
    if custom_source:
        without = ("data", "test_fraction", "split", *SYNTHETIC_FIELDS, *of_table)
    else:
        without = SYNTHETIC_FIELDS if config.from_table else of_table
    names = (field.name for field in dataclasses.fields(config))
    return {name: getattr(config, name) for name in names if name not in without}


def _changed(config: TrainConfig, *, custom_source: bool, custom_model: bool) -> list[str]:
    """Names of the settings that differ from their defaults for these rows."""
    unset = TrainConfig(data=config.data).resolved(custom_rows=custom_source, custom_model=custom_model)
    names = [field.name for field in dataclasses.fields(config)]
    changed = [name for name in names if getattr(config, name) != getattr(unset, name)]
    return ["data", *changed] if config.from_table else changed


def _features(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} features"


def _subtitle(config: TrainConfig, environment: Mapping[str, Any], *, custom_source: bool) -> str:
    how = "full batch" if config.mode == "full_batch" else f"mini-batches of {config.batch_size} rows"
    replicas = environment.get("replicas")
    where = f" on {replicas} replica{'s' * (replicas != 1)}" if replicas else ""
    rows = "rows from Python" if custom_source else config.data
    return f"{rows}, {how}, {config.optimizer}{where}, tapedist {environment.get('tapedist', '')}".strip()


def _highlights(model: Mapping[str, Any], fit: Mapping[str, Any]) -> dict[str, object]:
    learned = fit.get("learned") or {}
    facts = {
        "test loss": model.get("test_loss"),
        "training loss": model.get("train_loss"),
        f"R2{'' if fit.get('fit_intercept', True) else ' about 0'} at the optimum": fit.get("r2"),
        "from the optimum (SE)": learned.get("max_standard_errors"),
        "rows": fit.get("num_rows"),
        "epochs": model.get("epochs"),
    }
    # Large print has room for four digits; all of them are further down.
    return {
        name: number(value, padded=True) if isinstance(value, float) else value
        for name, value in facts.items()
        if value is not None
    }


def _parameters(model: Mapping[str, Any], fit: Mapping[str, Any], source: Source | None) -> list[Parameter]:
    weights = model["weights"]
    if not weights:
        return []
    names = [*model["feature_names"], *(["intercept"] if len(model["parameters"]) > len(weights) else [])]
    rows = [*(fit.get("coefficients") or []), *({} for _ in names)]
    truth = source.truth if source else None
    true = [*truth[0], truth[1]] if truth else [None] * len(names)
    return [
        Parameter(
            name=name,
            learned=learned,
            optimum=_coefficient(row),
            off_by=row.get("off_by"),
            truth=true_value,
            truth_off_by=row.get("truth_off_by"),
        )
        for name, learned, row, true_value in zip(names, model["parameters"], rows, true, strict=False)
    ]


def _coefficient(row: Mapping[str, Any]) -> Coefficient | None:
    """The optimum in a row of `model.json`; version 0.1 has another name for it."""
    if not row:
        return None
    known = {field.name: row.get(field.name) for field in dataclasses.fields(Coefficient)}
    return Coefficient(**{**known, "optimum": row.get("optimum", row.get("estimate"))})


def _left_out(fit: Mapping[str, Any]) -> list[str]:
    aliased = fit.get("aliased") or []
    return left_out([entry["name"] for entry in aliased], [entry["because"] for entry in aliased])


def _agrees(fit: Mapping[str, Any]) -> bool:
    far = (fit.get("learned") or {}).get("max_standard_errors")
    return far is not None and far <= AGREES_WITHIN


def _quality(fit: Mapping[str, Any], sample: Predictions | None, model: Mapping[str, Any]) -> dict[str, object]:
    names = {
        "r2": "R2", "adjusted_r2": "adjusted R2", "residual_std": "residual std. deviation", "rmse": "RMSE",
        "loss": "smallest loss", "condition_number": "condition number", "degrees_of_freedom": "degrees of freedom",
    }  # fmt: skip
    facts: dict[str, object] = {f"{words} (optimum)": fit[name] for name, words in names.items() if name in fit}
    if fit and not fit.get("fit_intercept", True):
        about = {"R2 about 0 (optimum)": fit["r2"], "R2 about the mean (optimum)": fit.get("r2_about_mean")}
        facts = about | {name: value for name, value in facts.items() if name != "R2 (optimum)"}
    mae = (fit.get("learned") or {}).get("mae")
    if mae is not None:
        facts["MAE, training rows"] = mae
    return facts | _errors(sample, model)


def _errors(sample: Predictions | None, model: Mapping[str, Any]) -> dict[str, object]:
    """Errors of the model on the rows that are shown; on all test rows where training measured it."""
    facts: dict[str, object] = {}
    if model.get("loss") == "squared" and model.get("test_loss") is not None:
        facts["RMSE, test split"] = math.sqrt(model["test_loss"])
    errors = _sample_errors(sample)
    if errors and sample:
        drawn, total = len(sample.actual), sample.total or 0
        rows = f"{sample.split} split"
        if total > _MOST_ROWS:
            rows = f"sample of {drawn:,} of {total:,} {sample.split} rows"
        all_r2 = errors.all_r2(fit_intercept=model.get("fit_intercept", True))
        known = {"RMSE": errors.rmse, "MAE": errors.mae, **all_r2}
        if sample.split == "test" and facts:
            del known["RMSE"]  # Of all of them it is known already, and a sample's would only differ.
        facts |= {f"{name}, {rows}": value for name, value in known.items()}
    return facts


def _sample_errors(sample: Predictions | None) -> Metrics | None:
    if sample is None:
        return None
    # Predictions as the one feature of a model of weight 1, so that the errors are those of `evaluate`.
    return evaluate_rows([(sample.predicted[:, np.newaxis], sample.actual, sample.weights)], np.ones(1), 0.0)


def _speed(history: Sequence[Row]) -> dict[str, object]:
    rates = [row.examples_per_sec for row in history if row.split == "train" and row.examples_per_sec]
    if not rates:
        return {}
    seconds = history[-1].seconds - history[0].seconds
    return {"median": format_rate(statistics.median(rates)), "between first and last row (s)": round(seconds, 3)}


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _predicted(x: np.ndarray, model: Mapping[str, Any]) -> np.ndarray:
    """Predictions of a linear model for rows; a `model.json` of 0.1 has no center."""
    center = np.asarray(model["center"]) if "center" in model else None
    return predict_rows(x, np.asarray(model["weights"]), model.get("bias_at_center", model["bias"]), center)


def _sample(source: Source | None, model: Mapping[str, Any]) -> Predictions | None:
    """Some thousand held-out rows, or training rows where none are held out, evenly spread; none of weight 0."""
    if source is None or not model["weights"]:
        return None
    split = "test" if source.num_rows("test") else "train"
    total = source.num_rows(split)
    x, y, w = row_arrays(source, split, thinned(total, _MOST_ROWS))
    if w is not None:
        x, y, w = x[w > 0], y[w > 0], w[w > 0]
    return Predictions(
        actual=y,
        predicted=_predicted(x, model),
        x=x[:, 0] if x.shape[1] == 1 else None,
        weights=w,
        split=split,
        total=total,
        feature_name=source.feature_names[0],
        target_name=source.target_name,
    )
