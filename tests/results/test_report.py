import dataclasses
import math
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tapedist.regression.inference import Coefficient
from tapedist.results import report_charts as charts
from tapedist.results.report import MOST_COEFFICIENTS, Parameter, ReportData, render
from tapedist.results.report_charts import Predictions
from tapedist.training.interfaces import Row

SECTIONS = ["coefficients", "loss", "fit", "residuals", "quantiles", "quality", "speed", "settings", "digest"]
SECTIONS += ["environment"]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order, every text and attribute kept."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.attributes, self.texts, self.tags = [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == [], "unclosed tags"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def row(epoch, loss, split="train"):
    return Row(step=epoch, epoch=epoch, split=split, loss=loss, penalty=0.0, examples_per_sec=None, seconds=0.0)


def predictions(k=300, **changes):
    rng = np.random.default_rng(5)
    x = rng.normal(size=k)
    facts = {"actual": 9 * x - 2 + rng.normal(size=k), "predicted": 9 * x - 2, "x": x}
    return Predictions(**{**facts, **changes})


FULL = ReportData(
    title="Linear fit of y on x",
    subtitle="runs/tutorial",
    highlights={"Test loss": 0.92813, "Training rows": 8000},
    notes=["The optimum is not unique."],
    parameters=[
        Parameter(
            name="x",
            learned=9.0123456789,
            optimum=Coefficient("x", 9.0134, 0.0112, 804.8, 0.0, 8.99, 9.04),
            off_by=0.0941,
            truth=9.0,
            truth_off_by=1.2,
        ),
        Parameter(
            name="intercept",
            learned=-2.004,
            optimum=Coefficient("intercept", -2.003, 0.0111, -180.4, 1.5e-7, None, None),
            truth=-2.0,
        ),
    ],
    quality={"R2": 0.9876, "adjusted R2": None, "RMSE": math.nan},
    history=[row(epoch, 50 * math.exp(-epoch / 10) + 1) for epoch in range(100)] + [row(99, 0.93, "test")],
    predictions=predictions(),
    settings={"learning_rate": 0.001, "num_epochs": 3000, "m": (9.0, 3.0), "fit_intercept": True},
    changed={"learning_rate"},
    speed={"rows per second": "1.65 G", "seconds": 1.25},
    digest="5f7a" * 16,
    environment={"tensorflow": "2.21.0", "devices": "CPU:0"},
)


def test_every_section_is_there_and_balanced():
    page = Page(render(FULL))
    assert page.ids == SECTIONS
    assert page.tags.count("svg") == 4
    for words in ("Linear fit of y on x", "runs/tutorial", "The optimum is not unique.", "5f7a" * 16, "1.65 G"):
        assert words in page.text


def test_an_empty_report_says_what_is_missing():
    page = Page(render(ReportData(title="A run")))
    assert page.ids == SECTIONS
    assert "svg" not in page.tags
    for words in ("not linear", "No finite loss", "No rows were held out", "Nothing was recorded", "no digest"):
        assert words in page.text


@pytest.mark.parametrize("report", [FULL, ReportData(title="A run")])
def test_nothing_comes_from_outside(report):
    text = render(report)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    outside = {"src", "href", "srcset", "xlink:href", "action", "data", "poster", "background", "style"}
    assert not [(tag, name) for tag, name, _ in page.attributes if name in outside or name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    assert not re.search(r"url\(|@import|@font-face|expression\(", style)
    assert "//" not in style
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_phones_print_and_dark_rooms_are_thought_of():
    text = render(FULL)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    for rule in ("@media print", "prefers-color-scheme: dark", "max-width: 44rem"):
        assert rule in text
    # Where nothing points at a number, nobody is told to.
    for medium in ("(hover: none)", "print"):
        assert re.search(rf"@media {re.escape(medium)} {{[^@]*\.pointer {{ display: none; }}", text)
    assert '<span class="pointer">; point at' in text
    # On a phone each number carries the name of its column.
    assert text.count('data-label="learned"') == 2
    assert "$" not in text, "a placeholder was left"


def test_charts_are_well_formed_xml():
    charts = re.findall(r"<svg.*?</svg>", render(FULL), re.S)
    titles = [ET.fromstring(chart).find("title").text for chart in charts]
    assert titles == ["Loss over epochs", "Fit", "Residuals", "Normal Q-Q plot"]


def cells(page_text):
    """Texts of the coefficient table, by row and column."""
    table = re.search(r'<table class="numbers">.*?</table>', page_text, re.S).group()
    found = {}
    for line in re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.S):
        name = re.search(r'<th scope="row">(.*?)</th>', line).group(1)
        found[name] = {
            column: re.sub("<.*?>", "", cell)
            for column, cell in re.findall(r'<td data-label="(.*?)">(.*?)</td>', line, re.S)
        }
    return found


def test_coefficients_have_their_statistics():
    minus = "\N{MINUS SIGN}"
    table = cells(render(FULL))
    assert table["x"] == {
        "learned": "9.01235",
        "optimum": "9.0134",
        "std error": "0.0112",
        "t": "804.8",
        "p": f"&lt; 1e{minus}300",
        "95 % interval": "8.99 to 9.04",
        "off by": "0.094 SE",
        "truth": "9",
        "truth off by": "1.2 SE",
    }
    assert table["intercept"]["learned"] == f"{minus}2.004"
    assert table["intercept"]["p"] == f"1.5e{minus}07"
    nearly_one = Parameter(name="x", learned=1.0, optimum=Coefficient("x", 1.0, 0.1, 0.006, 0.995, 0.8, 1.2))
    assert cells(render(dataclasses.replace(FULL, parameters=[nearly_one])))["x"]["p"] == "0.995"
    assert table["intercept"]["95 % interval"] == "\N{EN DASH}"


def test_learned_parameters_that_are_the_optimum_have_one_column():
    text = render(dataclasses.replace(FULL, learned_is_optimum=True))
    assert list(cells(text)["x"]) == ["learned", "std error", "t", "p", "95 % interval", "truth", "truth off by"]
    assert "What was learned is the least-squares optimum to within 0.01 standard errors" in Page(text).text
    assert "Off by:" not in text


def test_features_that_are_left_out_are_named():
    reasons = ["year does not vary", "<b> is a linear combination of a"]
    text = render(dataclasses.replace(FULL, left_out=reasons))
    assert "Left out, with weight 0: year does not vary; &lt;b&gt; is a linear combination of a." in text
    many = render(dataclasses.replace(FULL, left_out=[f"x{i} does not vary" for i in range(500)]))
    assert "x19 does not vary; and 480 more." in many


def test_unknown_statistics_have_no_column():
    report = dataclasses.replace(FULL, parameters=[Parameter(name="x", learned=1.0)])
    assert cells(render(report)) == {"x": {"learned": "1"}}


def test_every_digit_can_be_had():
    assert 'title="9.0123456789"' in render(FULL)
    assert 'title="0.92813"' in render(dataclasses.replace(FULL, highlights={"Test loss": np.float64(0.92813)}))


def test_undefined_is_a_dash_never_nan():
    text = Page(render(FULL)).text
    assert "nan" not in text.lower()
    assert text.count("\N{EN DASH}") == 5


def test_settings_read_as_they_are_typed():
    text = render(FULL)
    assert '<tr class="changed"><th scope="row">learning_rate</th><td>0.001</td></tr>' in text
    for shown in ("<td>3000</td>", "<td>9.0,3.0</td>", "<td>true</td>"):
        assert shown in text


HOSTILE = "</title><script>alert('1')</script>\"><img src=x onerror=alert(1)>&amp;$body${title}\x00\x1b[31m\u202e"


def test_hostile_words_are_only_words():
    report = ReportData(
        title=HOSTILE,
        subtitle=HOSTILE,
        highlights={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        parameters=[Parameter(name=HOSTILE, learned=1.0, truth=1.0)],
        quality={HOSTILE: HOSTILE},
        history=FULL.history,
        predictions=predictions(feature_name=HOSTILE, target_name=HOSTILE, split=HOSTILE),
        settings={HOSTILE: HOSTILE},
        changed={HOSTILE},
        speed={HOSTILE: [HOSTILE]},
        digest=HOSTILE,
        environment={HOSTILE: HOSTILE},
    )
    text = render(report)
    page = Page(text)
    assert page.ids == SECTIONS
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not set("\x00\x1b\u202e") & set(text)
    assert page.text.count("alert('1')") >= 15
    for chart in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(chart)


def test_several_features_show_predicted_against_actual():
    text = render(dataclasses.replace(FULL, predictions=predictions(x=None, target_name="price")))
    assert "Predicted against actual" in text
    assert "predicted price" in text


def test_millions_of_rows_give_a_small_page_that_says_so():
    text = render(dataclasses.replace(FULL, predictions=predictions(200_000, total=8_000_000)))
    assert len(text) < 150_000
    assert "showing 1,500 of 8,000,000 rows" in text


def test_thousands_of_coefficients():
    many = [Parameter(name=f"x{i}", learned=float(i)) for i in range(5000)]
    text = render(dataclasses.replace(FULL, parameters=many))
    assert len(cells(text)) == MOST_COEFFICIENTS
    assert "The first 200 of 5,000" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"predictions": predictions(0)},
        {"predictions": predictions(1)},
        {"predictions": Predictions(actual=np.ones(5), predicted=np.ones(5), x=np.ones(5))},
        {"predictions": Predictions(actual=np.array([np.nan, np.inf, 1.0]), predicted=np.array([1.0, 2.0, np.inf]))},
        {"predictions": predictions(2)},
        {"history": [row(0, math.nan), row(1, math.inf)]},
        {"history": [row(0, 5.0), row(1, 0.0)]},
        {"history": [row(0, 1e300), row(1, 1e-300)]},
    ],
)
def test_degenerate_runs(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(render(dataclasses.replace(FULL, **changes)))
    assert page.ids == SECTIONS
    assert "nan" not in page.text.lower()


def test_normal_residuals_lie_on_the_line():
    chart = re.findall(r"<svg.*?</svg>", render(dataclasses.replace(FULL, predictions=predictions(5000))), re.S)[3]
    root = ET.fromstring(chart)
    ends = np.array(re.findall(r"[\d.]+", root.find("path[@class='line rule']").get("d")), float).reshape(2, 2)
    dots = [
        re.findall(r"M([\d.]+) ([\d.]+)h0", path.get("d")) for path in root.findall("path[@class='dots test clear']")
    ]
    dots = np.concatenate([np.array(part, float) for part in dots])
    line = np.interp(dots[:, 0], ends[:, 0], ends[:, 1])
    assert np.median(np.abs(dots[:, 1] - line)) < 2.0


def test_the_report_needs_neither_tensorflow_nor_matplotlib():
    code = "import sys, tapedist.results.report; sys.exit(bool({'tensorflow', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_weights_count_in_the_errors_and_rows_of_weight_0_do_not() -> None:
    from tapedist.results.report_data import _sample, _sample_errors

    class Rows:
        num_features, feature_names, target_name, weighted = 1, ("x",), "y", True

        def num_rows(self, split: str) -> int:
            return {"train": 0, "test": 4}[split]

        def rows(self, split: str, indices: np.ndarray) -> tuple[np.ndarray, ...]:
            return np.zeros((4, 1)), np.array([1.0, -3.0, 1e9, 2.0]), np.array([1.0, 2.0, 0.0, 1.0])

    sample = _sample(Rows(), {"weights": [1.0], "bias": 0.0})  # type: ignore[arg-type]
    assert sample is not None
    assert sample.actual.tolist() == [1.0, -3.0, 2.0]
    errors = _sample_errors(sample)
    assert errors is not None
    assert errors.mae == (1 + 2 * 3 + 2) / 4
    assert "times the root of their weights" in charts.quantiles(sample)


def test_the_errors_of_a_sample_are_said_to_be_a_samples() -> None:
    from tapedist.results.report_data import _errors

    few, many = predictions(), predictions(4096, total=65_523)
    model = {"loss": "squared", "test_loss": 4.0}
    assert list(_errors(few, model)) == ["RMSE, test split", "MAE, test split", "R2, test split"]
    sampled = _errors(many, model)
    assert list(sampled) == [
        "RMSE, test split",
        *(f"{name}, sample of 4,096 of 65,523 test rows" for name in ("MAE", "R2")),
    ]
    assert sampled["RMSE, test split"] == 2.0
    assert "RMSE, sample of 4,096 of 65,523 test rows" in _errors(many, {"loss": "huber", "test_loss": 4.0})
    assert _errors(None, {"loss": "huber", "test_loss": 4.0}) == {}


def test_large_print_has_four_digits() -> None:
    from tapedist.results.report_data import _highlights

    facts = _highlights({"test_loss": 1.00005, "train_loss": 71548201.9, "epochs": 3000}, {"r2": 1.0})
    assert facts == {
        "test loss": "1.000", "training loss": "7.155e+07", "R2 at the optimum": "1.000", "epochs": 3000,
    }  # fmt: skip
