"""What a run is: one frozen, keyword-only dataclass, validated on construction.

Everything a user can say about a training run is a field of `TrainConfig`; `flags.py` derives the command-line
flags from these fields, so a name, a default or a help text is written here and nowhere else. No TensorFlow, no
absl: a bad value is refused in milliseconds, and all bad values at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterator, Sequence
from typing import Any

from tapedist.errors import InputError
from tapedist.text_values import shown, written

MODES = ("full_batch", "mini_batch")
ENGINES = ("auto", "stream", "moments")
STRATEGIES = ("auto", "default", "mirrored", "multiworker", "tpu")
OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam")
LOSSES = ("squared", "absolute", "huber")
DTYPES = ("float32", "float64")
SHUFFLES = ("auto", "rows", "batches", "none")
SPLITS = ("auto", "index", "hash")
INITS = ("normal", "zeros")
CACHES = ("auto", "device", "none")
RESUMES = ("auto", "must", "never")
BAD_ROWS = ("error", "drop", "mean")
SWITCHES = ("auto", "true", "false")
SYNTHETIC = "synthetic"

_INT64_MAX = 2**63 - 1

# Fields that do not change the answer, but what every worker must do for it.
_SHARED = (
    "num_epochs", "num_virtual_devices", "cache", "checkpoint_every_steps", "log_every_epochs", "eval_every_epochs",
    "statistics",
)  # fmt: skip


# The first field of each group of flags in the help, with the group's heading.
GROUPS = {
    "data": "What the rows are",
    "fit_intercept": "What is fitted",
    "mode": "How it is fitted",
    "strategy": "Where it runs; none of these can change the answer",
    "run_dir": "What is kept and shown",
}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    changes_answer: bool = True,
) -> Any:
    """A config field with what `flags.py` needs to make a flag of it.

    Args:
        default: the field's default.
        help: one sentence; it becomes the flag's help text.
        choices: the allowed words, for an enumeration.
        changes_answer: whether another value may change the fitted parameters. Only such fields enter
            `TrainConfig.fingerprint`, so only they are held against a stored run on resume.
    """
    metadata = {"help": help, "choices": choices, "changes_answer": changes_answer}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run; the defaults are the tutorial job.

    Field help lives in each field's metadata and is what `tapedist train --help` prints.

    Raises:
        InputError: if any field or combination is invalid; `problems` lists every one of them.
    """

    # What the rows are.
    data: str = option("synthetic", "Where rows come from: 'synthetic', a table's path, or 'tfds:NAME[/CONFIG]'.")
    target: str = option("", "Column of a table to predict.")
    features: tuple[str, ...] = option((), "Columns of a table to predict from; empty takes all other numeric ones.")
    weight: str = option("", "Column of a table that holds row weights; empty weighs all rows alike.")
    on_bad_rows: str = option(
        "error", "Bad cells of a table: stop, drop their rows, or put the column's mean there.", choices=BAD_ROWS
    )
    n_samples: int = option(10_000, "Rows of the synthetic source, both splits together.")
    num_features: int = option(1, "Features of the synthetic source.")
    m: tuple[float, ...] = option((9.0,), "True weights of the synthetic source; one value is repeated.")
    c: float = option(-2.0, "True bias of the synthetic source.")
    mean: float = option(0.0, "Mean of the synthetic features.")
    std: float = option(1.0, "Standard deviation of the synthetic features.")
    noise_std: float = option(1.0, "Standard deviation of the synthetic noise.")
    test_fraction: float = option(0.2, "Share of rows held out as the test split, in [0, 1).")
    split: str = option("auto", "How rows are split: by index or by a stable hash of the row number.", choices=SPLITS)
    seed: int = option(0, "Seed of the rows, their order and the initial parameters.")

    # What is fitted.
    fit_intercept: bool = option(True, "Whether the model has a bias.")
    standardize: str = option(
        "auto",
        "Work on columns of mean 0 and deviation 1; results stay in raw units. auto: on for tables, off for synthetic.",
        choices=SWITCHES,
    )
    init: str = option("normal", "Initial parameters.", choices=INITS)
    init_from: str = option("", "Folder of a run whose parameters to start from, in place of --init.")
    loss: str = option("squared", "Per-example loss.", choices=LOSSES)
    huber_delta: float = option(1.0, "Where the huber loss turns from squared to linear.")
    l2: float = option(0.0, "L2 penalty: l2 * sum(weights**2) is added to the loss; never on the bias.")
    dtype: str = option("float32", "Compute type; the parameters are float64 masters either way.", choices=DTYPES)

    # How it is fitted.
    mode: str = option("full_batch", "One update per epoch, or one per batch.", choices=MODES)
    full_batch_engine: str = option("auto", "How a full-batch epoch is computed.", choices=ENGINES)
    num_epochs: int = option(3000, "Visits to every training row; may grow on resume.", changes_answer=False)
    batch_size: int = option(1024, "Rows per update over ALL replicas, in mini-batch mode.")
    learning_rate: float | str = option(
        0.001, "Step size; auto takes the fastest rate for squared error with sgd in full batch."
    )
    optimizer: str = option("sgd", "Update rule.", choices=OPTIMIZERS)
    momentum: float = option(0.9, "Momentum of the momentum and nesterov optimizers, in [0, 1).")
    adam_beta_1: float = option(0.9, "Decay of adam's first moment, in [0, 1).")
    adam_beta_2: float = option(0.999, "Decay of adam's second moment, in [0, 1).")
    adam_epsilon: float = option(1e-7, "Adam's guard against division by zero.")
    shuffle: str = option(
        "auto", "Order of the rows in mini-batch mode; auto: batches if synthetic, else rows.", choices=SHUFFLES
    )
    stop_at_se: float = option(
        0.0, "Stop when every parameter is within so many standard errors of the optimum; 0 does not."
    )
    early_stop_patience: int = option(0, "Stop after so many checks in a row without a better test loss; 0 does not.")
    early_stop_gradient_norm: float = option(
        0.0, "Stop when the norm of the loss's gradient over all training rows is at most this; 0 does not."
    )
    early_stop_every_epochs: int = option(10, "Epochs between the checks of the rules that stop early.")
    virtual_shards: int = option(16, "Parts that every sum is cut into, whatever the hardware.")

    # Where it runs. None of these can change the answer.
    strategy: str = option(
        "auto", "tf.distribute strategy; auto picks by the devices found.", choices=STRATEGIES, changes_answer=False
    )
    num_virtual_devices: int = option(
        0, "Split the CPU into this many logical devices; 0 leaves it whole.", changes_answer=False
    )
    tpu: str = option("local", "TPU address for --strategy=tpu.", changes_answer=False)
    workers: tuple[str, ...] = option(
        (), "Addresses of all processes, host:port each, in rank order; TF_CONFIG and SLURM come first.",
        changes_answer=False,
    )  # fmt: skip
    worker_index: int = option(-1, "This process's place in --workers; -1 where it has none.", changes_answer=False)
    cluster_timeout_secs: float = option(
        300.0, "How long to wait for all workers at the start, in seconds.", changes_answer=False
    )
    peer_timeout_secs: float = option(
        60.0, "How long to wait for a silent worker before giving it up, in seconds.", changes_answer=False
    )
    cache: str = option(
        "auto", "Keep the training rows in device memory, or stream them.", choices=CACHES, changes_answer=False
    )
    steps_per_call: int = option(0, "Updates per compiled call; 0 aims at half a second a call.", changes_answer=False)

    # What is kept and shown.
    run_dir: str = option("", "Folder for metrics, checkpoints and plots; empty keeps nothing.", changes_answer=False)
    resume: str = option(
        "auto", "Continue the run in --run_dir: if there is one, only if there is one, or never.",
        choices=RESUMES, changes_answer=False,
    )  # fmt: skip
    checkpoint_every_secs: float = option(60.0, "Seconds between saves; 0 saves only at the end.", changes_answer=False)
    checkpoint_every_steps: int = option(0, "Updates between saves; 0 leaves it to the clock.", changes_answer=False)
    log_every_epochs: int = option(10, "Epochs between loss lines.", changes_answer=False)
    statistics: str = option(
        "auto",
        "Compute the least-squares optimum and standard errors of a linear model. auto: where it is quick, and for "
        "tables of up to 14 features, where it takes about as long as opening the table.",
        choices=SWITCHES,
        changes_answer=False,
    )
    eval_every_epochs: int = option(0, "Epochs between test losses; 0 evaluates at the end only.", changes_answer=False)
    plots: bool = option(True, "Draw the figures at the end.", changes_answer=False)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise InputError(*problems)
        if len(self.m) != self.num_features:
            object.__setattr__(self, "m", self.m * self.num_features)

    @property
    def from_table(self) -> bool:
        """Whether rows come from a table rather than from the synthetic source."""
        return self.data != SYNTHETIC

    @property
    def standardizes(self) -> bool:
        """What `standardize` means for this source."""
        return self.from_table if self.standardize == "auto" else self.standardize == "true"

    @property
    def split_kind(self) -> str:
        """What `split` means for this source: "index" or "hash"."""
        return {"auto": "hash" if self.from_table else "index"}.get(self.split, self.split)

    def answer_fields(self) -> dict[str, Any]:
        """The fields whose values can change the fitted parameters, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["changes_answer"]
        }

    def shared_fields(self) -> dict[str, Any]:
        """The fields that must be equal on all workers of a run: the answer, and how often they wait for each other."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["changes_answer"] or field.name in _SHARED
        }

    def fingerprint(self) -> str:
        """SHA-256 of `answer_fields` as canonical JSON: equal where the answers are."""
        return hashlib.sha256(json.dumps(self.answer_fields(), sort_keys=True).encode()).hexdigest()


def _problems(config: TrainConfig) -> Iterator[str]:
    """Everything wrong with `config`, in reading order."""
    yield from _wrong_types(config)
    if any(_wrong_types(config)):
        return  # The rules below compare numbers.
    yield from _wrong_words(config)
    yield from _wrong_numbers(config)
    yield from _wrong_combinations(config)


def _wrong_types(config: TrainConfig) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        try:
            object.__setattr__(config, field.name, _coerced_field(value, field))
        except (TypeError, ValueError, OverflowError):
            listed = "a list of numbers" if field.type == "tuple[float, ...]" else "a list of names"
            wanted = listed if kind is tuple else f"of type {kind.__name__}"
            yield f"--{field.name}={value!r}: must be {wanted}, not {type(value).__name__}"


def _coerced_field(value: Any, field: dataclasses.Field[Any]) -> Any:
    """`value` as the field's type; a library user may write a switch as a bool, and one name without a list."""
    if field.metadata["choices"] == SWITCHES and isinstance(value, bool):
        return written(value)
    if field.type == "float | str" and isinstance(value, str):
        return value
    if field.type == "tuple[str, ...]":
        return tuple(_coerced(item, str) for item in (value if isinstance(value, (tuple, list)) else (value,)))
    return _coerced(value, type(field.default))


def _coerced(value: Any, kind: type) -> Any:
    """`value` as exactly `kind`, where that loses nothing: NumPy scalars, paths and lists come from library users.

    Raises:
        TypeError: if `value` is something else.
        OverflowError: if it is too large for a float.
    """
    if kind is tuple:
        return tuple(_coerced(item, float) for item in (value if isinstance(value, (tuple, list)) else (value,)))
    if kind is str and not isinstance(value, bytes):
        return os.fspath(value)
    if (kind is bool) != isinstance(value, bool) or isinstance(value, (str, bytes)):
        raise TypeError
    return operator.index(value) if kind is int else kind(value)


def _wrong_words(config: TrainConfig) -> Iterator[str]:
    for field in dataclasses.fields(config):
        choices, value = field.metadata["choices"], getattr(config, field.name)
        if choices and value not in choices:
            yield f"--{field.name}={shown(value)}: must be one of {', '.join(choices)}"
        for word in value if field.type == "tuple[str, ...]" else (value,):
            if isinstance(word, str) and (not word.isprintable() or word != word.strip()) and not choices:
                yield f"--{field.name}={word!r}: must not hold control characters, nor blanks at its ends; rename it"
    if not config.data:
        yield "--data=: must name a source; use 'synthetic' or a table's path"
    if config.run_dir.startswith("gs://"):
        yield (
            f"--run_dir={shown(config.run_dir)}: must be a local path, because saving needs rename and fsync; "
            "train into a local folder and copy it out"
        )


# name -> (test, rule): each numeric field's own range.
_RANGES: dict[str, tuple[Any, str]] = {
    "n_samples": (lambda v: 1 <= v <= _INT64_MAX // 2, "must be from 1 to 2**62 - 1"),
    "num_features": (lambda v: 1 <= v <= 2**20, "must be from 1 to 2**20"),
    "m": (lambda v: len(v) > 0 and all(map(math.isfinite, v)), "must be finite numbers"),
    "c": (math.isfinite, "must be finite"),
    "mean": (math.isfinite, "must be finite"),
    "std": (lambda v: 0 <= v < math.inf, "must be finite and not negative"),
    "noise_std": (lambda v: 0 <= v < math.inf, "must be finite and not negative"),
    "test_fraction": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "seed": (lambda v: 0 <= v <= _INT64_MAX, "must be from 0 to 2**63 - 1"),
    "huber_delta": (lambda v: 0 < v < math.inf, "must be finite and above 0"),
    "l2": (lambda v: 0 <= v < math.inf, "must be finite and not negative"),
    "num_epochs": (lambda v: 0 <= v <= 2**53, "must be from 0 (evaluate the initial parameters) to 2**53"),
    "batch_size": (lambda v: 1 <= v <= 2**40, "must be from 1 to 2**40"),
    "learning_rate": (
        lambda v: v == "auto" or (not isinstance(v, str) and 0 < v < math.inf),
        "must be finite and above 0, or auto; try 0.001",
    ),
    "momentum": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "adam_beta_1": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "adam_beta_2": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "adam_epsilon": (lambda v: 0 < v < math.inf, "must be finite and above 0"),
    "stop_at_se": (lambda v: 0 <= v < math.inf, "must be finite and not negative; try 0.01"),
    "early_stop_patience": (lambda v: 0 <= v <= _INT64_MAX, "must not be negative"),
    "early_stop_gradient_norm": (lambda v: 0 <= v < math.inf, "must be finite and not negative"),
    "early_stop_every_epochs": (lambda v: 1 <= v <= _INT64_MAX, "must be at least 1"),
    "virtual_shards": (lambda v: 1 <= v <= 4096, "must be from 1 to 4096"),
    "num_virtual_devices": (lambda v: 0 <= v <= 256, "must be from 0 to 256"),
    "worker_index": (lambda v: v >= -1, "must be -1 (none) or more"),
    "cluster_timeout_secs": (lambda v: 0 < v < math.inf, "must be finite and above 0"),
    "peer_timeout_secs": (lambda v: 1 <= v < math.inf, "must be finite and at least 1"),
    "steps_per_call": (lambda v: 0 <= v <= 2**31, "must be from 0 (automatic) to 2**31"),
    "checkpoint_every_secs": (lambda v: 0 <= v < math.inf, "must be finite and not negative"),
    "checkpoint_every_steps": (lambda v: 0 <= v <= _INT64_MAX, "must not be negative"),
    "log_every_epochs": (lambda v: 1 <= v <= _INT64_MAX, "must be at least 1"),
    "eval_every_epochs": (lambda v: 0 <= v <= _INT64_MAX, "must be 0 (at the end only) or more"),
}


def _wrong_numbers(config: TrainConfig) -> Iterator[str]:
    for name, (test, rule) in _RANGES.items():
        value = getattr(config, name)
        if not test(value):
            yield f"--{name}={shown(value)}: {rule}"


def _wrong_combinations(config: TrainConfig) -> Iterator[str]:
    if len(config.m) not in (1, config.num_features):
        yield (
            f"--m={shown(config.m)}: has {len(config.m)} values for "
            f"--num_features={config.num_features}; give one value, or one per feature"
        )
    if config.full_batch_engine == "moments" and config.loss != "squared":
        yield (
            f"--full_batch_engine=moments: needs --loss=squared, not {config.loss}, because only squared error "
            "is a function of the second moments; use --full_batch_engine=stream"
        )
    if config.full_batch_engine != "auto" and config.mode == "mini_batch":
        yield (
            f"--full_batch_engine={config.full_batch_engine}: has no meaning with --mode=mini_batch; "
            "drop it or use --mode=full_batch"
        )
    if config.num_virtual_devices > config.virtual_shards:
        yield (
            f"--num_virtual_devices={config.num_virtual_devices}: must not exceed "
            f"--virtual_shards={config.virtual_shards}, because every replica owns at least one shard; "
            "lower one or raise the other"
        )
    if config.num_virtual_devices > 1 and config.strategy in ("default", "tpu"):
        yield (
            f"--num_virtual_devices={config.num_virtual_devices}: has no meaning with "
            f"--strategy={config.strategy}; use --strategy=mirrored"
        )
    yield from _wrong_for_source(config)
    if config.stop_at_se and config.loss != "squared":
        yield (
            f"--stop_at_se={shown(config.stop_at_se)}: needs --loss=squared, not {config.loss}, because standard "
            "errors belong to least squares; use --early_stop_gradient_norm"
        )
    if config.stop_at_se and config.l2:
        yield (
            f"--stop_at_se={shown(config.stop_at_se)}: has no meaning with --l2={shown(config.l2)}, which leads away "
            "from the least-squares optimum; use --early_stop_gradient_norm"
        )
    if config.stop_at_se and config.statistics == "false":
        yield f"--stop_at_se={shown(config.stop_at_se)}: needs --statistics; drop --statistics=false"
    if config.init_from and config.init_from == config.run_dir:
        yield f"--init_from={shown(config.init_from)}: is --run_dir itself; a run continues by more --num_epochs"
    if config.early_stop_patience and not config.test_fraction:
        yield (
            f"--early_stop_patience={config.early_stop_patience}: needs test rows; give --test_fraction above 0, "
            "or use --early_stop_gradient_norm"
        )
    if config.learning_rate == "auto":
        obstacles = [
            f"--{name}={getattr(config, name)}"
            for name, needed in (("mode", "full_batch"), ("optimizer", "sgd"), ("loss", "squared"))
            if getattr(config, name) != needed
        ]
        if obstacles:
            yield (
                f"--learning_rate=auto: is known only for squared error with plain sgd in full batch, not for "
                f"{', '.join(obstacles)}; give a number"
            )
    if config.resume == "must" and not config.run_dir:
        yield "--resume=must: needs --run_dir, the folder of the run to continue"


def _wrong_for_source(config: TrainConfig) -> Iterator[str]:
    """Settings that only tables, or only synthetic rows, have."""
    if config.from_table:
        return
    for name in ("target", "features", "weight"):
        if value := getattr(config, name):
            yield (
                f"--{name}={shown(value)}: has no meaning with --data={SYNTHETIC}, which has no columns to choose; "
                "name your table by --data=PATH"
            )
    if config.on_bad_rows != "error":
        yield (
            f"--on_bad_rows={config.on_bad_rows}: has no meaning with --data={SYNTHETIC}, which has no bad rows; "
            "name your table by --data=PATH"
        )
    if config.split == "hash":
        yield (
            f"--split=hash: has no meaning with --data={SYNTHETIC}, whose rows are independent draws; use --split=index"
        )
