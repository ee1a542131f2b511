"""The two lower variables are O(1/α) apart, and the gap of their losses is O(1/α²)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import NotApplicable, directions
from bilevel.verify.claims import Check, Reading, bound, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms
from bilevel_theory.instances import FASTEST, default_forms, random_x


class LowerDistance(Check):
    """Run the solver's lower steps, with x held, until y and z no longer move."""

    statement = "‖y*_α - y*‖ ≤ ‖∇_y f(x, y*)‖ / (αμ); g(y*_α) - g(y*) = O(1/α²); |L_α - Φ| = O(1/α)"
    hypotheses = "f smooth and convex in y; g smooth, μ-strongly convex in y"
    source = "strong convexity; bounds of this form: Chen, Ma, Zhang 2025 (2306.14853), Shen, Chen 2023 (2302.05185)"
    standing = "derived"
    any_solver = True

    def readings(self) -> Iterator[Reading]:
        """Measure distances, gap and value at one point over three decades of the penalty."""
        if self.general:
            yield self._general()
            return
        forms = default_forms()
        x = random_x(5)
        penalties = [float(α) for α in np.geomspace(1e2, 1e5, 4 if self.quick else 7)]
        distances, gaps, values = [], [], []
        cases = [{"penalty": α} for α in penalties]
        every = directions(Quadratic.of(forms, x=x), self.solver or ScaleBiO, cases, hold=90, lr_z=FASTEST)
        for α, found in zip(penalties, every, strict=True):
            y, z = found.lower["y"], found.lower["z"]
            distances.append(float((y - z).norm()))
            gaps.append(float(forms.g(x, y) - forms.g(x, z)))
            upper, gap = found.metrics["upper_loss"], found.metrics["gap"]
            assert isinstance(upper, float)
            assert isinstance(gap, float)
            values.append(float(forms.phi(x)) - upper - α * gap)
        resolvents = [torch.linalg.solve(α * forms.A + forms.B, forms.slope(x)) for α in penalties]
        yield exponent(
            "‖y - z‖", "α", penalties, distances, -1, 0.05, "the next term of the expansion is 1/α²",
            exact=[float(r.norm()) for r in resolvents], allowed=1e-5,
        )  # fmt: skip
        μ = float(torch.linalg.eigvalsh(forms.A)[0])
        yield bound(
            "‖y - z‖ αμ / ‖∇_y f‖",
            max(d * α * μ / float(forms.slope(x).norm()) for d, α in zip(distances, penalties, strict=True)),
            0.0,
            1.0,
            "the bound itself; it is not attained, so nothing is allowed for rounding",
        )
        yield exponent(
            "g(y) - g(z)", "α", penalties, gaps, -2, 0.05, "as above; g has about 5 digits left at α = 1e5",
            exact=[float(forms.value_gap(x, α)) for α in penalties], allowed=1e-3,
        )  # fmt: skip
        yield exponent(
            "Φ - L_α", "α", penalties, values, -1, 0.05, "as above; α (g(y) - g(z)) loses digits to cancellation",
            exact=[float(forms.phi(x) - forms.penalized_phi(x, α)) for α in penalties], allowed=1e-4,
        )  # fmt: skip

    def _general(self) -> Reading:
        """The distance of y and z of any penalty method that has both, in its own steps and from its own penalty."""
        problem = Quadratic.of(QuadraticForms.random(5, 8, 2.0, seed=0), x=random_x(5))
        penalties = [float(α) for α in np.geomspace(1e2, 1e4, 4 if self.quick else 8)]
        every = directions(
            problem, self.solver or ScaleBiO, [{"penalty": α} for α in penalties], hold=400, needs=("penalty",),
            lr_z=0.4, lr_y=0.4, lower_steps=1, p=1,
        )  # fmt: skip
        if not {"y", "z"} <= every[0].lower.keys():
            raise NotApplicable("the solver has no lower variables named y and z")
        return exponent(
            "‖y - z‖", "α", penalties, [float((one.lower["y"] - one.lower["z"]).norm()) for one in every], -1, 0.1,
            "the next term of the expansion counts at α = 100; a faster fall is welcome", at_most=True,
        )  # fmt: skip
