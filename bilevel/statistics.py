"""Means and their confidence intervals, for values that are few or that depend on their neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BATCHES = 8  # fewer give a poor standard error, more are too short to be independent of each other

# Student's t, two-sided 95%, for 1 to 30 degrees of freedom (any table of the distribution).
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; the ends are NaN where there are too few values to give one."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the mean is beyond doubt, as far as 95% is."""
        return self.known and (self.low > 0 or self.high < 0)

    def within(self, low: float, high: float) -> Interval:
        """The same, with ends that do not leave the possible values."""
        return Interval(self.mean, max(self.low, low), min(self.high, high)) if self.known else self


def t_quantile(degrees: int) -> float:
    """The two-sided 95% point of Student's t; beyond the table by one term of Cornish and Fisher (error below 0.005)."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.960 + 2.372 / degrees


def interval(values: ArrayLike) -> Interval:
    """The interval of the mean of independent values, by Student's t."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()) if len(array) else float("nan"), float("nan"), float("nan"))
    half = t_quantile(len(array) - 1) * float(array.std(ddof=1)) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(array.mean() - half), float(array.mean() + half))


def mean_and_error(series: ArrayLike) -> tuple[float, float]:
    """The mean of a series and its standard error, by batch means. The error is NaN for fewer than eight values.

    Neighboring steps of a run depend on each other; means over long stretches hardly do (Conway, "Some tactical problems
    in digital simulation", Management Science 1963).
    """
    values = np.asarray(series, dtype=np.float64)
    if len(values) < BATCHES:
        return (float(values.mean()) if len(values) else 0.0), float("nan")
    means = batch_means(values, BATCHES)
    return float(values.mean()), float(means.std(ddof=1) / np.sqrt(BATCHES))


def interval_of_series(series: ArrayLike) -> Interval:
    """The interval of the mean of a series whose neighbors depend on each other, by batch means and Student's t."""
    mean, error = mean_and_error(series)
    half = t_quantile(BATCHES - 1) * error
    return Interval(mean, mean - half, mean + half)


def batch_means(series: NDArray[np.float64], batches: int) -> NDArray[np.float64]:
    """The means over this many consecutive parts of about equal length. Shape: (steps, ...) -> (batches, ...)."""
    return np.array([part.mean(0) for part in np.array_split(series, batches)])


def smoothed(series: Sequence[float] | NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The centred running mean, which skips NaN and is NaN where the series is."""
    values = np.asarray(series, dtype=np.float64)
    there = np.isfinite(values)
    kernel = np.ones(min(window, max(1, len(values))))
    total = np.convolve(np.where(there, values, 0.0), kernel, mode="same")
    count = np.convolve(there.astype(np.float64), kernel, mode="same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, total / count, np.nan)
