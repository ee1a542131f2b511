"""ScaleBiO with steps and penalty chosen for the horizon K: the mean of E‖∇Φ‖² over the run falls as K^(-2/7)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import configure
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_theory.instances import noisy_forms
from bilevel_theory.linear_system import LinearSystem, StepSizes
from bilevel_theory.schedules import balance_readings, solver_readings

NOISE = 0.03


class FiniteHorizon(Check):
    """Constant settings for each K, by exact moments; then the solver against the moments, at the smallest K."""

    statement = "(1/K) Σ E‖∇Φ(x_k)‖² ~ K^(-2/7), with α ~ K^(1/7), steps K^(-4/7) of z and K^(-5/7) of x"
    hypotheses = "f smooth, g strongly convex; noise in both levels; one loop, one sample a step"
    source = (
        "the form of ScaleBiO (2406.19976) is that of F2SA, whose rate is proved (2301.10945); exponents as balanced there"
    )
    standing = "derived"

    def readings(self) -> Iterator[Reading]:
        """The mean over runs of several horizons, the terms of the rate at long ones, and the solver against the moments."""
        forms = noisy_forms()
        system = LinearSystem(forms, upper_noise=NOISE, lower_noise=NOISE, order="together")
        horizons = [int(K) for K in np.geomspace(600, 2400 if self.quick else 9600, 3 if self.quick else 5)]
        means = []
        for K in horizons:
            steps = settings(K)
            run = system.run(system.equilibrium(steps.penalty), [steps] * K)
            means.append(float(np.mean([moments.squared_gradient() for moments in run])))
        yield exponent(
            "mean E‖∇Φ‖²", "K", horizons, means, -2 / 7, 0.1, "the variance of x falls faster than the bias and still counts"
        )
        yield from balance_readings("noise in both", system, settings, rate=-2 / 7, noisy=True, along="K")
        steps = settings(horizons[0])
        solver = configure(self.solver or ScaleBiO, penalty=steps.penalty, lr_z=steps.lr_z, lr_y=steps.lr_y, lr_x=steps.lr_x)
        yield from solver_readings(
            solver, system, lambda t: steps, upper_noise=NOISE, lower_noise=NOISE,
            steps=200 if self.quick else 300, copies=800, seed=self.seed,
        )  # fmt: skip


def settings(K: int) -> StepSizes:
    """α = 2 K^(1/7), steps of 4 K^(-4/7) for z, half of that for y, and 2 K^(-5/7) for x."""
    lr_z = 4 * K ** (-4 / 7)
    return StepSizes(penalty=2 * K ** (1 / 7), lr_y=lr_z / 2, lr_z=lr_z, lr_x=2 * K ** (-5 / 7))
