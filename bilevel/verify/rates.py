"""Fit power laws to measured points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bilevel.statistics import t_quantile


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x ** exponent, fitted by least squares on the logarithms.

    low, high: the 95% confidence interval of the exponent. It measures the scatter around a straight line; points that lie
        on a curve (a transient, a floor) give a wide interval, too.
    """

    exponent: float
    factor: float
    low: float
    high: float


def fit_power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """Fit at least three points. Raises `ValueError`, naming the point, for one that has no logarithm.

    Zero is not a small number here: an error of exactly 0 means that two things that should differ are the same object.
    """
    if len(xs) != len(ys) or len(xs) < 3:
        raise ValueError(f"a power law needs at least three points, each with an x and a y; got {len(xs)} and {len(ys)}")
    for x, y in zip(xs, ys, strict=True):
        if not (0 < x < math.inf and 0 < y < math.inf):
            raise ValueError(f"the point ({x:g}, {y:g}) has no logarithm; every x and y must be positive and finite")
    u, v = np.log(xs), np.log(ys)
    spread = float(((u - u.mean()) ** 2).sum())
    if spread == 0:
        raise ValueError("all x are equal; an exponent cannot be fitted")
    exponent = float(((u - u.mean()) * (v - v.mean())).sum()) / spread
    intercept = float(v.mean() - exponent * u.mean())
    freedom = len(xs) - 2
    scatter = math.sqrt(float(((v - intercept - exponent * u) ** 2).sum()) / freedom / spread)
    half = t_quantile(freedom) * scatter
    return PowerLaw(exponent, math.exp(intercept), exponent - half, exponent + half)
