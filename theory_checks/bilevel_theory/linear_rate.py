"""At a fixed penalty, with a strongly convex Φ, x converges linearly, at the rate of gradient descent on L_α."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from bilevel.solvers.f2ba import F2BA
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, agreement, number
from bilevel_problems.quadratic import Quadratic
from bilevel_theory.instances import mild_forms
from bilevel_theory.linear_system import LinearSystem, StepSizes


class LinearRate(Check):
    """F2BA with many lower steps against the rate of exact ones; ScaleBiO's single loop against its own exact rate."""

    statement = "‖x_k - x_∞‖ falls by the factor 1 - η λ_min(∇²L_α) a step, and ‖∇Φ‖ ≤ ε takes O(log 1/ε) steps"
    hypotheses = "L_α strongly convex; fixed α and η; lower steps of order κ log(ακ)"
    source = "the two time scales of Chen, Ma, Zhang 2025 (2306.14853), on a quadratic"
    standing = "derived"

    def readings(self) -> Iterator[Reading]:
        """Measure the factors and a whole trajectory."""
        forms, α = mild_forms(), 100.0
        problem = Quadratic.of(forms)
        curvatures = torch.linalg.eigvalsh(forms.penalized_hessian(α))
        rest = forms.solution() + forms.penalized_shift(α)
        η = 1.0 / float(curvatures[-1])

        solver = configure(F2BA, penalty=α, lr_z=1.0, lr_y=1.0, lr_x=η, lower_steps=30)
        with Session(problem, solver) as session:
            session.step(20)
            before = (session.values("x") - rest).norm()
            session.step(10)
            factor = float(((session.values("x") - rest).norm() / before) ** 0.1)
        yield number(
            "factor a step, 30 lower steps", factor, 1 - η * float(curvatures[0]), 1e-3,
            "30 lower steps leave 1e-5 of the lower error, which α multiplies",
        )  # fmt: skip

        system = LinearSystem(forms, upper_noise=0, lower_noise=0, order="together")
        steps = StepSizes(penalty=α, lr_y=1.0, lr_z=1.0, lr_x=η / 4)
        solver = configure(self.solver or ScaleBiO, penalty=α, lr_z=1.0, lr_x=η / 4)
        with Session(problem, solver) as session:
            session.step(20)
            early = torch.cat([session.values(name) for name in ("x", "y", "z")])
            session.step(280)
            x = session.values("x")
            session.step(20)
            factor = float(((session.values("x") - rest).norm() / (x - rest).norm()) ** (1 / 20))
        yield number(
            "factor a step, single loop", factor, system.factor(steps), 1e-3,
            "the power iteration has converged to 1e-4 after 300 steps",
        )  # fmt: skip
        start = np.concatenate([problem.start_x, problem.start_y, problem.start_y])
        *_, moments = system.run(start, [steps] * 20)
        yield agreement(
            "(x, y, z) after 20 single-loop steps", early, torch.from_numpy(moments.mean), 1e-10,
            "both are the same affine map, computed in another order; α = 100 multiplies rounding",
        )  # fmt: skip
