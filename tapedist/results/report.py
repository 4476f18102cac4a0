"""One self-contained HTML page about a run: no outside resource, no script, readable on a phone and in print.

`render` takes plain values only, in a `ReportData`. Unknown ones are None or empty, and their column or line is left
out; an empty section has the reason.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import string
from collections.abc import Collection, Iterable, Mapping, Sequence

from tapedist.regression.inference import Coefficient
from tapedist.regression.summary import AGREES_WITHIN
from tapedist.results import report_charts as charts
from tapedist.results.report_charts import Predictions, text
from tapedist.text import to_text
from tapedist.training.interfaces import Row

MOST_COEFFICIENTS = 200
_MOST_REASONS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One learned parameter, in raw units.

    Attributes:
        name: the feature's name, or "intercept".
        learned: the learned value.
        optimum: the least-squares optimum with its standard error, t, p and interval.
        off_by: the distance of `learned` from it, in standard errors.
        truth: the value that made the rows, if known.
        truth_off_by: the optimum minus the truth, in standard errors.
    """

    name: str
    learned: float
    optimum: Coefficient | None = None
    off_by: float | None = None
    truth: float | None = None
    truth_off_by: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """The content of the page.

    Attributes:
        title: the page's title.
        subtitle: one line under it, such as when and on what the run was made.
        advice: sentences on how far training ended from its optimum; they come first.
        highlights: the few facts in large print; at most six look good.
        notes: important facts, such as that training stopped early.
        parameters: the learned parameters; empty if the model is not linear.
        learned_is_optimum: whether they agree with the optimum: then one column shows both.
        left_out: why features have no coefficient of their own.
        quality: goodness of fit by name, such as R2 and RMSE; None where undefined.
        history: rows of metrics.
        predictions: held-out rows with their predictions.
        no_predictions: why there are none, one sentence.
        settings: the run's settings by name.
        changed: names of the settings that differ from the defaults.
        speed: measured rates and times by name.
        digest: SHA-256 of the parameters.
        environment: versions and devices by name.
    """

    title: str
    subtitle: str = ""
    advice: Sequence[str] = ()
    highlights: Mapping[str, object] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    parameters: Sequence[Parameter] = ()
    learned_is_optimum: bool = False
    left_out: Sequence[str] = ()
    quality: Mapping[str, object] = dataclasses.field(default_factory=dict)
    history: Sequence[Row] = ()
    predictions: Predictions | None = None
    no_predictions: str = charts.NO_ROWS
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    changed: Collection[str] = ()
    speed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    digest: str = ""
    environment: Mapping[str, object] = dataclasses.field(default_factory=dict)


def render(report: ReportData) -> str:
    """The page as HTML text; the same data give the same text."""
    template = importlib.resources.files("tapedist.results").joinpath("report_template.html")
    body = "\n".join(_body(report))
    return string.Template(template.read_text(encoding="utf-8")).substitute(title=text(report.title), body=body)


def _body(report: ReportData) -> Iterable[str]:
    yield f"<header><h1>{text(report.title)}</h1>"
    if report.subtitle:
        yield f'<p class="quiet">{text(report.subtitle)}</p>'
    yield "</header>"
    yield from (f'<p class="note">{text(_sentence(advice))}</p>' for advice in report.advice)
    if report.highlights:
        tiles = (
            f'<div class="tile"><dt>{text(k)}</dt><dd>{_value(v)}</dd></div>' for k, v in report.highlights.items()
        )
        yield f'<dl class="tiles">{"".join(tiles)}</dl>'
    yield from (f'<p class="note">{text(note)}</p>' for note in report.notes)
    yield _section("coefficients", "Coefficients", _coefficient_table(report), long=True)
    yield '<div class="pair">'
    yield charts.loss(report.history)
    for chart in (charts.fit, charts.residuals, charts.quantiles):
        yield chart(report.predictions, report.no_predictions)
    yield "</div>"
    yield '<div class="pair">'
    yield _section("quality", "Goodness of fit", _facts(report.quality))
    yield _section("speed", "Speed", _facts(report.speed))
    yield "</div>"
    settings = {name: to_text(value) for name, value in report.settings.items()}
    caption = "Bold: differs from the default." if set(report.changed) & set(report.settings) else ""
    yield _section("settings", "Settings", _facts(settings, report.changed, caption), long=True)
    digest = f"<p><code>{text(report.digest)}</code></p>" if report.digest else _nothing("The run has no digest.")
    hint = "SHA-256 of the parameters. Runs with the same digest found the same parameters, bit for bit."
    yield _section("digest", "Digest", f'{digest}<p class="quiet">{hint}</p>')
    yield _section("environment", "Environment", _facts(report.environment), long=True)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _section(name: str, title: str, content: str, *, long: bool = False) -> str:
    kind = ' class="long"' if long else ""
    return f'<section id="{name}"{kind}><h2>{title}</h2>{content}</section>'


def _nothing(reason: str) -> str:
    return f'<p class="quiet">{reason}</p>'


def _value(value: object) -> str:
    """A fact as text: numbers to six digits with the exact value as a hint, words as they are."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '<span title="undefined">\N{EN DASH}</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "\N{MINUS SIGN}")
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_value, value))
    return text(str(value))


def _float(value: float, digits: int = 6) -> str:
    size = abs(value)
    if 1e-4 <= size < 1e7:
        shown = f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    else:
        shown = f"{value:.{digits}g}"
    shown = shown.replace("-", "\N{MINUS SIGN}")
    return f'<span title="{float(value)!r}">{shown}</span>'


def _facts(facts: Mapping[str, object], changed: Collection[str] = (), caption: str = "") -> str:
    if not facts:
        return _nothing("Nothing was recorded.")
    rows = []
    for name, value in facts.items():
        kind = ' class="changed"' if name in changed else ""
        rows.append(f'<tr{kind}><th scope="row">{text(name)}</th><td>{_value(value)}</td></tr>')
    below = f"<caption>{caption}</caption>" if caption else ""
    return f'<table class="facts">{below}<tbody>{"".join(rows)}</tbody></table>'


def _coefficient_table(report: ReportData) -> str:
    parameters = report.parameters
    if not parameters:
        return _nothing("The model is not linear, so it has no table of coefficients.")
    columns = _columns(parameters[:MOST_COEFFICIENTS], learned_is_optimum=report.learned_is_optimum)
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = []
    for place, parameter in enumerate(parameters[:MOST_COEFFICIENTS]):
        cells = (f'<td data-label="{name}">{column[place] or _value(None)}</td>' for name, column in columns.items())
        rows.append(f'<tr><th scope="row">{text(parameter.name)}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="numbers"><caption>{_coefficient_caption(report, columns)}</caption>'
        f'<thead><tr><th scope="col">parameter</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _columns(parameters: Sequence[Parameter], *, learned_is_optimum: bool) -> dict[str, list[str | None]]:
    """The table's columns by name, without empty ones."""

    def number(value: float | None, digits: int = 6) -> str | None:
        return None if value is None or math.isnan(value) else _float(value, digits)

    def gap(value: float | None) -> str | None:
        return None if value is None else f"{_float(value, 2)} SE"

    def interval(of: Coefficient) -> str | None:
        if of.low is None or of.high is None:
            return None
        return f"<span>{_float(of.low, 5)} to {_float(of.high, 5)}</span>"

    tiny = "&lt; 1e\N{MINUS SIGN}300"
    unknown = Coefficient("", math.nan, None, None, None, None, None)
    optima = [parameter.optimum or unknown for parameter in parameters]
    columns = {
        "learned": [number(parameter.learned) for parameter in parameters],
        "optimum": [number(optimum.optimum) for optimum in optima],
        "std error": [number(optimum.standard_error, 4) for optimum in optima],
        "t": [number(optimum.t, 4) for optimum in optima],
        "p": [tiny if p is not None and p < 1e-300 else number(p, 3) for p in (optimum.p for optimum in optima)],
        "95 % interval": [interval(optimum) for optimum in optima],
        "off by": [gap(parameter.off_by) for parameter in parameters],
        "truth": [number(parameter.truth) for parameter in parameters],
        "truth off by": [gap(parameter.truth_off_by) for parameter in parameters],
    }
    if learned_is_optimum:
        del columns["optimum"], columns["off by"]
    return {name: cells for name, cells in columns.items() if any(cells)}


def _coefficient_caption(report: ReportData, known: Collection[str]) -> str:
    count = len(report.parameters)
    parts = ['In raw units<span class="pointer">; point at a number for all its digits</span>.']
    if count > MOST_COEFFICIENTS:
        parts.append(f"The first {MOST_COEFFICIENTS} of {count:,}; model.json holds all.")
    if report.learned_is_optimum:
        parts.append(
            f"What was learned is the least-squares optimum to within {AGREES_WITHIN:g} standard errors (SE); "
            "t, p and intervals belong to the optimum."
        )
    elif "optimum" in known:
        parts.append(
            "The optimum is the least-squares solution; standard errors (SE), t, p and intervals belong to it."
        )
    if "off by" in known:
        parts.append("Off by: how far what was learned still is from it.")
    if report.left_out:
        more = len(report.left_out) - _MOST_REASONS
        reasons = "; ".join(text(reason) for reason in report.left_out[:_MOST_REASONS])
        parts.append(f"Left out, with weight 0: {reasons}{f'; and {more:,} more' if more > 0 else ''}.")
    return " ".join(parts)
