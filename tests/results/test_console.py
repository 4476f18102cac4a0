import io
import logging
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tapedist.results.console import Console, format_duration, format_loss, format_rate
from tapedist.training.interfaces import Row

_ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _capable_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


def row(epoch, loss, split="train"):
    return Row(step=epoch, epoch=epoch, split=split, loss=loss, penalty=0.0, examples_per_sec=1e6, seconds=0.0)


def begin(console, **changes):
    facts = {"epochs": 30, "first_epoch": 0, "train_rows": 8000, "test_rows": 2000, "steps_per_epoch": 1}
    console.begin(**{**facts, **changes})


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (51.6414, "51.641"),
        (0.92812, "0.928"),
        (0.1, "0.100"),
        (0.0, "0.000"),
        (0.0123456, "0.01235"),
        (3.2e-17, "3.2e-17"),
        (1.5e12, "1.5e+12"),
        (-4.25, "-4.250"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_losses_stay_readable(loss, text):
    assert format_loss(loss) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1.65e9, "1.65 G rows/s"),
        (812_300.0, "812 k rows/s"),
        (999_600.0, "1.00 M rows/s"),
        (9.996e6, "10.0 M rows/s"),
        (99.96e6, "100 M rows/s"),
        (17.0, "17.0 rows/s"),
        (0.25, "0.25 rows/s"),
        (0.0, "- rows/s"),
        (float("inf"), "- rows/s"),
    ],
)
def test_rates_have_three_digits(rate, text):
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(41.2, "0:42"), (725, "12:05"), (11240, "3:07:20"), (187_200, "2 d 4 h"), (float("nan"), "-:--")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    console = Console(log_every_epochs=10, stream=stream)
    begin(console)
    for epoch in range(31):
        console.record(row(epoch, 51.641 / (epoch + 1)))
        if epoch % 15 == 0:
            console.record(row(epoch, 0.5, split="test"))
    console.advance(epoch=30, step=30, loss=1.0, examples_per_sec=1e9)
    console.close()
    console.log("Learned W: 9.00, learned B: -2.00")
    assert stream.getvalue().splitlines() == [
        "Training samples: 8000",
        "Test samples: 2000",
        "Epoch: 0, loss 51.641",
        "Epoch: 0, test loss 0.500",
        "Epoch: 10, loss 4.695",
        "Epoch: 20, loss 2.459",
        "Epoch: 30, loss 1.666",
        "Learned W: 9.00, learned B: -2.00",
    ]


def test_only_a_terminal_has_a_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "132")
    assert Console(log_every_epochs=10, stream=io.StringIO(), terminal=True).width == 132
    assert Console(log_every_epochs=10, stream=io.StringIO()).width is None


def test_an_epoch_has_one_line():
    stream = io.StringIO()
    console = Console(log_every_epochs=1, stream=stream)
    console.record(row(3, 2.0))
    console.record(row(3, 1.0))
    assert stream.getvalue() == "Epoch: 3, loss 2.000\n"


def _drawn(width: int, calls) -> str:
    """What a console writes to a real terminal of `width` columns."""
    master, slave = pty.openpty()
    os.environ["COLUMNS"] = str(width)
    try:
        with open(slave, "w", encoding="utf-8") as stream:
            calls(stream)
        text = b""
        while select.select([master], [], [], 0)[0]:
            try:
                part = os.read(master, 1 << 16)
            except OSError:
                break
            if not part:
                break
            text += part
        return text.decode()
    finally:
        del os.environ["COLUMNS"]
        os.close(master)


@pytest.mark.parametrize("width", [50, 100])
def test_a_terminal_gets_a_bar_with_rate_and_remaining_time(width):
    times = iter(range(1000))
    outputs = sys.stdout, sys.stderr

    def calls(stream):
        console = Console(log_every_epochs=10, stream=stream, clock=lambda: float(next(times)))
        begin(console, epochs=3000, train_rows=8_000_000)
        console.record(row(1000, 4.25))
        console.advance(epoch=1000, step=1000, loss=None, examples_per_sec=1.6e9)
        console.close()
        console.log("Learned W: 9.00")

    text = _drawn(width, calls)
    assert "Training samples: 8000" in text
    assert "Epoch:" not in text
    assert "1.60 G" in text
    if width == 100:
        for part in ("epoch 1000/3000", " 33 %", "loss 4.250", "1.60 G rows/s", "0:10 left"):
            assert part in text
    assert text.rstrip().endswith("Learned W: 9.00")
    assert "\x1b[?25h" in text, "the cursor was not given back"
    assert (sys.stdout, sys.stderr) == outputs


def test_redraws_are_limited_by_the_clock():
    drawn = []

    def calls(stream):
        console = Console(log_every_epochs=10, stream=stream, clock=lambda: 0.0)
        begin(console)
        for epoch in range(1000):
            console.advance(epoch=epoch, step=epoch, loss=1.0, examples_per_sec=1e6)
        drawn.append(True)
        console.close()

    assert len(_drawn(100, calls)) < 3000
    assert drawn


def test_the_end_is_drawn_whatever_the_clock_says(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    console = Console(log_every_epochs=10, stream=stream, terminal=True, clock=lambda: 0.0)
    begin(console)
    console.advance(epoch=1, step=1, loss=1.0, examples_per_sec=1e6)
    console.advance(epoch=30, step=30, loss=1.0, examples_per_sec=1e6)
    shown = stream.getvalue()  # While the test split is visited, which may take long.
    console.close()
    assert "epoch 30/30" in shown


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")

    def calls(stream):
        console = Console(log_every_epochs=10, stream=stream)
        begin(console)
        console.record(row(10, 4.0))
        console.close()

    assert "Epoch: 10, loss 4.000" in _drawn(80, calls)


def test_a_closed_pipe_silences_the_console_only(caplog):
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115  (closed below, and that is the point)
    console = Console(log_every_epochs=1, stream=stream)
    begin(console)
    console.advance(epoch=0, step=0, loss=1.0, examples_per_sec=1.0)
    for epoch in range(100_000):
        console.record(row(epoch, 1.0))
    console.close()
    stream.close()  # Nothing is left that could fail.
    assert not caplog.records


def test_a_full_device_is_said_once(caplog):
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    console = Console(log_every_epochs=1, stream=stream)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            console.record(row(epoch, 1.0))
            console.advance(epoch=epoch, step=epoch, loss=1.0, examples_per_sec=1.0)
        console.close()
    stream.close()
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_a_terminal_that_goes_away_gives_the_outputs_back():
    master, slave = pty.openpty()
    outputs = sys.stdout, sys.stderr
    stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115
    console = Console(log_every_epochs=1, stream=stream, clock=iter(range(1000)).__next__)
    begin(console)
    os.close(master)
    console.advance(epoch=1, step=1, loss=1.0, examples_per_sec=1.0)
    console.advance(epoch=2, step=2, loss=1.0, examples_per_sec=1.0)
    console.close()
    stream.close()
    assert (sys.stdout, sys.stderr) == outputs


_HEAD = """
from tapedist.results.console import Console
from tapedist.training.interfaces import Row
console = Console(log_every_epochs=1)
console.begin(epochs=9, first_epoch=0, train_rows=8, test_rows=2, steps_per_epoch=1)
for epoch in range(50_000):
    console.record(
        Row(step=epoch, epoch=epoch, split="train", loss=1.0, penalty=0.0, examples_per_sec=None, seconds=0.0)
    )
console.close()
"""


def test_head_closes_the_output_and_the_process_ends_well():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _HEAD], text=True, cwd=_ROOT, **pipes) as process:
        assert process.stdout.readline() == "Training samples: 8\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")


class Bare:
    """What many programs put in place of standard output: it can write, and nothing else."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class BareTerminal(Bare):
    def isatty(self):
        return True


class Undecided(Bare):
    encoding = None

    def isatty(self):
        raise RuntimeError("no window")

    def flush(self):
        pass


class Gone(Undecided):
    def write(self, text):
        raise RuntimeError("the window is closed")


class Silent:
    pass


def _shown(stream):
    console = Console(log_every_epochs=10, stream=stream)
    assert console.width is None
    begin(console, epochs=10)
    for epoch in range(11):
        console.record(row(epoch, 2.0))
        console.advance(epoch=epoch, step=epoch, loss=2.0, examples_per_sec=1e6)
    console.close()
    console.log("Learned")


@pytest.mark.parametrize("kind", [Bare, BareTerminal, Undecided, io.StringIO])
def test_objects_in_place_of_standard_output(kind):
    stream = kind()
    _shown(stream)
    lines = ["Training samples: 8000", "Test samples: 2000", "Epoch: 0, loss 2.000", "Epoch: 10, loss 2.000", "Learned"]
    text = stream.getvalue() if isinstance(stream, io.StringIO) else stream.text
    assert text.splitlines() == lines


@pytest.mark.parametrize("kind", [Gone, Silent, io.BytesIO, "closed"])
def test_objects_that_take_no_text_silence_the_console_only(kind, caplog):
    stream = io.StringIO() if kind == "closed" else kind()
    if kind == "closed":
        stream.close()
    _shown(stream)
    assert len(caplog.records) == 1
    assert "the run goes on without it" in caplog.text


def test_characters_that_the_output_has_not_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(log_every_epochs=1, stream=stream)
    console.log("größe")
    console.log("next")
    console.close()
    assert stream.buffer.getvalue() == rb"gr\xf6\xdfe" + b"\nnext\n"


def test_no_output_at_all():
    code = "import os, sys\nos.close(1)\nsys.stdout = None\n" + _HEAD
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=_ROOT)
    assert (done.returncode, done.stderr) == (0, "")
