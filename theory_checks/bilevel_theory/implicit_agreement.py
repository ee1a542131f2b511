"""The penalty gradient tends to the hypergradient of implicit differentiation, on problems that are not quadratic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.solvers.f2sa_p import F2SAp
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.hypergradient import hypergradient, penalized_solutions
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, bound, exponent
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.ridge_reweighting import RidgeReweighting
from bilevel_theory.tiny_language import TinyLanguage


class ImplicitAgreement(Check):
    """The lower variables are at their solutions; the solver's own step of x shows its gradient."""

    statement = "‖∇L_α - ∇Φ‖ = O(1/α), and O(1/α²) for central differences, against [∇²_yy g]⁻¹ by torch.func"
    hypotheses = "g strongly convex; for the transformer, locally, at a minimum found from one start"
    source = "Kwon et al. 2023 (2301.10945), Lemma 3.1; Chen, Li, Chayti, Zhang 2026 (2509.02937), Lemma 3.2"
    standing = "proved"
    specific = "about the order p of f2sa-p"

    def readings(self) -> Iterator[Reading]:
        """Measure logistic regression, ridge reweighting, and a tiny transformer (which takes most of the time)."""
        problems: Mapping[str, Problem[Any]] = {
            "logistic-regularization": LogisticRegularization(rows=40, d=5),
            "ridge-reweighting": RidgeReweighting(),
            **({} if self.quick else {"tiny transformer": TinyLanguage()}),
        }
        for name, problem in problems.items():
            yield from self._agreement(name, problem)

    def _agreement(self, name: str, problem: Problem[Any]) -> Iterator[Reading]:
        truth = hypergradient(problem)
        size = float(_flat(truth.value).norm())
        penalties = [float(α) for α in np.geomspace(1e3, 3e4, 3)]
        first, second = [], []
        tilts = [α / j for α in penalties for j in (1, -1)]
        solved = iter(penalized_solutions(problem, tilts, y=truth.y))
        for α in penalties:
            path = {j: next(solved) for j in (1, -1)}
            gradient = solver_gradient(problem, self.solver or ScaleBiO, {"y": path[1], "z": truth.y}, penalty=α)
            first.append(float((gradient - _flat(truth.value)).norm()) / size)
            gradient = solver_gradient(problem, F2SAp, {"y-1": path[-1], "y+1": path[1]}, penalty=α, p=2, lower_steps=1)
            second.append(float((gradient - _flat(truth.value)).norm()) / size)
        yield exponent(f"{name}: relative error", "α", penalties, first, -1, 0.05, "the next term of the expansion is 1/α²")
        yield bound(f"{name}: relative error at α = 3e4", first[-1], 0.0, 1e-2, "κ/α, and κ is up to 300")
        yield exponent(
            f"{name}: p = 2", "α", penalties, second, -2, 0.1, "the next term is 1/α⁴; at larger α rounding comes near"
        )


def solver_gradient(
    problem: Problem[Any], solver: type[Solver[Any]], lower: Mapping[str, Mapping[str, Tensor]], **settings: Any
) -> Tensor:
    """The solver's gradient of x with its lower variables at these points, as one vector."""
    chosen = configure(solver, lr_x=1.0, lr_z=0.0, lr_y=0.0, **settings)
    with Session(problem, chosen) as session:
        for name, values in lower.items():
            session.put(name, values)
        before = session.values("x")
        session.step()
        return (before - session.values("x")).flatten()


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])
