"""A claim of the theory, and what is measured to see whether this code bears it out."""

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
    """Measured points on which a power law was fitted; log-log."""

    along: str
    xs: Sequence[float]
    ys: Sequence[float]
    fit: PowerLaw


@dataclass(frozen=True)
class Reading:
    """One number that was measured, and what it should be.

    quantity: what was measured.
    predicted, measured: None where only the deviation counts.
    accepted: where `measured` may lie; because: why so far from the prediction and no farther.
    deviation: largest relative distance from the exact values, where these are known; allowed: up to here.
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
    """A power law: the exponent within `within` of the prediction, and the points close to their exact values, if known.

    An exponent is blind to constants, and exact values show a wrong one. at_most: a smaller exponent will do as well.
    """
    xs, ys = [float(x) for x in xs], [float(y) for y in ys]
    fit = fit_power_law(xs, ys)
    away = None if exact is None else max(abs(y - float(e)) / abs(float(e)) for y, e in zip(ys, exact, strict=True))
    accepted = (-math.inf if at_most else predicted - within, predicted + within)
    return Reading(quantity, because, predicted, fit.exponent, accepted, away, allowed, curve=Curve(along, xs, ys, fit))


def agreement(quantity: str, measured: Tensor, exact: Tensor, allowed: float, because: str) -> Reading:
    """Two tensors are the same, up to `allowed` times the norm of the second."""
    away = float(torch.linalg.vector_norm(measured - exact) / torch.linalg.vector_norm(exact))
    return Reading(quantity, because, deviation=away, allowed=allowed)


def number(quantity: str, measured: float, predicted: float, within: float, because: str) -> Reading:
    """One number, to a relative accuracy of `within`."""
    low, high = sorted((predicted * (1 - within), predicted * (1 + within)))
    return Reading(quantity, because, predicted, measured, (low, high))


def bound(quantity: str, measured: float, low: float, high: float, because: str) -> Reading:
    """One number that has to lie between two others."""
    return Reading(quantity, because, None, measured, (low, high))


@dataclass
class Check(ABC):
    """A claim. Subclasses set the texts and measure.

    quick: measure fewer points: less sharp, in half the time.
    solver: the solver to measure; None takes the one that the claim is about.
    general: measure only what every penalty method promises, not what holds for the solver that the claim is about.

    statement, hypotheses, source, standing: the claim, when it is said to hold, who says so and with what right.
    seed: of everything random in the measurement.
    any_solver: the claim has a general form, so that a third-party solver can be measured.
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

    @abstractmethod
    def readings(self) -> Iterable[Reading]:
        """Measure."""
