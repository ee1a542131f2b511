"""Claims of the theory, and the measurements that show whether this code bears them out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bilevel.solver import Solver
from bilevel.verify.rates import PowerLaw, fit_power_law

Standing = Literal["proved", "derived"]
"""Where a claim comes from: "proved" in the publication named, or "derived" here, from that publication's algorithm."""


@dataclass(frozen=True)
class Curve:
    """Measured points to which a power law was fitted, on logarithmic axes."""

    along: str
    xs: Sequence[float]
    ys: Sequence[float]
    fit: PowerLaw


@dataclass(frozen=True)
class Reading:
    """One number that was measured, and what it should be.

    quantity: what was measured.
    because: why it may be as far from the prediction as it may, and no farther.
    predicted, measured: the two values; None where only the deviation counts.
    accepted: the range in which `measured` may lie.
    deviation: the largest relative distance from the exact values, where these are known.
    allowed: the largest accepted deviation.
    curve: the points behind a fitted exponent.
    """

    quantity: str
    because: str
    predicted: float | None = None
    measured: float | None = None
    accepted: tuple[float, float] | None = None
    deviation: float | None = None
    allowed: float | None = None
    curve: Curve | None = None

    @property
    def holds(self) -> bool:
        """Whether everything that was measured is where it should be. NaN never is."""
        right = self.measured is None or (
            self.accepted is not None and self.accepted[0] <= self.measured <= self.accepted[1]
        )
        close = self.deviation is None or (self.allowed is not None and self.deviation <= self.allowed)
        return right and close


def exponent(
    quantity: str,
    along: str,
    xs: Sequence[float],
    ys: Sequence[float],
    predicted: float,
    within: float,
    because: str,
    *,
    exact: Sequence[float] | None = None,
    allowed: float | None = None,
    at_most: bool = False,
) -> Reading:
    """A power law whose exponent must be within `within` of the prediction, and whose points close to their exact values.

    exact: the exact values, if they are known. An exponent does not show a wrong constant; they do.
    allowed: the largest accepted relative distance from them.
    at_most: whether a smaller exponent is accepted as well.
    """
    xs, ys = [float(x) for x in xs], [float(y) for y in ys]
    fit = fit_power_law(xs, ys)
    away = None if exact is None else max(abs(y - float(e)) / abs(float(e)) for y, e in zip(ys, exact, strict=True))
    accepted = (-math.inf if at_most else predicted - within, predicted + within)
    return Reading(quantity, because, predicted, fit.exponent, accepted, away, allowed, curve=Curve(along, xs, ys, fit))


def agreement(quantity: str, measured: Tensor, exact: Tensor, allowed: float, because: str) -> Reading:
    """Two tensors that must be the same, up to `allowed` times the norm of the second."""
    away = float(torch.linalg.vector_norm(measured - exact) / torch.linalg.vector_norm(exact))
    return Reading(quantity, because, deviation=away, allowed=allowed)


def number(quantity: str, measured: float, predicted: float, within: float, because: str) -> Reading:
    """One number that must be as predicted, to a relative accuracy of `within`."""
    low, high = sorted((predicted * (1 - within), predicted * (1 + within)))
    return Reading(quantity, because, predicted, measured, (low, high))


def bound(quantity: str, measured: float, low: float, high: float, because: str) -> Reading:
    """One number that must lie between two others."""
    return Reading(quantity, because, None, measured, (low, high))


@dataclass
class Check(ABC):
    """A claim. Subclasses set the texts and measure.

    quick: measure fewer points, which is less sharp and takes half the time.
    solver: the solver to measure; None takes the one that the claim is about.
    general: measure only what every penalty method promises, not what holds for the solver that the claim is about.

    statement, hypotheses, source, standing: the claim, the conditions under which it holds, who states it, and whether it is
        proved there.
    seed: the seed of all random numbers in the measurement.
    any_solver: the claim has a general form, so that a third-party solver can be measured.
    specific: why it has none, where that is so.
    """

    quick: bool = False
    solver: type[Solver[Any]] | None = None
    general: bool = False

    statement: ClassVar[str]
    hypotheses: ClassVar[str]
    source: ClassVar[str]
    standing: ClassVar[Standing]
    seed: ClassVar[int] = 0
    any_solver: ClassVar[bool] = False
    specific: ClassVar[str] = "about the schedule and constants of one algorithm"

    @abstractmethod
    def readings(self) -> Iterable[Reading]:
        """Measure what the claim predicts."""
