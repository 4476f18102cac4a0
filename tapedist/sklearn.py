"""`TapeRegressor`: tapedist's training as a scikit-learn estimator. Needs the extra `tapedist[sklearn]`.

Legend: `n` rows, `d` features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.data.frames import check_mask
from tapedist.regression.prediction import predict_rows
from tapedist.results.result import TrainResult


class TapeRegressor(RegressorMixin, BaseEstimator):
    """Linear regression by gradient descent, as `tapedist train` does it.

    Args:
        mode: see `tapedist train --help`, as for all others.
        num_epochs: epochs, at most; "auto" ends with the fit, or after 1,000 epochs where nothing tells when that is.
        batch_size: rows per update in mini-batch mode.
        learning_rate: step size; "auto" finds it from the rows, or is 0.1 where it is not known.
        optimizer: update rule.
        loss: per-example loss.
        l2: penalty on the weights.
        fit_intercept: whether to fit a bias.
        standardize: whether to train on columns of mean 0 and deviation 1; coefficients are in raw units either way.
        stop_at_se: stop within so many standard errors of the optimum; 0 does not, "auto" means 0.01 where the learning
            rate is found from the rows.
        dtype: compute type.
        init: initial parameters.
        random_state: the run's seed, an int.
        config: further fields of `TrainConfig` by name.

    Attributes:
        coef_: float64 `[d]`, raw units.
        intercept_: 0.0 without an intercept.
        n_features_in_: `d`.
        n_iter_: epochs done.
        result_: what `tapedist.train` returned.
    """

    def __init__(
        self,
        *,
        mode: str = "full_batch",
        num_epochs: int | str = "auto",
        batch_size: int = 1024,
        learning_rate: float | str = "auto",
        optimizer: str = "sgd",
        loss: str = "squared",
        l2: float = 0.0,
        fit_intercept: bool = True,
        standardize: bool = True,
        stop_at_se: float | str = "auto",
        dtype: str = "float64",
        init: str = "zeros",
        random_state: int = 0,
        config: dict[str, Any] | None = None,
    ):
        self.mode = mode
        self.num_epochs = num_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.loss = loss
        self.l2 = l2
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.stop_at_se = stop_at_se
        self.dtype = dtype
        self.init = init
        self.random_state = random_state
        self.config = config

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> TapeRegressor:
        """Fits the model to rows `X [n, d]` and targets `y [n]`.

        Raises:
            ValueError: if the arrays or the settings are not valid.
            DivergedError: if the loss left the finite numbers.
        """
        from tapedist.run.train import train

        for name, array in (("X", X), ("y", y), ("sample_weight", sample_weight)):
            check_mask(array, name)  # scikit-learn's own checks take what lies under a mask.
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        names = getattr(self, "feature_names_in_", None)
        labels = tuple(map(str, names)) if names is not None else tuple(f"x{j}" for j in range(X.shape[1]))
        source = ArraySource(X, np.asarray(y, np.float64), weights, feature_names=labels)
        settings = {name: value for name, value in self.get_params(deep=False).items() if name != "config"}
        settings["seed"] = settings.pop("random_state") or 0
        if self.learning_rate == "auto" and not (self.optimizer == "sgd" and self.loss in ("squared", "huber")):
            settings["learning_rate"] = 0.1
        if self.num_epochs == "auto" and settings["learning_rate"] != "auto":
            settings["num_epochs"] = 1000
        standard_errors = self.stop_at_se not in (0, "auto")
        settings = {"statistics": "auto" if standard_errors else "false", "test_fraction": 0.0, **settings}
        if self.mode == "mini_batch":
            settings["shuffle"] = "rows"
        result: TrainResult = train(TrainConfig(**{**settings, **(self.config or {})}), source=source)
        self.result_ = result
        self.coef_, self.intercept_, self.n_iter_ = result.weights, result.bias, result.epochs
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions `[n]` for rows `X [n, d]`.

        Raises:
            ValueError: if `X` has another number of features.
            NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        check_mask(X, "X")
        X = validate_data(self, X, dtype=np.float64, reset=False)
        fitted = self.result_
        if self.intercept_ == fitted.bias and np.array_equal(self.coef_, fitted.weights):
            return fitted.predict(X)
        return predict_rows(X, self.coef_, self.intercept_)
