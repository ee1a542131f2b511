"""A p-th order finite difference of the penalty path has bias O(α^-p)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bilevel.solvers.f2sa_p import F2SAp, difference
from bilevel.testing.session import directions
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_theory.instances import FASTEST, default_forms, random_x

BECAUSE = "the next term of the expansion bends the line, most for odd p; p = 4 comes near rounding at the largest penalty"


class HigherOrder(Check):
    """x is held until all lower variables have converged; then the solver's own step of x shows its gradient."""

    statement = "‖Σ_j c_j (j ∇_x f(y_j) + α ∇_x g(y_j)) - ∇Φ‖ = O(α^-p)"
    hypotheses = "g strongly convex in y; f, g with p + 2 Lipschitz derivatives in y; α ≥ 2κ"
    source = "Chen, Li, Chayti, Zhang 2026 (2509.02937), Lemma 3.2"
    standing = "proved"
    specific = "about the order p of f2sa-p"

    def readings(self) -> Iterator[Reading]:
        """Measure the bias for p = 1 … 4, at penalties where it stays above rounding errors."""
        forms = default_forms()
        x = random_x(5)
        penalties = [float(α) for α in np.geomspace(50, 1000, 3 if self.quick else 4)]
        for p in (1, 2, 3, 4):
            weights = {j: float(c) for j, c in difference(p).items()}
            found = directions(
                Quadratic.of(forms, x=x), self.solver or F2SAp, [{"penalty": α} for α in penalties],
                hold=0, lower_steps=90, p=p, lr_z=FASTEST,
            )  # fmt: skip
            sizes = [float((one.gradient - forms.grad_phi(x)).norm()) for one in found]
            exact = [float(forms.difference_bias(x, α, weights).norm()) for α in penalties]
            yield exponent(f"bias, p = {p}", "α", penalties, sizes, -p, 0.1, BECAUSE, exact=exact, allowed=1e-3)
