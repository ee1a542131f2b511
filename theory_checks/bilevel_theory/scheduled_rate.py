"""What the claims about the schedules of F2SA and of F3SA have in common: three regimes of noise, and the solver itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from bilevel.schedule import at
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.f3sa import F3SA
from bilevel.testing.session import NotApplicable
from bilevel.verify.claims import Check, Reading
from bilevel_theory.instances import noisy_forms
from bilevel_theory.linear_system import LinearSystem, Order, StepSizes
from bilevel_theory.schedules import Schedule, rate_readings, solver_readings


class ScheduledRate(Check):
    """A solver's schedules on a quadratic with additive noise, by exact moments; then the solver against the moments.

    scheduled: the solver that the claim is about.
    order: in which order it moves x and the lower variables.
    regimes: (noise, as `for_noise` names it; its standard deviation in f; in g; the exponent of E‖∇Φ‖² in K).
    sampled_steps: steps over which the solver itself is run.
    """

    scheduled: ClassVar[type[F2SA | F3SA]]
    order: ClassVar[Order]
    regimes: ClassVar[tuple[tuple[str, float, float, float], ...]]
    sampled_steps: ClassVar[int]

    def readings(self) -> Iterator[Reading]:
        """Three regimes, and the solver in the first."""
        chosen: Any = self.solver or self.scheduled
        if not issubclass(chosen, self.scheduled):
            raise NotApplicable(f"{chosen.__name__} does not have the schedules of {self.scheduled.__name__}")
        last = 10_000 if self.quick else 30_000
        for noise, upper, lower, rate in self.regimes:
            system = LinearSystem(noisy_forms(), upper_noise=upper, lower_noise=lower, order=self.order)
            yield from rate_readings(
                f"noise in {noise}", system, schedule_of(_for_noise(chosen, noise)), rate=rate, first=last // 15, last=last,
                noisy=noise != "none",
            )  # fmt: skip
        system = LinearSystem(noisy_forms(), upper_noise=0.1, lower_noise=0.1, order=self.order)
        yield from solver_readings(
            _for_noise(chosen, "both"), system, schedule_of(_for_noise(self.scheduled, "both")),
            upper_noise=0.1, lower_noise=0.1, steps=200 if self.quick else self.sampled_steps, copies=800, seed=self.seed,
        )  # fmt: skip


def schedule_of(solver: F2SA | F3SA) -> Schedule:
    """The settings of step t, as the solver uses them."""
    assert solver.lr_x is not None
    lr_x = solver.lr_x

    def steps(t: int) -> StepSizes:
        γ = at(solver.lr_z, t)
        momentum = at(solver.momentum, t) if isinstance(solver, F3SA) else 1.0
        return StepSizes(penalty=at(solver.penalty, t), lr_y=γ / 2, lr_z=γ, lr_x=at(lr_x, t), momentum=momentum)

    return steps


def _for_noise(solver: Any, noise: str) -> F2SA | F3SA:
    made: F2SA | F3SA = solver.for_noise(noise, penalty=2.0, lr_z=0.8, xi=2.0, scale=10.0)
    return made
