"""Samples to ‖∇Φ‖ ≤ ε: ε^-(4 + 2/p) for a p-th order difference, from what one x-gradient costs in bias and noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bilevel.solvers.f2sa_p import difference
from bilevel.verify.claims import Check, Reading, exponent, number
from bilevel_theory.instances import default_forms, random_x


class SFOExponent(Check):
    """With S samples for each node the best ν balances bias² ~ ν^2p and variance ~ 1/(ν² S): error² ~ S^(-p/(p+1)).

    Error ε thus takes S ~ ε^(-2(p+1)/p) samples, at each of the ε⁻² steps. This is a calculation
    with the solver's coefficients and the exact bias; it needs no run.
    """

    statement = "O~(ε^-(4 + 2/p)) stochastic gradients to ‖∇Φ‖ ≤ ε: 6, 5, 4.5 for p = 1, 2, 4"
    hypotheses = "g strongly convex; p + 2 Lipschitz derivatives in y; independent samples of bounded variance at each node"
    source = "Chen, Li, Chayti, Zhang 2026 (2509.02937), Theorem 3.1"
    standing = "proved"

    def readings(self) -> Iterator[Reading]:
        """Measure the best error over ν as a function of the number of samples."""
        forms, x = default_forms(), random_x(5)
        samples = np.geomspace(1e6, 1e10, 5)
        penalties = np.geomspace(3, 1e5, 60 if self.quick else 150)
        for p in (1, 2, 4):
            c = {j: float(weight) for j, weight in difference(p).items()}
            usable = [float(α) for α in penalties if α > 3 * (p // 2) * 5]  # there every g + jνf is convex
            bias = np.array([float(forms.difference_bias(x, α, c).square().sum()) for α in usable])
            noise = np.array([sum((j * w) ** 2 + (α * w) ** 2 for j, w in c.items()) for α in usable])
            best = [float((bias + noise / S).min()) for S in samples]
            reading = exponent(
                f"best squared error, p = {p}", "S", list(samples), best, -p / (p + 1), 0.03,
                "the best of a grid of ν; higher terms of the bias count at few samples",
            )  # fmt: skip
            yield reading
            assert reading.measured is not None
            yield number(
                f"exponent of 1/ε, p = {p}", 2 - 2 / reading.measured, 4 + 2 / p, 0.03, "follows from the exponent above"
            )
