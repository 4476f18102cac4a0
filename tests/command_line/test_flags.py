"""Flags and flagfiles: each bad one gives its line and exit code 2, before TensorFlow; good ones give their config."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapedist import cli
from tapedist.cluster.doctor import DoctorConfig
from tapedist.config import TrainConfig
from tapedist.errors import InputError
from tapedist.flags import CommandLine, config_to_flagfile
from tapedist.options import option
from tapedist.text import to_text

# Arguments of `tapedist train` -> what stands after `tapedist: error: `, a line each. The files are made by `files`.
BAD = {
    "unknown flag": (["--lerning_rate=3"], ["--lerning_rate=3: is not a flag; did you mean --learning_rate?"]),
    "unknown flag, dashes": (["--run-dir=x"], ["--run-dir=x: is not a flag; did you mean --run_dir?"]),
    "unknown flag, nothing near": (["--qqq"], ["--qqq: is not a flag; --help lists the flags"]),
    "a switch and its value apart": (
        ["--plots", "false"],
        ["'false': is not a flag; write --plots=false, with '=' in place of the space"],
    ),
    "learning_rate is text": (
        ["--learning_rate=abc"],
        ["--learning_rate=abc: must be finite and above 0, or auto; try 0.001"],
    ),
    "learning_rate is empty": (["--learning_rate="], ["--learning_rate=: must be a number"]),
    "learning_rate is 0": (
        ["--learning_rate=0"],
        ["--learning_rate=0: must be finite and above 0, or auto; try 0.001"],
    ),
    "learning_rate negative": (
        ["--learning_rate=-1"],
        ["--learning_rate=-1: must be finite and above 0, or auto; try 0.001"],
    ),
    "learning_rate nan": (
        ["--learning_rate=nan"],
        ["--learning_rate=nan: must be finite and above 0, or auto; try 0.001"],
    ),
    "learning_rate inf": (
        ["--learning_rate", "inf"],
        ["--learning_rate=inf: must be finite and above 0, or auto; try 0.001"],
    ),
    "learning_rate 1e400": (
        ["--learning_rate=1e400"],
        ["--learning_rate=1e400: must be a number of at most 1.7e308 in size"],
    ),
    "batch_size 0": (["--batch_size=0"], ["--batch_size=0: must be from 1 to 2**40"]),
    "batch_size negative": (["--batch_size=-5"], ["--batch_size=-5: must be from 1 to 2**40"]),
    "batch_size 2.5": (["--batch_size=2.5"], ["--batch_size=2.5: must be a whole number"]),
    "n_samples 0": (["--n_samples=0"], ["--n_samples=0: must be from 1 to 2**62 - 1"]),
    "n_samples -1": (["--n_samples", "-1"], ["--n_samples=-1: must be from 1 to 2**62 - 1"]),
    "n_samples 2**63": ([f"--n_samples={2**63}"], [f"--n_samples={2**63}: must be from 1 to 2**62 - 1"]),
    "n_samples of 5,000 digits": (
        [f"--n_samples={'9' * 5000}"],
        [f"--n_samples={'9' * 60}... (5000 characters): must be a whole number"],
    ),
    "num_epochs negative": (
        ["--num_epochs=-1"],
        ["--num_epochs=-1: must be from 0 (evaluate the initial parameters) to 2**53, or auto"],
    ),
    "test_fraction 1": (["--test_fraction=1"], ["--test_fraction=1: must be in [0, 1)"]),
    "test_fraction negative": (["--test_fraction=-0.1"], ["--test_fraction=-0.1: must be in [0, 1)"]),
    "test_fraction nan": (["--test_fraction=nan"], ["--test_fraction=nan: must be in [0, 1)"]),
    "noise_std negative": (["--noise_std=-1"], ["--noise_std=-1: must be finite and not negative"]),
    "noise_std nan": (["--noise_std=nan"], ["--noise_std=nan: must be finite and not negative"]),
    "m of the wrong length": (
        ["--m=1,2", "--num_features=3"],
        ["--m=1,2: has 2 values for --num_features=3; give one value, or one per feature"],
    ),
    "m is text": (["--m=1,x"], ["--m=1,x: must be numbers separated by commas, like 9 or 9,-2.5"]),
    "mode": (["--mode=fast"], ["--mode=fast: must be one of full_batch, mini_batch"]),
    "strategy": (
        ["--strategy=ddp"],
        ["--strategy=ddp: must be one of auto, default, mirrored, multiworker, tpu"],
    ),
    "optimizer": (["--optimizer=lamb"], ["--optimizer=lamb: must be one of sgd, momentum, nesterov, adam"]),
    "loss": (["--loss=mse"], ["--loss=mse: must be one of squared, absolute, huber"]),
    "dtype": (["--dtype=float16"], ["--dtype=float16: must be one of float32, float64"]),
    "boolean": (["--plots=maybe"], ["--plots=maybe: must be true or false"]),
    "negated boolean with a value": (["--noplots=true"], ["--noplots=true: takes no value; write --plots=false"]),
    "moments with another loss": (
        ["--full_batch_engine=moments", "--loss=huber"],
        [
            "--full_batch_engine=moments: needs --loss=squared, not huber, because only squared error is a function of "
            "the second moments; use --full_batch_engine=stream"
        ],
    ),
    "arithmetic": (["--arithmetic=ieee"], ["--arithmetic=ieee: must be one of auto, exact, fast"]),
    "a flag that is gone": (
        ["--virtual_shards=8", "--seed=1"],
        ["--virtual_shards=8: is gone, because sums no longer depend on how rows are divided; drop it"],
    ),
    "a flag that is gone, its value after a space": (
        ["--virtual_shards", "8", "--seed=-1"],
        [
            "--virtual_shards=8: is gone, because sums no longer depend on how rows are divided; drop it",
            "--seed=-1: must be from 0 to 2**63 - 1",
        ],
    ),
    "a flag that is gone, without a value": (
        ["--virtual_shards"],
        ["--virtual_shards: is gone, because sums no longer depend on how rows are divided; drop it"],
    ),
    "resume=must without a folder": (
        ["--resume=must"],
        ["--resume=must: needs --run_dir, the folder of the run to continue"],
    ),
    "gs://": (
        ["--run_dir=gs://bucket/run"],
        [
            "--run_dir=gs://bucket/run: must be a local path, because saving needs rename and fsync; train into a "
            "local folder and copy it out"
        ],
    ),
    "control characters": (
        ["--run_dir=a\n\x1b[31m"],
        [r"--run_dir='a\n\x1b[31m': must not hold control characters, nor blanks at its ends; rename it"],
    ),
    "positional": (["train.csv"], ["'train.csv': is not a flag; write --NAME=VALUE"]),
    "positional, after --": (["--", "x"], ["'x': is not a flag; write --NAME=VALUE"]),
    "positional, only dashes": (["-"], ["'-': is not a flag; write --NAME=VALUE"]),
    "positional flagfile": (["a.flags"], ["'a.flags': is not a flag; did you mean --flagfile=a.flags?"]),
    "no value": (["--seed"], ["--seed: needs a value; write --seed=VALUE"]),
    "no value, a flag follows": (["--run_dir", "--seed=3"], ["--run_dir: needs a value; write --run_dir=VALUE"]),
    "verbosity": (["--verbosity=9"], ["--verbosity=9: must be 0, or 1 to see the traceback of an error"]),
    "flagfile missing": (
        ["--flagfile=none.flags"],
        ["--flagfile=none.flags: cannot be read: No such file or directory; give the path of a flagfile"],
    ),
    "flagfile is a folder": (["--flagfile=."], ["--flagfile=.: must be a regular file"]),
    "flagfile is a device": (["--flagfile=/dev/zero"], ["--flagfile=/dev/zero: must be a regular file"]),
    "flagfile is a pipe": (["--flagfile=pipe"], ["--flagfile=pipe: must be a regular file"]),
    "flagfile with NUL in its name": (
        ["--flagfile=a\0b"],
        [r"--flagfile='a\x00b': must not hold NUL; give the path of a flagfile"],
    ),
    "flagfile without a name": (["--flagfile"], ["--flagfile: needs a value; write --flagfile=VALUE"]),
    "flagfile binary": (
        ["--flagfile=binary"],
        ["--flagfile=binary: must be a text file of at most 32 MiB, one --NAME=VALUE per line"],
    ),
    "flagfile UTF-16": (
        ["--flagfile=utf16"],
        ["--flagfile=utf16: must be a text file of at most 32 MiB, one --NAME=VALUE per line"],
    ),
    "flagfile includes itself": (
        ["--flagfile=self"],
        ["self:2: --flagfile=self: includes itself; remove the line that includes it"],
    ),
    "flagfiles include each other": (
        ["--flagfile=ping"],
        ["pong:1: --flagfile=./ping: includes itself; remove the line that includes it"],
    ),
    "flagfile with bad lines": (
        ["--flagfile=lines"],
        [
            "lines:2: --seed 3: is not a flag; write --NAME=VALUE, with '=' in place of the space",
            "lines:3: 'seed=3': is not a flag; write --NAME=VALUE",
            "lines:4: '--': is not a flag; write --NAME=VALUE",
            "lines:5: --learning_rate: needs a value; write --learning_rate=VALUE",
            "lines:6: --batch_size=0: must be from 1 to 2**40",
        ],
    ),
    "several errors": (
        ["--learning_rate=0", "--lerning=1", "junk", "--batch_size=2.5", "--mode=fast", "--num_epochs=-1"],
        [
            "--lerning=1: is not a flag; did you mean --learning_rate?",
            "'junk': is not a flag; write --NAME=VALUE",
            "--batch_size=2.5: must be a whole number",
            "--mode=fast: must be one of full_batch, mini_batch",
            "--num_epochs=-1: must be from 0 (evaluate the initial parameters) to 2**53, or auto",
            "--learning_rate=0: must be finite and above 0, or auto; try 0.001",
        ],
    ),
    "no second error about a value that could not be read": (
        ["--m=1,2,3", "--num_features=x"],
        ["--num_features=x: must be a whole number"],
    ),
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the cases of `BAD`."""
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(bytes(range(256)))
    Path("utf16").write_text("--seed=3\n", encoding="utf-16")
    Path("self").write_text("# A comment.\n--flagfile=self\n")
    Path("ping").write_text("--flagfile=pong\n")
    Path("pong").write_text("--flagfile=./ping\n")
    Path("lines").write_text("--num_epochs=5\n--seed 3\nseed=3\n--\n--learning_rate\n--batch_size=0\n")
    os.mkfifo("pipe")
    return tmp_path


def _train_into(configs: list[TrainConfig]) -> dict[str, cli.Command]:
    """The real `train` command, except that it keeps its config instead of training."""
    return {"train": dataclasses.replace(cli.COMMANDS["train"], run=configs.append)}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case: str, files: Path, capsys: pytest.CaptureFixture[str]):
    words, problems = BAD[case]
    before = sorted(files.rglob("*"))
    trained: list[TrainConfig] = []
    assert cli.main(["train", *words], commands=_train_into(trained)) == 2
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"tapedist: error: {problem}" for problem in problems]
    assert out == ""
    assert trained == []
    assert sorted(files.rglob("*")) == before


def test_bad_flags_never_import_tensorflow(files: Path, run_python: Callable[..., object]):
    script = (
        "import json, sys; from tapedist.cli import main\n"
        "codes = {main(['train', *words]) for words in json.loads(open(0).read())}\n"
        "print(codes, {'tensorflow', 'numpy', 'keras'} & set(sys.modules))"
    )
    finished = run_python("-c", script, cwd=files, stdin=json.dumps([words for words, _ in BAD.values()]))
    assert finished.out == "{2} set()\n"
    assert finished.code == 0
    assert len(finished.errors) == sum(len(problems) for _, problems in BAD.values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--num_epochs=0"], {"num_epochs": 0}),
        (["--n_samples=1e9", "--seed=1_000"], {"n_samples": 10**9, "seed": 1000}),
        (["-c", "-3", "--mean", "-1e-3"], {"c": -3.0, "mean": -1e-3}),
        (["--noplots"], {"plots": False}),
        (["--plots=F"], {"plots": False}),
        (["--noplots", "--plots"], {"plots": True}),
        (["--seed=1", "--seed=2"], {"seed": 2}),
        (["--num_features=3", "--m=7"], {"num_features": 3, "m": (7.0, 7.0, 7.0)}),
        (["--num_features=2", "--m=7,-8"], {"num_features": 2, "m": (7.0, -8.0)}),
        (["--data=t.csv", "--target=y", "--features= a , b"], {"data": "t.csv", "target": "y", "features": ("a", "b")}),
        (["--data=--odd=name"], {"data": "--odd=name"}),
        (["--verbosity=1", "--seed=3", "--"], {"seed": 3}),
    ],
    ids=" ".join,
)
def test_good_flags(words: list[str], expected: dict[str, object], parse_flags: Callable[[Sequence[str]], TrainConfig]):
    assert parse_flags(words) == TrainConfig(**expected)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse_flags: Callable[..., TrainConfig]):
    """No shell expands `~` behind `=`, nor in a flagfile."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.flags").write_text("--run_dir=~/runs/x\n")
    config = parse_flags(["--flagfile=~/my.flags", "--data=~/t.csv", "--init_from", "~/old", "--target=~y"])
    assert config.run_dir == str(tmp_path / "runs" / "x")
    assert config.data == str(tmp_path / "t.csv")
    assert config.init_from == str(tmp_path / "old")
    assert config.target == "~y"
    assert parse_flags(["--data=tfds:~x", "--target=y"]).data == "tfds:~x"
    assert CommandLine(DoctorConfig, ["--run_dir=~/runs"]).options().run_dir == str(tmp_path / "runs")


def test_flagfiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse_flags: Callable[..., TrainConfig]):
    """Comments, blank lines, CRLF, a byte-order mark, an include, `~`; the last word on a flag wins."""
    (tmp_path / "inner").write_text("--seed=7\n--batch_size=3")
    (tmp_path / "outer").write_bytes(
        b"\xef\xbb\xbf# A comment.\r\n\r\n  // Another.\r\n--seed=5\r\n--flagfile=~/inner\r\n"
        b"\t-n_samples=50  \r\n--noplots\r\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {"seed": 7, "batch_size": 4, "n_samples": 50, "plots": False}
    outer = str(tmp_path / "outer")
    assert parse_flags([f"--flagfile={outer}", "--batch_size=4"]) == TrainConfig(**expected)
    assert parse_flags(["--batch_size=4", "-flagfile", outer]) == TrainConfig(**{**expected, "batch_size": 3})
    assert parse_flags([f"--flagfile={outer}"] * 2) == TrainConfig(**{**expected, "batch_size": 3})


def test_too_many_flagfiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse_flags: Callable[..., TrainConfig]):
    monkeypatch.chdir(tmp_path)
    for i in range(200):
        Path(f"{i}").write_text(f"--flagfile={i + 1}\n")
    with pytest.raises(InputError) as caught:
        parse_flags(["--flagfile=0"])
    assert [p.partition(": ")[2] for p in caught.value.problems] == [
        "--flagfile=100: is one of more than 100 flagfiles; write fewer, larger ones"
    ]


_texts = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1).map(str.strip)
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_FIELDS = {
    "data": _texts.filter(bool),
    "n_samples": st.integers(1, 2**62 - 1),
    "m": st.lists(_numbers, min_size=1, max_size=1).map(tuple),
    "c": _numbers,
    "std": _numbers.map(abs),
    "test_fraction": st.floats(0, 1, exclude_max=True),
    "seed": st.integers(0, 2**63 - 1),
    "fit_intercept": st.booleans(),
    "loss": st.sampled_from(["squared", "absolute", "huber"]),
    "mode": st.sampled_from(["full_batch", "mini_batch"]),
    "learning_rate": st.floats(0, exclude_min=True, allow_infinity=False),
    "num_virtual_devices": st.integers(0, 16),
    "run_dir": _texts.filter(lambda text: not text.startswith("gs://")),
    "tpu": _texts,
    "plots": st.booleans(),
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=_FIELDS), st.data())
def test_a_written_config_reads_back(tmp_path_factory: pytest.TempPathFactory, fields: dict, data: st.DataObject):
    if "m" in fields and data.draw(st.booleans()):
        fields |= {"num_features": 3, "m": fields["m"] + (0.1, -0.0)}
    config = TrainConfig(**fields)
    path = tmp_path_factory.getbasetemp() / "config.flags"
    path.write_text(config_to_flagfile(config), encoding="utf-8")
    again = CommandLine(TrainConfig, [f"--flagfile={path}"]).options()
    assert repr(again) == repr(config)  # Tells -0.0 from 0.0.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Everything:
    """Every kind of field that a flag can be made of, and a rest."""

    names: tuple[str, ...] = option((), "Names.")
    rate: float | str = option(0.5, "A number or a word.")
    command: tuple[str, ...] = option((), "Words.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--names="], _Everything()),
        (["--names=a,b c"], _Everything(names=("a", "b c"))),
        (['--names="a, b"," c "'], _Everything(names=("a, b", " c "))),
        (["--rate=auto"], _Everything(rate="auto")),
        (["--rate=1e-3"], _Everything(rate=0.001)),
        (["--", "train", "--help", "--", "--x"], _Everything(command=("train", "--help", "--", "--x"))),
    ],
)
def test_other_kinds_of_fields(words: list[str], expected: _Everything, tmp_path: Path):
    options = CommandLine(_Everything, words, rest="command").options()
    assert options == expected
    lines = [line for line in config_to_flagfile(options).splitlines(True) if not line.startswith("--command")]
    (tmp_path / "flags").write_text("".join(lines))
    again = CommandLine(_Everything, [f"--flagfile={tmp_path}/flags"]).options()
    assert (again.names, again.rate) == (expected.names, expected.rate)


def test_bad_values_of_other_kinds():
    with pytest.raises(InputError) as caught:
        CommandLine(_Everything, ['--names="a', "--rate=0.1.2"]).options()
    assert caught.value.problems == (
        '--names="a: must be names separated by commas, like x or x,"y, z"',
        "--rate=0.1.2: must be a number",
    )


_NASTY = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e400",
    "1e99",
    "9" * 400,
    "2.5",
    "1,2",
    ",",
    "\0",
    "\x1b[31m",
    "\n",
    "\udcff",
    " ",
]
_NASTY += [
    "true",
    "auto",
    "must",
    "moments",
    "=",
    "--",
    "--seed",
    "gs://x",
    "/dev/zero",
    "\u202e",
    "%s%n",
    "{}",
    "²",
    "\uff11",
]


def _mutated(rng: random.Random, text: str) -> str:
    """`text` after a few random cuts, copies and insertions."""
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(text) + 1)
        kept = rng.choice([text[at:], text[at + 1 :], text[:at] + text[at:]])
        text = text[:at] + rng.choice(["", rng.choice(_NASTY), chr(rng.randrange(1, 0x250))]) + kept
    return text


def _random_words(rng: random.Random, folder: Path) -> list[str]:
    defaults = {field.name: to_text(field.default) for field in dataclasses.fields(TrainConfig)}
    defaults |= {"flagfile": "fuzz.flags", "help": "", "noplots": ""}
    words = []
    for _ in range(rng.randrange(1, 6)):
        name, value = rng.choice(list(defaults.items()))
        if rng.random() < 0.5:
            value = rng.choice([*_NASTY, str(rng.uniform(-10, 10)), str(rng.randrange(10**6))])
        words += rng.choice(
            [[f"--{name}={value}"], [f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]]
        )
    words = [_mutated(rng, word) if rng.random() < 0.5 else word for word in words]
    if rng.random() < 0.3:
        path = folder / "fuzz.flags"
        text = "\n".join(words) + rng.choice(["", "\n--flagfile=fuzz.flags", f"\n--flagfile={path}", "\r\n"])
        content = bytearray(text.encode("utf-8", "surrogateescape"))
        for _ in range(rng.randrange(3) if content else 0):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        words = [f"--flagfile={path}"]
    return words


def test_fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Whatever the flags are, the exit code is a documented one and stderr holds nothing but tapedist's own lines."""
    monkeypatch.chdir(tmp_path)
    cases = int(os.environ.get("TAPEDIST_FUZZ_CASES", "2000"))
    accepted = 0
    for seed in range(cases):
        words = _random_words(random.Random(seed), tmp_path)
        trained: list[TrainConfig] = []
        started = time.monotonic()
        code = cli.main(["train", *words], commands=_train_into(trained))
        err = capsys.readouterr().err
        note = f"seed {seed}: {words!r}"
        assert code in (0, 2), note
        assert time.monotonic() - started < 2, note
        if code == 0:
            accepted += 1
            assert err == "", note
        else:
            lines = err.removesuffix("\n").split("\n")
            assert all(line.startswith("tapedist: error: ") and line.isprintable() for line in lines), note
    assert cases // 50 < accepted < cases


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], "auto"),
        (["--standardize"], "true"),
        (["--nostandardize"], "false"),
        (["--standardize=false"], "false"),
        (["--nostandardize", "--standardize=auto"], "auto"),
    ],
)
def test_a_switch_with_a_third_word(words: list[str], value: str):
    assert CommandLine(TrainConfig, words).options().standardize == value
