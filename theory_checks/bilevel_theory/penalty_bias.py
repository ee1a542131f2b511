"""The gradient that a penalty solver gives x is off by O(1/α)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import directions
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms
from bilevel_theory.instances import FASTEST, default_forms, random_x


class PenaltyBias(Check):
    """x is held until y and z have converged; then the solver's own step of x shows the gradient it uses."""

    statement = "‖∇L_α(x) - ∇Φ(x)‖ = O(1/α)"
    hypotheses = (
        "f, g smooth; g strongly convex in y with Lipschitz Hessian; α at least 10 times the curvature of f over that of g"
    )
    source = "Kwon et al. 2023 (2301.10945), Lemma 3.1"
    standing = "proved"
    any_solver = True

    def readings(self) -> Iterator[Reading]:
        """Measure the bias at one point over three decades of the penalty."""
        forms = QuadraticForms.random(5, 8, 2.0, seed=0) if self.general else default_forms()
        x = random_x(5)
        problem, truth = Quadratic.of(forms, x=x), forms.grad_phi(x)
        penalties = [float(α) for α in np.geomspace(1e2, 1e4 if self.general else 1e5, 4 if self.quick else 8)]
        if self.general:
            gradients = self._gradients(problem, penalties, hold=400, step=0.4)
            # some methods scale x's gradient, by 1/α for example: compare the best multiple
            yield exponent(
                "‖c ∇L_α - ∇Φ‖, best c", "α", penalties,
                [float(((g @ truth) / (g @ g) * g - truth).norm()) for g in gradients], -1, 0.1,
                "the next term of the expansion counts at α = 100; a faster fall is welcome", at_most=True,
            )  # fmt: skip
            return
        biases = [gradient - truth for gradient in self._gradients(problem, penalties, hold=90, step=FASTEST)]
        exact = [forms.bias(x, α) for α in penalties]
        yield exponent(
            "‖∇L_α - ∇Φ‖", "α", penalties, [float(bias.norm()) for bias in biases], -1, 0.05,
            "the next term of the expansion, 1/α², bends the line by .006 at α = 100",
        )  # fmt: skip
        yield Reading(
            "distance of ∇L_α - ∇Φ from -S'(αA + B)⁻¹s",
            deviation=max(float((bias - right).norm() / right.norm()) for bias, right in zip(biases, exact, strict=True)),
            allowed=1e-5,
            because="rounding errors of 1e-16 and what 90 lower steps leave are multiplied by α and compared with 1/α",
        )

    def _gradients(self, problem: Quadratic, penalties: Sequence[float], *, hold: int, step: float) -> list[Tensor]:
        found = directions(
            problem, self.solver or ScaleBiO, [{"penalty": α} for α in penalties], hold=hold, needs=("penalty",),
            lr_z=step, lr_y=step, lower_steps=1, p=1,
        )  # fmt: skip
        return [one.gradient for one in found]
