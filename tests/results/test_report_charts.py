import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tapedist.results.report_charts import Chart, log_ticks, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (-3.2, 3.4, [-3, -2, -1, 0, 1, 2, 3]),
        (0.11, 0.19, [0.12, 0.14, 0.16, 0.18]),
        (-40.0, 5e6, [0, 1e6, 2e6, 3e6, 4e6, 5e6]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.9, 60.0, [1, 2, 5, 10, 20, 50]), (1e-3, 20.0, [1e-3, 1e-2, 1e-1, 1, 10]), (1e-20, 1e10, 7)],
)
def test_log_ticks(low, high, expected):
    found = log_ticks(low, high)
    if isinstance(expected, int):
        assert len(found) == expected
    else:
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("high", [3.0, 1e5, 999_999_999.0])
def test_tick_labels_do_not_touch(high):
    chart = Chart("x", "y")
    chart.line("model", np.array([high / 2, high]), np.array([0.0, 1.0]))
    labels = [(float(t.get("x")), len(t.text)) for t in parsed(chart).findall("text[@class='tick x']")]
    assert len(labels) >= 2
    for (left, a), (right, b) in itertools.pairwise(labels):
        assert right - left > (a + b) / 2 * 8


def test_the_label_stands_clear_of_large_ticks():
    chart = Chart("epoch", "loss", log_y=True)
    chart.line("train", np.arange(2), np.array([8e7, 8e9]))
    (x,) = {float(t.get("x")) for t in parsed(chart).findall("text[@class='tick y']")}
    widest = 15.5 * (3 * 0.636 + 0.615 + 0.838)  # "1e+09" in DejaVu Sans on a phone.
    assert x - widest > 13 + 4, "the label's baseline and what hangs below it"


def parsed(chart):
    return ET.fromstring(chart.render("a title"))


def coordinates(element):
    words = element.get("d").replace("M", " ").replace("L", " ").replace("h0", " ").split()
    return np.array(words, float).reshape(-1, 2)


def test_marks_lie_where_the_ticks_say():
    chart = Chart("x", "y")
    chart.line("model", np.array([0.0, 10.0]), np.array([0.0, 100.0]))
    root = parsed(chart)
    (start, end) = coordinates(root.find("path[@class='line model']"))
    x_ticks = {t.text: float(t.get("x")) for t in root.findall("text[@class='tick x']")}
    y_ticks = {t.text: float(t.get("y")) - 4 for t in root.findall("text[@class='tick y']")}
    assert start == pytest.approx([x_ticks["0"], y_ticks["0"]], abs=0.11)
    assert end == pytest.approx([x_ticks["10"], y_ticks["100"]], abs=0.11)


def test_a_logarithmic_axis():
    chart = Chart("x", "y", log_y=True)
    chart.line("train", np.arange(3), np.array([1.0, 10.0, 100.0]))
    heights = coordinates(parsed(chart).find("path[@class='line train']"))[:, 1]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [2.0, 2.0], [0.0, 0.0], [1e9, 1e9 + 1e-6], [-1e299, 1e299], [1e-300, 2e-300], [np.nan, 1.0, np.inf]],
)
def test_degenerate_values_stay_inside(values):
    values = np.array(values)
    chart = Chart("x", "y")
    chart.dots("test", values, values)
    for dots in parsed(chart).findall("path[@class='dots test']"):
        points = coordinates(dots)
        assert np.isfinite(points).all()
        assert (points >= 0).all()
        assert (points <= [480, 320]).all()


def test_labels_are_escaped():
    root = parsed(Chart("<b>&", "'\""))
    assert [label.text for label in root.findall("text[@class='label']")] == ["<b>&", "'\""]
