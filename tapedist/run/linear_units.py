"""The units that a linear model is trained in, by what its rows say before training; without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tapedist.config import TrainConfig
from tapedist.data.catalog import check_target
from tapedist.data.exact_moments import exact_moments
from tapedist.data.orders import Source
from tapedist.data.ranges import ranges
from tapedist.data.standardize import ColumnMoments, RawUnits, StandardUnits
from tapedist.data.standardize import check_squares as check_column_squares
from tapedist.regression.summary import Survey, survey, surveyed_moments


def linear_units(
    config: TrainConfig, source: Source, *, own_loss: bool, surveyed: bool, heed: Callable[[], bool]
) -> tuple[RawUnits | StandardUnits, Survey | None]:
    """The units that the masters of a linear model are in, and what is known of the rows.

    A feature that is a linear combination of others is left out, so that what is fitted has one optimum, which does not
    depend on where training starts.
    """
    if not surveyed and not config.standardizes:
        return RawUnits(), None
    known = ranges(source, "train", heed=heed)
    check_column_squares(source, known)
    moments = surveyed_moments(source, known, heed) if surveyed else None
    columns = ColumnMoments.of_exact(moments or exact_moments(source, known, products=False, heed=heed))
    if config.standardizes and not own_loss:
        check_target(config, source, columns)
    found = survey(source, moments, fit_intercept=config.fit_intercept) if moments else None
    left_out: Sequence[int] = ()
    if surveyed:
        left_out = found.fit.aliased if found else columns.constant()
    if not config.standardizes:
        units = StandardUnits.raw(source.num_features, fit_intercept=config.fit_intercept, left_out=left_out)
        return units, found
    # The target may only be shifted where the loss is known to depend on the difference alone.
    units = StandardUnits.of(
        source, fit_intercept=config.fit_intercept, center_target=not own_loss, left_out=left_out, columns=columns
    )
    return units, found
