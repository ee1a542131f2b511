"""At a fixed penalty a solver converges linearly, to a point O(1/α) away from the solution."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_theory.instances import mild_forms


class FixedPenalty(Check):
    """Start at x* and run until nothing moves."""

    statement = "‖x_∞ - x*‖ = O(1/α) and ‖∇Φ(x_∞)‖ = O(1/α)"
    hypotheses = "Φ strongly convex; fixed α; exact gradients"
    source = "from ‖∇L_α - ∇Φ‖ = O(1/α): Kwon et al. 2023 (2301.10945), Lemma 3.1"
    standing = "derived"

    def readings(self) -> Iterator[Reading]:
        """Measure where the solver ends, over two decades of the penalty."""
        forms = mild_forms()
        solution = forms.solution()
        curvature = float(torch.linalg.eigvalsh(forms.H)[-1])
        penalties = [float(α) for α in np.geomspace(1e2, 1e4, 3 if self.quick else 4)]
        solvers = [
            configure(
                self.solver or ScaleBiO, needs=("penalty", "lr_x"),
                penalty=α, lr_x=0.5 / curvature, lr_z=1.0, lr_y=1.0, lower_steps=2,
            )
            for α in penalties
        ]  # fmt: skip
        problem = Quadratic.of(forms, x=solution, y=forms.lower_solution(solution))
        with Session.of_many(problem, solvers) as session:
            session.step(STEPS)
            ends = session.values("x")
        exact = [forms.penalized_shift(α) for α in penalties]
        yield exponent(
            "‖x_∞ - x*‖", "α", penalties, [float((x - solution).norm()) for x in ends], -1, 0.05,
            "the next term of the expansion is 1/α²", exact=[float(shift.norm()) for shift in exact], allowed=1e-4,
        )  # fmt: skip
        yield exponent(
            "‖∇Φ(x_∞)‖", "α", penalties, [float(forms.grad_phi(x).norm()) for x in ends], -1, 0.05,
            "as above", exact=[float((shift @ forms.H).norm()) for shift in exact], allowed=1e-4,
        )  # fmt: skip


STEPS = 150
