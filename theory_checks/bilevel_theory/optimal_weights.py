"""The source weights that ScaleBiO learns are optimal: no other weights have a smaller Φ."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, bound, number
from bilevel_problems.ridge_reweighting import RidgeReweighting


class OptimalWeights(Check):
    """Ridge regression on three clean and two flipped sources, against the optimum of the exact Φ that scipy finds.

    The total weight of the clean sources is compared, not the weight of each: equally clean sources can share it in many
    ways at almost the same Φ.
    """

    statement = "Φ of the learned weights is the smallest there is, up to O(1/α)"
    hypotheses = "lower level solved as x moves; α large"
    source = "ScaleBiO (2406.19976), its problem; Φ in closed form"
    standing = "derived"
    specific = "about weights of sources"

    def readings(self) -> Iterator[Reading]:
        """Learn the weights, and compare them with the optimum."""
        from scipy.optimize import minimize

        problem = RidgeReweighting()
        k = problem.clean

        def phi(
            logits: np.ndarray[tuple[int], np.dtype[np.float64]],
        ) -> tuple[float, np.ndarray[tuple[int], np.dtype[np.float64]]]:
            x = torch.from_numpy(logits)
            slope, value = torch.func.grad_and_value(problem.phi)(x)
            return float(value), slope.numpy()

        best = minimize(
            phi, np.zeros(len(problem.names)), jac=True, method="L-BFGS-B", bounds=[(-15, 15)] * len(problem.names)
        )
        best_weights = torch.softmax(torch.from_numpy(best.x), 0)

        learned = self._learn(problem)
        weights = torch.softmax(learned, 0)
        start = float(problem.phi(torch.zeros_like(learned)))
        yield number(
            "total weight of the clean sources", float(weights[:k].sum()), float(best_weights[:k].sum()), 0.01,
            "a softmax reaches 0 only in the limit; the remainder falls as 1/steps",
        )  # fmt: skip
        left = (float(problem.phi(learned)) - best.fun) / (start - best.fun)
        yield bound("(Φ - min Φ) / (Φ at equal weights - min Φ)", left, 0.0, 0.01, "as above, and a bias of 1/α")

    def _learn(self, problem: RidgeReweighting) -> Tensor:
        solver = configure(
            self.solver or ScaleBiO, needs=("penalty", "lr_x"), penalty=100.0, lr_x=2.0, lr_z=0.3, lower_steps=2
        )
        with Session(problem, solver) as session:
            session.step(400 if self.quick else 800)
            return session.values("x")
