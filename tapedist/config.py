"""What a run is: one frozen, keyword-only dataclass, validated on construction.

Each setting has its own rule, beside its declaration in `settings.py`; here are the rules between settings, and what
they mean together. Nothing downstream checks again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from tapedist.errors import InputError
from tapedist.options import Default
from tapedist.settings import SYNTHETIC, SYNTHETIC_FIELDS, Settings
from tapedist.text_values import shown

# Fields that do not change the answer, but what every worker must do for it.
_SHARED = (
    "num_epochs", "num_virtual_devices", "cache", "checkpoint_every_steps", "log_every_epochs", "eval_every_epochs",
    "statistics",
)  # fmt: skip


# The tutorial's own, which synthetic rows keep.
_TUTORIAL_RATE, _TUTORIAL_EPOCHS = 0.001, 3000
# Where a rule or a schedule ends the run, epochs are only a limit.
_MOST_EPOCHS, _MINI_BATCH_EPOCHS = 1_000_000, 100
_CLOSE = 0.01  # Standard errors that `--stop_at_se=auto` stands for.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of one training run that are right, each and together; the defaults are the tutorial job.

    Some defaults are the word auto, whose meaning depends on the rows, the model and the loss: `resolved` says which.

    Raises:
        InputError: if any field or combination is invalid; `problems` lists every one of them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def resolved(self, *, own_rows: bool = False, own_model: bool = False, own_loss: bool = False) -> TrainConfig:
        """This config with a value in the place of each auto that has one without a look at the rows.

        What still says auto afterwards is what gives a finished fit without a setting: the learning rate is found from
        the rows, training ends by `close_enough`, and `most_epochs` is only a limit.

        Args:
            own_rows: whether the rows are arrays or a source of the caller's, rather than `data`.
            own_model: whether the model is not the linear one.
            own_loss: whether the loss is the caller's, rather than `loss`.
        """
        of_user = own_rows or self.from_table
        rate: float | str = self.learning_rate
        if isinstance(rate, Default):
            known = of_user and not (own_model or own_loss) and not list(_rate_obstacles(self))
            rate = "auto" if known else _TUTORIAL_RATE
        finishes = of_user and rate == "auto"
        changes: dict[str, Any] = {"learning_rate": str(rate) if isinstance(rate, str) else rate}
        if self.stop_at_se == "auto" and not (finishes and self.mode == "full_batch"):
            changes["stop_at_se"] = 0.0
        if self.num_epochs == "auto" and not finishes:
            changes["num_epochs"] = _TUTORIAL_EPOCHS
        if self.init == "auto":
            changes["init"] = "zeros" if of_user else "normal"
        if self.standardize == "auto" and of_user:
            changes["standardize"] = "false" if own_model else "true"
        return dataclasses.replace(self, **changes)

    def with_arithmetic(self, strategy: str) -> TrainConfig:
        """This config with a value in the place of `--arithmetic=auto`.

        Args:
            strategy: the name of the one that was chosen.

        Raises:
            InputError: if there is no exact arithmetic where it was asked for.
        """
        if strategy == "tpu" and self.arithmetic == "exact":
            raise InputError(
                "--arithmetic=exact: a TPU has no IEEE float64 and no sums of int64, so that nothing there is exact; "
                "use --arithmetic=fast"
            )
        resolved = "fast" if strategy == "tpu" else "exact"
        return dataclasses.replace(self, arithmetic=resolved) if self.arithmetic == "auto" else self

    def without_survey(self) -> TrainConfig:
        """A resolved config for rows so wide that only the fastest full-batch rate can be found from them."""
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
        """What `split` means for this source: "index" or "hash"."""
        return {"auto": "hash" if self.from_table else "index"}.get(self.split, self.split)

    def without_effect(self) -> Iterator[str]:
        """What was set and says nothing, by reason; no error, because flagfiles are shared among runs."""
        idle = {
            f"--data={shown(self.data)}": (SYNTHETIC_FIELDS, self.from_table),
            f"--optimizer={self.optimizer}": (("momentum",), self.optimizer not in ("momentum", "nesterov")),
            f"--loss={self.loss}": (("huber_delta",), self.loss != "huber"),
        }
        for reason, (names, applies) in idle.items():
            changed = [name for name in names if applies and _changed(self, name)]
            if changed:
                listed = ", ".join(f"--{name}={shown(getattr(self, name))}" for name in changed)
                yield f"no effect with {reason}: {listed}"

    def without_effect_beside(self, source: Any) -> Iterator[str]:
        """`without_effect` where the rows come from the caller's own `source`: no setting names or splits them."""
        fields = ("data", "target", "features", "weight", "on_bad_rows", "test_fraction", "split", *SYNTHETIC_FIELDS)
        agrees = {"test_fraction"} if not self.test_fraction and not source.num_rows("test") else set()
        changed = [name for name in fields if _changed(self, name) and name not in agrees]
        if changed:
            listed = ", ".join(f"--{name}={shown(getattr(self, name))}" for name in changed)
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
        """The fields that must be equal on all workers of a run: the answer, and how often they wait for each other."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["changes_answer"] or field.name in _SHARED
        }

    def fingerprint(self) -> str:
        """SHA-256 of `answer_fields` as canonical JSON: equal where the answers are."""
        return hashlib.sha256(json.dumps(self.answer_fields(), sort_keys=True).encode()).hexdigest()

    def _wrong_combinations(self) -> Iterator[str]:
        yield from _wrong_rows(self)
        yield from _wrong_updates(self)
        yield from _wrong_stops(self)
        yield from _wrong_devices(self)
        yield from _wrong_folders(self)


def _changed(config: TrainConfig, name: str) -> bool:
    return set(_items(config, name)) != set(_items(Settings, name))


def _items(of: Any, name: str) -> tuple[Any, ...]:
    value = getattr(of, name)
    return value if isinstance(value, tuple) else (value,)


def _wrong_rows(config: TrainConfig) -> Iterator[str]:
    """What only tables, or only synthetic rows, have."""
    if not config.data:
        yield "--data=: must name a source; use 'synthetic' or a table's path"
    if len(config.m) not in (1, config.num_features):
        yield (
            f"--m={shown(config.m)}: has {len(config.m)} values for "
            f"--num_features={config.num_features}; give one value, or one per feature"
        )
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
    """Settings for which no rate can be found from the rows."""
    for name, known in (("optimizer", ("sgd",)), ("loss", ("squared", "huber"))):
        if getattr(config, name) not in known:
            yield f"--{name}={getattr(config, name)}"


def _wrong_stops(config: TrainConfig) -> Iterator[str]:
    if config.stop_at_se and config.stop_at_se != "auto":
        given = f"--stop_at_se={shown(config.stop_at_se)}"
        if config.loss != "squared":
            yield (
                f"{given}: needs --loss=squared, not {config.loss}, because standard errors belong to least squares; "
                "use --early_stop_gradient_norm"
            )
        if config.l2:
            yield (
                f"{given}: has no meaning with --l2={shown(config.l2)}, which leads away from the least-squares "
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
            f"--run_dir={shown(config.run_dir)}: must be a local path, because saving needs rename and fsync; "
            "train into a local folder and copy it out"
        )
    if config.init_from and config.init_from == config.run_dir:
        yield f"--init_from={shown(config.init_from)}: is --run_dir itself; a run continues by more --num_epochs"
    if config.resume == "must" and not config.run_dir:
        yield "--resume=must: needs --run_dir, the folder of the run to continue"
