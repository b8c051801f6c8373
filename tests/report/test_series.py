"""Thinned curves are short, and look like the whole ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mlomae.report.series import MAX_POINTS, Series


def series(values: NDArray[np.float64]) -> Series:
    return Series(np.arange(1, len(values) + 1) * 10, values)


def test_short_series_stay_as_they_are() -> None:
    short = series(np.arange(MAX_POINTS, dtype=np.float64))
    assert short.thinned() is short


@pytest.mark.parametrize("total", [601, 1000, 10_000])
@pytest.mark.parametrize("gaps", [False, True])
def test_thinned_series_keep_ends_extremes_and_gaps(total: int, gaps: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(total)
    values[total // 3], values[total // 2] = 50, -50
    if gaps:
        values[rng.integers(1, total - 1, total // 50)] = np.nan
        values[200:400] = np.nan
    whole, thin = series(values), series(values).thinned()
    assert len(thin.values) <= MAX_POINTS
    assert (np.diff(thin.steps) > 0).all()
    assert (thin.steps[0], thin.steps[-1]) == (10, 10 * total)
    assert np.nanmax(thin.values) == np.nanmax(values) and np.nanmin(thin.values) == np.nanmin(values)
    assert np.isnan(thin.values).any() == gaps
    # Each point is one of the series.
    np.testing.assert_array_equal(thin.values, whole.values[thin.steps // 10 - 1])


def test_every_stretch_keeps_its_spike() -> None:
    values = np.zeros(6000)
    values[7::50] = 1  # one in each 50 points
    thin = series(values).thinned()
    assert (thin.values == 1).sum() >= 100


def test_nothing_but_gaps() -> None:
    thin = series(np.full(2000, np.nan)).thinned()
    assert len(thin.values) <= MAX_POINTS and np.isnan(thin.values).all()
    assert not len(thin.finite())
