"""With a penalty c_k = c (k + 1)^p, MEHA's constraint gap falls at least as K^-p and its residual as K^(-(1 - 2p)/2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bilevel.schedule import Power, at
from bilevel.solvers.meha import MEHA
from bilevel.testing.session import NotApplicable, Session, configure
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_theory.instances import noisy_forms
from bilevel_theory.penalties import QuadraticPenalty, upper_gradient


class MEHARate(Check):
    """One run for each power of the penalty, with gaps and residuals in closed form.

    The gap is that of g to its exact Moreau envelope v, and the residual the norm of ∇(f + c_k (g - v)). Where g is strongly
    convex the gap follows argmin f + c_k (g - v) and falls as 1/c_k², twice as fast as the bound; it is compared with that.
    """

    statement = (
        "g - v = O(K^-p) and min over k ≤ K of ‖∇(f + c_k (g - v))‖ = O(K^(-(1 - 2p)/2)) for c_k = c (k + 1)^p, p < ½"
    )
    hypotheses = "f, g smooth, g weakly convex (here strongly); exact gradients; steps that do not shrink, on f/c_k + g - v"
    source = "Liu, Liu, Yao, Zeng, Zhang 2024 (2405.09927), exponents as in summaries, not compared with the paper"
    standing = "derived"

    def readings(self) -> Iterator[Reading]:
        """Measure the gap and the best residual for one power, or for two."""
        chosen: Any = self.solver or MEHA
        if not issubclass(chosen, MEHA):
            raise NotApplicable(f"{chosen.__name__} is not MEHA")
        for p in (0.25,) if self.quick else (0.25, 0.4):
            yield from self._run(chosen, p)

    def _run(self, chosen: type[MEHA], p: float) -> Iterator[Reading]:
        forms, gamma, schedule = noisy_forms(), 2.0, Power(4.0, p)
        penalty = QuadraticPenalty.moreau_gap(forms, gamma)
        start, last = forms.solution(), 400
        counts = [int(k) for k in np.geomspace(100, last, 5)]
        η = 1.0 / penalty.smoothness()
        solver = configure(chosen, penalty=schedule, gamma=gamma, lr_x=η, lr_y=η, lr_z=1 / (1 + 1 / gamma))
        gaps, exact, best, residuals = [], [], [], []
        with Session(Quadratic.of(forms, x=start, y=forms.lower_solution(start)), solver) as session:
            for t in range(last):
                session.step()
                x, y, c = session.values("x"), session.values("y"), at(schedule, t)
                grad_f, grad_p = torch.cat(upper_gradient(forms, x, y)), torch.cat(penalty.gradient(x, y))
                residuals.append(float((grad_f + c * grad_p).norm()))
                if t + 1 in counts:
                    gaps.append(penalty.value(x, y))
                    exact.append(penalty.value(*penalty.solution(c)))
                    best.append(min(residuals))
        yield exponent(
            f"g - v, p = {p}", "K", counts, gaps, -p, 0.0, "the bound itself, which a strongly convex g does not attain",
            at_most=True,
        )  # fmt: skip
        yield exponent(
            f"g - v against its value at argmin f + c_k (g - v), p = {p}", "K", counts, gaps, -2 * p, 0.05,
            "x lags behind the growing penalty by a part that vanishes as K grows", exact=exact, allowed=0.05,
        )  # fmt: skip
        yield exponent(
            f"best residual, p = {p}", "K", counts, best, -(1 - 2 * p) / 2, 0.0,
            "the bound itself; a strongly convex Φ makes the residual fall faster", at_most=True,
        )  # fmt: skip
