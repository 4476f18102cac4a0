import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from tapedist.errors import StorageError
from tapedist.results import figure_style, figures
from tapedist.results.figures import Line, ParameterPath, Points, draw_all
from tapedist.training.interfaces import Row

ALL = ["training_data.png", "test_data.png", "test_fit.png", "loss_curve.png", "parameter_path.png"]


def history(losses, test_loss=1.0):
    rows = [("train", epoch, loss) for epoch, loss in enumerate(losses)] + [("test", len(losses) - 1, test_loss)]
    return [
        Row(step=epoch, epoch=epoch, split=split, loss=loss, penalty=0.0, examples_per_sec=None, seconds=0.0)
        for split, epoch, loss in rows
    ]


def run(d=1, n=200, epochs=50, scale=1.0):
    """The arguments of `draw_all` for a fit of `n` rows with `d` features."""
    rng = np.random.default_rng(3)
    weights = np.arange(1.0, d + 1)
    x = rng.normal(size=(n, d)) * scale
    y = x @ weights - 2 + rng.normal(size=n)
    progress = 1 - np.exp(-np.arange(epochs + 1) / 10)
    line = Line(weights=weights, bias=-2.0)
    return {
        "train": Points(x=x, y=y),
        "test": Points(x=x[: n // 4], y=y[: n // 4]),
        "history": history(50 * np.exp(-np.arange(epochs + 1) / 10) + 1),
        "fitted": line,
        "truth": line,
        "optimum": line,
        "path": ParameterPath(epochs=np.arange(epochs + 1), values=progress[:, None] * np.append(weights, -2.0)),
        "feature_names": [f"x{i}" for i in range(d)],
    }


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
    return found


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_all_figures_are_drawn(tmp_path, d):
    drawn = draw_all(tmp_path / "plots", **run(d))
    assert [path.name for path in drawn] == ALL
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(ALL)
    for path in drawn:
        image = pixels(path)
        assert image.shape[:2] == (720, 1152)
        assert 0.005 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.5, "empty or overfull"


def test_the_same_run_gives_the_same_pictures(tmp_path):
    arguments = run(n=12_000)
    first = [path.read_bytes() for path in draw_all(tmp_path, **arguments)]
    assert [path.read_bytes() for path in draw_all(tmp_path, **arguments)] == first


def test_what_is_unknown_is_left_out(tmp_path):
    arguments = {**run(), "test": Points(x=np.zeros((0, 1)), y=np.zeros(0))}
    for name in ("fitted", "truth", "optimum", "path"):
        del arguments[name]
    assert [path.name for path in draw_all(tmp_path, **arguments)] == ["training_data.png", "loss_curve.png"]


def test_millions_of_rows_are_sampled_and_the_figure_says_so():
    many = Points(x=np.arange(2e6)[:, None], y=np.arange(2e6), total=8_000_000)
    drawn = many.drawn()
    assert drawn.x.shape == (5000, 1)
    assert np.array_equal(drawn.x[:, 0], drawn.y)
    assert np.array_equal(drawn.y, many.drawn().y)
    # Spread over all rows: the mean of 5,000 uniform draws is within 5 standard errors.
    assert abs(drawn.y.mean() / 1e6 - 1) < 5 / math.sqrt(3 * 5000)
    figure = figures.data_figure("Training data", many, figure_style.TRAIN, ["x"], "y", None)
    assert "showing 5,000 of 8,000,000 rows" in texts(figure)
    assert sum(len(line.get_xdata()) for line in figure.axes[0].lines) == 5000


def test_rows_that_are_not_finite_are_not_drawn_but_counted():
    points = Points(x=np.array([[1.0], [np.inf], [2.0]]), y=np.array([1.0, 2.0, np.nan]))
    assert points.drawn().caption == "showing 1 of 3 rows"


def test_the_fit_says_its_formula():
    figure = figures.fit_figure(
        Points(x=np.array([[0.0], [1.0]]), y=np.array([0.0, 1.0])),
        Line(weights=np.array([8.9912]), bias=-2.0041),
        None,
        ["height"],
        "cost",
    )
    assert "fitted:  cost = 8.991 height \N{MINUS SIGN} 2.004" in texts(figure)
    assert {"height", "cost"} <= set(texts(figure))
    line = figure.axes[0].lines[1]
    assert list(line.get_ydata()) == pytest.approx([-2.0041, 6.9871])


def test_several_features_show_predicted_against_actual():
    figure = figures.fit_figure(**_fit_arguments(run(3)))
    assert {"actual y", "predicted y"} <= set(texts(figure))
    dots = figure.axes[0].lines[0]
    assert np.abs(dots.get_xdata() - dots.get_ydata()).std() < 1.5


def test_measured_numbers_keep_their_zeros():
    assert figure_style.number(1.00005, padded=True) == "1.000"
    assert figure_style.number(-1234.4, padded=True) == "\N{MINUS SIGN}1234"
    assert figure_style.number(-55994.9) == "\N{MINUS SIGN}55,995"
    assert "test, last 1.000" in texts(figures.loss_figure(history([5.0, 1.0], test_loss=1.00005)))


@pytest.mark.parametrize("d", [1, 3])
def test_no_label_is_cut_off_where_numbers_and_names_are_long(d):
    names, line = [f"a_name_of_20_chars_{i}" for i in range(d)], Line(weights=np.full(d, 123456.0), bias=-98765.0)
    x = np.random.default_rng(1).uniform(1, 4, size=(50, d))
    rows = Points(x=x, y=line(x), total=8_000_000)
    path = ParameterPath(epochs=np.arange(2), values=np.array([np.zeros(d + 1), [*line.weights, line.bias]]))
    target = "selling_price_in_euro"
    for figure in (
        figures.data_figure("Training data", rows, figure_style.TRAIN, names, target, line),
        figures.fit_figure(rows, line, None, names, target),
        figures.loss_figure(history([8e9, 1e8], test_loss=9e7)),
        figures.path_figure(path, line, line, names),
    ):
        figure_style.fit_margins(figure)
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 < drawn.x0 < drawn.x1 < width
        assert 0 < drawn.y0 < drawn.y1 < height


def test_ticks_have_thousands_separators():
    rows = Points(x=np.array([[-60000.0], [40000.0]]), y=np.array([50000.0, 450000.0]))
    (axes,) = figures.data_figure("Training data", rows, figure_style.TRAIN, ["x"], "y", None).axes
    assert "400,000" in [tick.get_text() for tick in axes.get_yticklabels()]
    assert "\N{MINUS SIGN}40,000" in [tick.get_text() for tick in axes.get_xticklabels()]


def _fit_arguments(arguments):
    return {
        "points": arguments["test"],
        "fitted": arguments["fitted"],
        "truth": arguments["truth"],
        "features": arguments["feature_names"],
        "target": "y",
    }


def test_the_features_that_matter_are_shown():
    arguments = run(20)
    figure = figures.data_figure(
        "Training data", arguments["train"], figure_style.TRAIN, arguments["feature_names"], "y", arguments["fitted"]
    )
    assert {axes.get_xlabel() for axes in figure.axes} == {"x17", "x18", "x19"}
    assert any("3 of 20 features" in text for text in texts(figure))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([50.0, 5.0, 1.0], "log"), ([1.2, 1.1, 1.0], "linear"), ([5.0, 1.0, 0.0], "linear"), ([1e250, 1e-20], "log")],
)
def test_the_loss_axis_is_logarithmic_where_that_helps(tmp_path, losses, scale):
    figure = figures.loss_figure(history(losses))
    assert figure.axes[0].get_yscale() == scale
    figure_style.save(figure, tmp_path / "loss.png")


def test_a_long_history_is_thinned_but_keeps_its_ends():
    figure = figures.loss_figure(history(np.linspace(5, 1, 100_001)))
    epochs = figure.axes[0].lines[0].get_xdata()
    assert len(epochs) == 2000
    assert (epochs[0], epochs[-1]) == (0, 100_000)


def test_a_diverged_history():
    assert figures.loss_figure(history([1.0, math.inf, math.nan])) is not None
    assert figures.loss_figure(history([math.nan], test_loss=math.nan)) is None


@pytest.mark.parametrize("name", ["$x$ and $\\frac{", "_hidden", "a\nb\x1b[31m", "\u5e45", "w" * 500, "", "%s {0}"])
def test_hostile_names_are_shown_plainly(tmp_path, name):
    arguments = {**run(2), "feature_names": [name, "x"], "target_name": name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(draw_all(tmp_path, **arguments)) == 5
        assert len(draw_all(tmp_path, **{**run(1), "feature_names": [name], "target_name": name})) == 5
    shown = figure_style.plain(name)
    assert shown.isprintable()
    assert len(shown) <= 40


@pytest.mark.parametrize("arguments", [run(n=4, epochs=0), run(scale=0.0), run(scale=1e149), run(scale=1e-300)])
def test_degenerate_rows(tmp_path, arguments):
    assert len(draw_all(tmp_path, **arguments)) == 5


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(StorageError, match="plots"):
        draw_all(tmp_path / "plots", **run())


def test_a_picture_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "loss_curve.png").mkdir()
    with pytest.raises(StorageError, match="loss_curve"):
        draw_all(tmp_path, **run())
    assert not list(tmp_path.glob(".*"))


_OTHERS_STATE = """
import sys
from pathlib import Path

import matplotlib
import numpy as np

from tapedist.results.figures import Line, Points, draw_all

def settings():
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}  # Asking imports it.


before = settings()
points = Points(x=np.ones((3, 1)), y=np.ones(3))
draw_all(Path(sys.argv[1]), train=points, test=points, history=[], fitted=Line(weights=np.ones(1), bias=0.0))
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
assert "tensorflow" not in sys.modules
"""


def test_matplotlib_is_left_as_it_was(tmp_path):
    command = [sys.executable, "-c", _OTHERS_STATE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_set_is_quick(tmp_path):
    arguments = run(n=1_000_000, epochs=3000)
    draw_all(tmp_path, **run())
    start = time.process_time()
    draw_all(tmp_path, **arguments)
    assert time.process_time() - start < 3.0  # About 0.5 s; the limit only catches drawing every row.


_OTHERS_SURROUNDINGS = """
import sys
from pathlib import Path

from tapedist.runtime_flags import matplotlib_importable

with matplotlib_importable():
    import matplotlib
import numpy as np

from tapedist.results.figures import Line, Points, draw_all

if "own" in sys.argv:
    matplotlib.rcParams.update({"text.usetex": True, "font.family": "Nonesuch", "axes.facecolor": "red"})
before = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
points = Points(x=np.arange(9.0)[:, None], y=np.arange(9.0))
draw_all(Path(sys.argv[1]), train=points, test=points, history=[], fitted=Line(weights=np.ones(1), bias=0.0))
assert {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"} == before
"""


@pytest.mark.parametrize("around", ["backend", "settings", "matplotlibrc", "no text", "no home"])
def test_figures_are_the_same_whatever_is_around(around, tmp_path, child_env):
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nfont.family: Nonesuch\nfigure.dpi: 9\nnonsense: 3\n")
    (tmp_path / "no-text").write_bytes(b"\xff\xfe\x00")
    environments = {
        "backend": {"MPLBACKEND": "module://matplotlib_nowhere.backend"},
        "settings": {},
        "matplotlibrc": {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")},
        "no text": {"MATPLOTLIBRC": str(tmp_path / "no-text")},
        "no home": {"HOME": "/nowhere", "XDG_CONFIG_HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"},
    }
    for name, more in {"plain": {}, "around": environments[around]}.items():
        own = ["own"] if (name, around) == ("around", "settings") else []
        words = [sys.executable, "-c", _OTHERS_SURROUNDINGS, str(tmp_path / name), *own]
        done = subprocess.run(words, capture_output=True, text=True, env={**child_env, **more}, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "around" / path.name).read_bytes()
