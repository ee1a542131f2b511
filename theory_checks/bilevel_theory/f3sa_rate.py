"""F3SA's momentum improves the rates to K^(-2/5), K^(-1/2), K^(-2/3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bilevel.schedule import at
from bilevel.solver import Solver
from bilevel.solvers.f3sa import F3SA
from bilevel.testing.session import NotApplicable
from bilevel.verify.claims import Check, Reading
from bilevel_theory.instances import noisy_forms
from bilevel_theory.linear_system import LinearSystem, Steps
from bilevel_theory.schedules import Schedule, rate_readings, solver_readings


class F3SARate(Check):
    """As for F2SA, with the noise of the estimates instead of that of single gradients."""

    statement = "E‖∇Φ(x_K)‖² ~ K^(-2/5), K^(-1/2), K^(-2/3) with noise in both levels, in the upper one, in none"
    hypotheses = "as for F2SA; gradients of single samples smooth, which STORM momentum needs"
    source = "Kwon et al. 2023 (2301.10945), abstract: ε^(-5/2), ε^(-4/2), ε^(-3/2) for E‖∇Φ‖² ≤ ε; steps by balance"
    standing = "proved"

    def readings(self) -> Iterator[Reading]:
        """Three regimes, and the solver in the first."""
        cls: type[F3SA] = _of_its_kind(self.solver) if self.solver else F3SA
        last = 10_000 if self.quick else 30_000
        for noise, upper, lower, rate in (
            ("both", 0.1, 0.1, -2 / 5),
            ("upper", 0.1, 0.0, -1 / 2),
            ("none", 0.0, 0.0, -2 / 3),
        ):
            solver = cls.for_noise(noise, penalty=2.0, lr_z=0.8, xi=2.0, scale=10.0)  # type: ignore[arg-type]
            system = LinearSystem(noisy_forms(), upper_noise=upper, lower_noise=lower, order="together")
            yield from rate_readings(
                f"noise in {noise}", system, schedule_of(solver), rate=rate, first=last // 15, last=last,
                noise=None if noise == "none" else rate,
            )  # fmt: skip
        solver = cls.for_noise("both", penalty=2.0, lr_z=0.8, xi=2.0, scale=10.0)
        system = LinearSystem(noisy_forms(), upper_noise=0.1, lower_noise=0.1, order="together")
        yield from solver_readings(
            solver, system, schedule_of(F3SA.for_noise("both", penalty=2.0, lr_z=0.8, xi=2.0, scale=10.0)),
            upper_noise=0.1, lower_noise=0.1, steps=200 if self.quick else 500, copies=400, seed=self.seed,
        )  # fmt: skip


def schedule_of(solver: F3SA) -> Schedule:
    """The settings of step t, as the solver uses them."""
    assert solver.lr_x is not None
    lr_x = solver.lr_x

    def steps(t: int) -> Steps:
        γ = at(solver.lr_z, t)
        return Steps(at(solver.penalty, t), γ / 2, γ, at(lr_x, t), at(solver.momentum, t))

    return steps


def _of_its_kind(solver: type[Solver[Any]]) -> type[F3SA]:
    if not issubclass(solver, F3SA):
        raise NotApplicable(f"{solver.__name__} has not the schedules of F3SA")
    return solver
