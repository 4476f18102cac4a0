"""The settings of a training run: all that a user can say about one, with what it means and what it may be.

A setting is a field here and nowhere else; its flag, its line in `tapedist train --help` and the check of its value
follow from it. `TrainConfig` adds the rules between settings.
"""

from __future__ import annotations

import dataclasses
import math

from tapedist.options import (
    COUNT,
    EVERY,
    FINITE,
    FRACTION,
    INT64_MAX,
    NOT_NEGATIVE,
    POSITIVE,
    RANK,
    SWITCHES,
    Default,
    Options,
    Rule,
    between,
    option,
)

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


def _or_auto(rule: Rule, text: str) -> Rule:
    """`rule`, or the word auto."""
    return Rule(lambda v: v == "auto" or (not isinstance(v, str) and rule.allows(v)), text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Settings of one training run, right each by itself; the defaults are the tutorial job."""

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
        0, "Stop after so many checks in a row without a better test loss; 0 does not.", rule=COUNT
    )
    early_stop_gradient_norm: float = option(
        0.0,
        "Stop when the norm of the loss's gradient over all training rows is at most this; 0 does not.",
        rule=NOT_NEGATIVE,
    )
    early_stop_every_epochs: int = option(10, "Epochs between the checks of the rules that stop early.", rule=EVERY)
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
        -1, "This process's place in --workers; -1 where it has none.", rule=RANK, changes_answer=False
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
        0, "Updates between saves; 0 leaves it to the clock.", rule=COUNT, changes_answer=False
    )
    log_every_epochs: int = option(10, "Epochs between loss lines.", rule=EVERY, changes_answer=False)
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
        rule=Rule(COUNT.allows, "must be 0 (at the end only) or more"),
        changes_answer=False,
    )
    plots: bool = option(True, "Draw the figures at the end.", changes_answer=False)
