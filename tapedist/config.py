"""The settings of a run: one frozen, keyword-only dataclass, validated on construction.

Each setting has its own rule in its declaration in `Settings`; `TrainConfig` adds the rules between settings and
resolves defaults. Nothing downstream checks again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

from tapedist.errors import InputError
from tapedist.options import (
    AT_LEAST_ONE,
    FINITE,
    FRACTION,
    INT64_MAX,
    NON_NEGATIVE_INT,
    NOT_NEGATIVE,
    POSITIVE,
    RANK_OR_NONE,
    SWITCHES,
    Default,
    Options,
    Rule,
    between,
    option,
)
from tapedist.text import display

# Fields that do not change the answer, but the calls of a worker, which must be the same on all of them.
_SHARED = (
    "num_epochs", "num_virtual_devices", "cache", "checkpoint_every_steps", "log_every_epochs", "eval_every_epochs",
    "statistics",
)  # fmt: skip


# The tutorial's values, the defaults for synthetic rows.
_TUTORIAL_RATE, _TUTORIAL_EPOCHS = 0.001, 3000
# Limits only, where a stopping rule or a schedule ends the run.
_MOST_EPOCHS, _MINI_BATCH_EPOCHS = 1_000_000, 100
_CLOSE = 0.01  # The standard errors of `--stop_at_se=auto`.
MODES = ("full_batch", "mini_batch")
ENGINES = ("auto", "stream", "moments")
STRATEGIES = ("auto", "default", "mirrored", "multiworker", "tpu")
OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam")
LOSSES = ("squared", "absolute", "huber")
DTYPES = ("float32", "float64")
SHUFFLES = ("auto", "rows", "batches", "none")
SPLITS = ("auto", "index", "hash")
INITS = ("auto", "normal", "zeros")
COLLECTIVES = ("auto", "nccl", "ring")
ARITHMETICS = ("auto", "exact", "fast")
CACHES = ("auto", "device", "none")
RESUMES = ("auto", "must", "never")
BAD_ROWS = ("error", "drop", "mean")
SYNTHETIC = "synthetic"
SYNTHETIC_FIELDS = ("n_samples", "num_features", "m", "c", "mean", "std", "noise_std")

# The first field of each group of flags in the help, with the group's heading.
GROUPS = {
    "data": "What the rows are",
    "fit_intercept": "What is fitted",
    "mode": "How it is fitted",
    "strategy": "Where it runs; none of these can change the answer",
    "run_dir": "What is kept and shown",
}

_NUMBERS = Rule(lambda v: len(v) > 0 and all(map(math.isfinite, v)), "must be finite numbers")
_EPOCHS = between(0, 2**53, means="evaluate the initial parameters")
_MOST_FEATURES = 512


def _or_auto(rule: Rule, text: str) -> Rule:
    """`rule`, or the word auto."""
    return Rule(lambda v: v == "auto" or (not isinstance(v, str) and rule.allows(v)), text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Settings of one training run, each valid by itself; the defaults are the tutorial job."""

    # What the rows are.
    data: str = option(
        "synthetic", "Where rows come from: 'synthetic', a table's path, or 'tfds:NAME[/CONFIG]'.", path=True
    )
    target: str = option("", "Column of a table to predict.")
    features: tuple[str, ...] = option((), "Columns of a table to predict from; empty takes all other numeric ones.")
    weight: str = option("", "Column of a table that holds row weights; empty weighs all rows alike.")
    on_bad_rows: str = option(
        "error", "Bad cells of a table: stop, drop their rows, or put the column's mean there.", choices=BAD_ROWS
    )
    n_samples: int = option(10_000, "Rows of the synthetic source, both splits together.", rule=between(1, 2**62 - 1))
    num_features: int = option(1, "Features of the synthetic source.", rule=between(1, 2**20))
    m: tuple[float, ...] = option((9.0,), "True weights of the synthetic source; one value is repeated.", rule=_NUMBERS)
    c: float = option(-2.0, "True bias of the synthetic source.", rule=FINITE)
    mean: float = option(0.0, "Mean of the synthetic features.", rule=FINITE)
    std: float = option(1.0, "Standard deviation of the synthetic features.", rule=NOT_NEGATIVE)
    noise_std: float = option(1.0, "Standard deviation of the synthetic noise.", rule=NOT_NEGATIVE)
    test_fraction: float = option(0.2, "Share of rows held out as the test split, in [0, 1).", rule=FRACTION)
    split: str = option("auto", "How rows are split: by index or by a stable hash of the row number.", choices=SPLITS)
    seed: int = option(0, "Seed of the rows, their order and the initial parameters.", rule=between(0, INT64_MAX))

    # What is fitted.
    fit_intercept: bool = option(True, "Whether the model has a bias.")
    standardize: str = option(
        "auto",
        "Work on features of mean 0 and deviation 1 and a target of mean 0; results stay in raw units. auto: on for "
        "tables, off for synthetic.",
        choices=SWITCHES,
    )
    init: str = option("auto", "Initial parameters; auto: zeros for tables, normal for synthetic.", choices=INITS)
    init_from: str = option("", "Folder of a run whose parameters to start from, in place of --init.", path=True)
    loss: str = option("squared", "Per-example loss.", choices=LOSSES)
    huber_delta: float = option(1.0, "Where the huber loss turns from squared to linear.", rule=POSITIVE)
    l2: float = option(
        0.0, "L2 penalty: l2 * sum(weights**2) is added to the loss; never on the bias.", rule=NOT_NEGATIVE
    )
    dtype: str = option("float32", "Compute type; the parameters are float64 masters either way.", choices=DTYPES)

    # How it is fitted.
    mode: str = option("full_batch", "One update per epoch, or one per batch.", choices=MODES)
    full_batch_engine: str = option("auto", "How a full-batch epoch is computed.", choices=ENGINES)
    num_epochs: int | str = option(
        "auto",
        "Visits to every training row, at most; may grow on resume. auto: as many as --stop_at_se=auto needs, up to "
        "1000000; 100 in mini-batch mode; 3000 for synthetic rows and where --learning_rate is a number.",
        rule=_or_auto(_EPOCHS, f"{_EPOCHS.text}, or auto"),
        changes_answer=False,
    )
    batch_size: int = option(1024, "Rows per update over ALL replicas, in mini-batch mode.", rule=between(1, 2**40))
    learning_rate: float | str = option(
        Default("auto"),
        "Step size. auto: for squared error with sgd in full batch the fastest stable rate; for huber and for "
        "mini-batches with sgd a safe rate in the metric of the columns' covariance. Where it is not given, auto for a "
        "linear model on tables if it is known, else 0.001.",
        rule=_or_auto(POSITIVE, f"{POSITIVE.text}, or auto; try 0.001"),
    )
    optimizer: str = option("sgd", "Update rule.", choices=OPTIMIZERS)
    momentum: float = option(0.9, "Momentum of the momentum and nesterov optimizers, in [0, 1).", rule=FRACTION)
    adam_beta_1: float = option(0.9, "Decay of adam's first moment, in [0, 1).", rule=FRACTION)
    adam_beta_2: float = option(0.999, "Decay of adam's second moment, in [0, 1).", rule=FRACTION)
    adam_epsilon: float = option(1e-7, "Adam's guard against division by zero.", rule=POSITIVE)
    shuffle: str = option(
        "auto", "Order of the rows in mini-batch mode; auto: batches if synthetic, else rows.", choices=SHUFFLES
    )
    stop_at_se: float | str = option(
        "auto",
        "Stop when every parameter is within so many standard errors of the optimum; 0 does not. auto: 0.01 for tables "
        "in full batch with --learning_rate=auto, else 0.",
        rule=_or_auto(NOT_NEGATIVE, f"{NOT_NEGATIVE.text}, or auto; try 0.01"),
    )
    early_stop_patience: int = option(
        0, "Stop after so many checks in a row without a better test loss; 0 does not.", rule=NON_NEGATIVE_INT
    )
    early_stop_gradient_norm: float = option(
        0.0,
        "Stop when the norm of the loss's gradient over all training rows is at most this; 0 does not.",
        rule=NOT_NEGATIVE,
    )
    early_stop_every_epochs: int = option(
        10, "Epochs between the checks of the rules that stop early.", rule=AT_LEAST_ONE
    )
    arithmetic: str = option(
        "auto",
        "exact: the same bits on any number of devices, any processor and in any order of rows; fast: "
        "whatever is the fastest here. auto: exact, but fast on TPUs, which cannot be exact.",
        choices=ARITHMETICS,
    )

    # Where it runs. None of these can change the answer.
    strategy: str = option(
        "auto", "tf.distribute strategy; auto picks by the devices found.", choices=STRATEGIES, changes_answer=False
    )
    num_virtual_devices: int = option(
        0,
        "Split the CPU into this many logical devices; 0 leaves it whole.",
        rule=between(0, 256),
        changes_answer=False,
    )
    tpu: str = option("local", "TPU address for --strategy=tpu.", changes_answer=False)
    workers: tuple[str, ...] = option(
        (), "Addresses of all processes, host:port each, in rank order; TF_CONFIG and SLURM come first.",
        changes_answer=False,
    )  # fmt: skip
    worker_index: int = option(
        -1, "This process's place in --workers; -1 where it has none.", rule=RANK_OR_NONE, changes_answer=False
    )
    cluster_timeout_secs: float = option(
        300.0, "How long to wait for all workers at the start, in seconds.", rule=POSITIVE, changes_answer=False
    )
    peer_timeout_secs: float = option(
        60.0,
        "How long to wait for a silent worker before giving it up, in seconds.",
        rule=Rule(lambda v: 1 <= v < math.inf, "must be finite and at least 1"),
        changes_answer=False,
    )
    collective: str = option(
        "auto",
        "How replicas exchange their sums: nccl, which needs GPUs, or ring; auto: nccl where all replicas are GPUs.",
        choices=COLLECTIVES,
        changes_answer=False,
    )
    cache: str = option(
        "auto", "Keep the training rows in device memory, or stream them.", choices=CACHES, changes_answer=False
    )
    scratch_dir: str = option(
        "",
        "Folder for the rows of a table that does not fit into memory; empty takes the system's temporary folder.",
        changes_answer=False,
        path=True,
    )
    steps_per_call: int = option(
        0,
        "Updates per compiled call; 0 aims at half a second a call.",
        rule=between(0, 2**31, means="automatic"),
        changes_answer=False,
    )

    # What is kept and shown.
    run_dir: str = option(
        "", "Folder for metrics, checkpoints and plots; empty keeps nothing.", changes_answer=False, path=True
    )
    resume: str = option(
        "auto", "Continue the run in --run_dir: if there is one, only if there is one, or never.",
        choices=RESUMES, changes_answer=False,
    )  # fmt: skip
    checkpoint_every_secs: float = option(
        60.0, "Seconds between saves; 0 saves only at the end.", rule=NOT_NEGATIVE, changes_answer=False
    )
    checkpoint_every_steps: int = option(
        0, "Updates between saves; 0 leaves it to the clock.", rule=NON_NEGATIVE_INT, changes_answer=False
    )
    log_every_epochs: int = option(10, "Epochs between loss lines.", rule=AT_LEAST_ONE, changes_answer=False)
    statistics: str = option(
        "auto",
        "Compute the least-squares optimum and standard errors of a linear model. auto: where it is quick, and for "
        "tables of up to 14 features, where it takes about as long as opening the table.",
        choices=SWITCHES,
        changes_answer=False,
    )
    eval_every_epochs: int = option(
        0,
        "Epochs between test losses; 0 evaluates at the end only.",
        rule=Rule(NON_NEGATIVE_INT.allows, "must be 0 (at the end only) or more"),
        changes_answer=False,
    )
    plots: bool = option(True, "Draw the figures at the end.", changes_answer=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of one training run, validated each and together; the defaults are the tutorial job.

    Some defaults are the word auto, whose meaning depends on the rows, the model and the loss; see `resolved`.

    Raises:
        InputError: if any field or combination is invalid; `problems` lists every one of them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.m) != self.num_features:
            object.__setattr__(self, "m", self.m * self.num_features)

    @property
    def from_table(self) -> bool:
        """Returns whether rows come from a table rather than from the synthetic source."""
        return self.data != SYNTHETIC

    @property
    def standardizes(self) -> bool:
        """`standardize`, resolved for this source."""
        return self.from_table if self.standardize == "auto" else self.standardize == "true"

    def resolved(
        self, *, custom_rows: bool = False, custom_model: bool = False, custom_loss: bool = False
    ) -> TrainConfig:
        """Resolves each auto that does not depend on the rows.

        An auto that is left is for a finished fit without settings: the learning rate is found from the rows, training
        ends by `close_enough`, and `most_epochs` is only a limit.

        Args:
            custom_rows: whether the rows are arrays or a source of the caller's, rather than `data`.
            custom_model: whether the model is not the linear one.
            custom_loss: whether the loss is the caller's, rather than `loss`.
        """
        of_user = custom_rows or self.from_table
        rate: float | str = self.learning_rate
        if isinstance(rate, Default):
            known = of_user and not (custom_model or custom_loss) and not list(_rate_obstacles(self))
            rate = "auto" if known else _TUTORIAL_RATE
        finishes = of_user and rate == "auto"
        # `str` makes a plain word of a `Default`: it counts as resolved from here on.
        changes: dict[str, Any] = {"learning_rate": str(rate) if isinstance(rate, str) else rate}
        if self.stop_at_se == "auto" and not (finishes and self.mode == "full_batch"):
            changes["stop_at_se"] = 0.0
        if self.num_epochs == "auto" and not finishes:
            changes["num_epochs"] = _TUTORIAL_EPOCHS
        if self.init == "auto":
            changes["init"] = "zeros" if of_user else "normal"
        if self.standardize == "auto" and of_user:
            changes["standardize"] = "false" if custom_model else "true"
        return dataclasses.replace(self, **changes)

    def with_arithmetic(self, strategy: str) -> TrainConfig:
        """Resolves `--arithmetic=auto`.

        Args:
            strategy: the name of the chosen one.

        Raises:
            InputError: if `--arithmetic=exact` is not possible there.
        """
        if strategy == "tpu" and self.arithmetic == "exact":
            raise InputError(
                "--arithmetic=exact: a TPU has no IEEE float64 and no sums of int64, so that nothing there is exact; "
                "use --arithmetic=fast"
            )
        resolved = "fast" if strategy == "tpu" else "exact"
        return dataclasses.replace(self, arithmetic=resolved) if self.arithmetic == "auto" else self

    def without_survey(self) -> TrainConfig:
        """A resolved config for rows so wide that only the fastest full-batch rate is found from them."""
        changes: dict[str, Any] = {"stop_at_se": 0.0} if self.stop_at_se == "auto" else {}
        if self.num_epochs == "auto":
            changes["num_epochs"] = _TUTORIAL_EPOCHS
        if self.learning_rate == "auto" and (self.mode == "mini_batch" or self.loss != "squared"):
            changes["learning_rate"] = _TUTORIAL_RATE
        return dataclasses.replace(self, **changes)

    @property
    def close_enough(self) -> float:
        """Standard errors from the optimum at which a resolved config's training ends; 0 if it does not."""
        return _CLOSE if isinstance(self.stop_at_se, str) else self.stop_at_se

    @property
    def most_epochs(self) -> int:
        """Epochs after which a resolved config's training ends."""
        if isinstance(self.num_epochs, str):
            return _MINI_BATCH_EPOCHS if self.mode == "mini_batch" else _MOST_EPOCHS
        return self.num_epochs

    @property
    def split_kind(self) -> str:
        """`split`, resolved for this source: "index" or "hash"."""
        return {"auto": "hash" if self.from_table else "index"}.get(self.split, self.split)

    def without_effect(self) -> Iterator[str]:
        """Yields notices about settings without effect; no error, because flagfiles are shared among runs."""
        idle = {
            f"--data={display(self.data)}": (SYNTHETIC_FIELDS, self.from_table),
            f"--optimizer={self.optimizer}": (("momentum",), self.optimizer not in ("momentum", "nesterov")),
            f"--loss={self.loss}": (("huber_delta",), self.loss != "huber"),
        }
        for reason, (names, applies) in idle.items():
            changed = [name for name in names if applies and _changed(self, name)]
            if changed:
                listed = ", ".join(f"--{name}={display(getattr(self, name))}" for name in changed)
                yield f"no effect with {reason}: {listed}"

    def without_effect_beside(self, source: Any) -> Iterator[str]:
        """`without_effect` for rows from a custom `source`, which no setting names or splits."""
        fields = ("data", "target", "features", "weight", "on_bad_rows", "test_fraction", "split", *SYNTHETIC_FIELDS)
        agrees = {"test_fraction"} if not self.test_fraction and not source.num_rows("test") else set()
        changed = [name for name in fields if _changed(self, name) and name not in agrees]
        if changed:
            listed = ", ".join(f"--{name}={display(getattr(self, name))}" for name in changed)
            split = "; ArraySource(..., test_rows=N) holds rows out" if "test_fraction" in changed else ""
            yield f"no effect with rows from a source of your own: {listed}{split}"
        own = dataclasses.replace(self, **{name: getattr(Settings, name) for name in fields})
        yield from own.without_effect()

    def answer_fields(self) -> dict[str, Any]:
        """The fields whose values can change the fitted parameters, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["changes_answer"]
        }

    def shared_fields(self) -> dict[str, Any]:
        """The fields that must be equal on all workers of a run: those of the answer, and of the workers' calls."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["changes_answer"] or field.name in _SHARED
        }

    def fingerprint(self) -> str:
        """SHA-256 of `answer_fields` as canonical JSON."""
        return hashlib.sha256(json.dumps(self.answer_fields(), sort_keys=True).encode()).hexdigest()

    def _wrong_combinations(self) -> Iterator[str]:
        yield from _wrong_rows(self)
        yield from _wrong_updates(self)
        yield from _wrong_stops(self)
        yield from _wrong_devices(self)
        yield from _wrong_folders(self)


def _changed(config: TrainConfig, name: str) -> bool:
    # As sets, because a single value of `--m` is repeated for each feature.
    return set(_items(config, name)) != set(_items(Settings, name))


def _items(of: Any, name: str) -> tuple[Any, ...]:
    value = getattr(of, name)
    return value if isinstance(value, tuple) else (value,)


def _wrong_rows(config: TrainConfig) -> Iterator[str]:
    """Yields errors about settings that only tables, or only synthetic rows, have."""
    if not config.data:
        yield "--data=: must name a source; use 'synthetic' or a table's path"
    if len(config.m) not in (1, config.num_features):
        yield (
            f"--m={display(config.m)}: has {len(config.m)} values for "
            f"--num_features={config.num_features}; give one value, or one per feature"
        )
    if config.from_table:
        return
    for name in ("target", "features", "weight"):
        if value := getattr(config, name):
            yield (
                f"--{name}={display(value)}: has no meaning with --data={SYNTHETIC}, which has no columns to choose; "
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


def _wrong_updates(config: TrainConfig) -> Iterator[str]:
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
    obstacles = list(_rate_obstacles(config))
    if config.learning_rate == "auto" and not isinstance(config.learning_rate, Default) and obstacles:
        yield (
            f"--learning_rate=auto: is known only for squared error and huber with plain sgd, not for "
            f"{', '.join(obstacles)}; give a number"
        )


def _rate_obstacles(config: TrainConfig) -> Iterator[str]:
    """Yields settings with which no rate can be found from the rows."""
    for name, known in (("optimizer", ("sgd",)), ("loss", ("squared", "huber"))):
        if getattr(config, name) not in known:
            yield f"--{name}={getattr(config, name)}"


def _wrong_stops(config: TrainConfig) -> Iterator[str]:
    if config.stop_at_se and config.stop_at_se != "auto":
        given = f"--stop_at_se={display(config.stop_at_se)}"
        if config.loss != "squared":
            yield (
                f"{given}: needs --loss=squared, not {config.loss}, because standard errors belong to least squares; "
                "use --early_stop_gradient_norm"
            )
        if config.l2:
            yield (
                f"{given}: has no meaning with --l2={display(config.l2)}, which leads away from the least-squares "
                "optimum; use --early_stop_gradient_norm"
            )
        if config.statistics == "false":
            yield f"{given}: needs --statistics; drop --statistics=false"
    if config.early_stop_patience and not config.test_fraction:
        yield (
            f"--early_stop_patience={config.early_stop_patience}: needs test rows; give --test_fraction above 0, "
            "or use --early_stop_gradient_norm"
        )


def _wrong_devices(config: TrainConfig) -> Iterator[str]:
    if config.collective == "nccl" and config.num_virtual_devices:
        yield (
            f"--collective=nccl: needs GPUs, and --num_virtual_devices={config.num_virtual_devices} computes on the "
            "CPU; drop one of them"
        )
    if config.num_virtual_devices > 1 and config.strategy in ("default", "tpu"):
        yield (
            f"--num_virtual_devices={config.num_virtual_devices}: has no meaning with "
            f"--strategy={config.strategy}; use --strategy=mirrored"
        )


def _wrong_folders(config: TrainConfig) -> Iterator[str]:
    if config.run_dir.startswith("gs://"):
        yield (
            f"--run_dir={display(config.run_dir)}: must be a local path, because saving needs rename and fsync; "
            "train into a local folder and copy it out"
        )
    if config.init_from and config.init_from == config.run_dir:
        yield f"--init_from={display(config.init_from)}: is --run_dir itself; a run continues by more --num_epochs"
    if config.resume == "must" and not config.run_dir:
        yield "--resume=must: needs --run_dir, the folder of the run to continue"


def why_not_moments(config: TrainConfig, *, num_features: int, is_linear: bool, custom_loss: bool) -> str:
    """The reason why the `moments` engine cannot compute a run; empty if it can."""
    if not is_linear:
        return "the model is not the linear one"
    if custom_loss or config.loss != "squared":
        return "the loss is not squared error"
    if num_features > _MOST_FEATURES:
        return f"{num_features} features are more than {_MOST_FEATURES}"
    return ""
