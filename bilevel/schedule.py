"""Step sizes and penalties as functions of the step: they have no state and no increments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, cast

from pydantic import Field
from pydantic.dataclasses import dataclass

from bilevel.per_run import PerRun
from bilevel.ranges import Count, Finite, NonNegative, Positive


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `floor` at `steps`, and `floor` from there on."""

    peak: NonNegative
    steps: Count
    warmup: int = 0
    floor: NonNegative = 0.0
    name: Literal["cosine"] = "cosine"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be at least 0 and below steps ({self.steps})")

    def __call__(self, t: int) -> float:
        """The value at step t."""
        if t < self.warmup:
            return self.peak * (t + 1) / self.warmup
        progress = min(1.0, (t - self.warmup) / (self.steps - self.warmup))
        return self.floor + (self.peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Power:
    """start * (1 + t / scale) ** exponent: the form of the F2SA schedules.

    A growing penalty has a positive exponent (1/7 where both levels are noisy, arXiv 2301.10945), a decaying step size a
    negative one. `scale` is the number of steps after which growth sets in. The value never passes `bound`.
    """

    start: NonNegative
    exponent: Finite
    scale: Positive = 1.0
    bound: NonNegative | None = None
    name: Literal["power"] = "power"

    def __call__(self, t: int) -> float:
        """Value at step t."""
        try:
            value: float = self.start * math.pow(1.0 + t / self.scale, self.exponent)
        except OverflowError:
            value = math.inf
        if self.bound is None:
            return value
        return min(value, self.bound) if self.exponent > 0 else max(value, self.bound)


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line over `steps`, and `end` from there on."""

    start: NonNegative
    end: NonNegative
    steps: Count
    name: Literal["linear"] = "linear"

    def __call__(self, t: int) -> float:
        """Value at step t."""
        return self.start + (self.end - self.start) * min(1.0, t / self.steps)


Schedule = NonNegative | Annotated[Cosine | Power | Linear, Field(discriminator="name")] | Callable[[int], float]
"""A constant, one of the classes above, or any function of the step (from Python)."""


class EachRun:
    """A schedule for each of several runs that go side by side; its values are `PerRun`s."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self.schedules = tuple(schedules)

    def __call__(self, t: int) -> float:
        """The values at step t."""
        return cast(float, PerRun.of([at(own, t) for own in self.schedules]))  # a solver takes them for a number


def at(schedule: Schedule, t: int) -> float:
    """The value of a schedule at step t (from 0). Raises `ValueError` if it is negative or not finite."""
    if isinstance(schedule, EachRun):
        return schedule(t)
    value = float(schedule(t)) if callable(schedule) else float(schedule)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"the schedule {schedule!r} is {value} at step {t}; step sizes and penalties must be finite and not negative"
        )
    return value
