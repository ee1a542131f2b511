"""Means and their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


@cache
def t_quantile(degrees: int, level: float = 0.05) -> float:
    """The two-sided point of Student's t beyond which a share `level` lies; by default the 95% point."""
    from scipy.special import stdtrit  # a tenth of the time that scipy.stats takes to import

    return float(stdtrit(degrees, 1 - level / 2))


def interval(values: ArrayLike) -> Interval:
    """The interval of the mean of independent values, by Student's t."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()) if len(array) else float("nan"), float("nan"), float("nan"))
    half = t_quantile(len(array) - 1) * float(array.std(ddof=1)) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(array.mean() - half), float(array.mean() + half))


def smoothed(series: Sequence[float] | NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The centred running mean, which skips NaN and is NaN where the series is."""
    values = np.asarray(series, dtype=np.float64)
    there = np.isfinite(values)
    kernel = np.ones(min(window, max(1, len(values))))
    total = np.convolve(np.where(there, values, 0.0), kernel, mode="same")
    count = np.convolve(there.astype(np.float64), kernel, mode="same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, total / count, np.nan)
