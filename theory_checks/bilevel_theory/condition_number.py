"""How the bias grows with the condition number κ: κ³/α in general, κ²/α on a quadratic; κ⁵/α² for central differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.solvers.f2sa_p import F2SAp
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.cubic_bias import CubicBias
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms

EXACT = "the instance makes the power exact, up to κ/α = 1e-3 or less"


class ConditionNumber(Check):
    """The lower variables are at their solutions; the solver's own step of x shows its gradient."""

    statement = "‖∇L_α - ∇Φ‖ = O(κ³/α), attained; O(κ^(2p+1) α^-p) for order p; y* to a given accuracy takes O(κ) steps"
    hypotheses = (
        "α ≫ κ²; the Hessian of g Lipschitz. On a quadratic it is constant, and the powers are κ² and κ³ (p = 2) only"
    )
    source = "Chen, Li, Chayti, Zhang 2026 (2509.02937), Lemma 3.2, for p = 1 and 2; that it is attained is derived"
    standing = "proved"
    specific = "about the order p of f2sa-p"

    def readings(self) -> Iterator[Reading]:
        """Bias and lower steps for κ from 10 to 1000."""
        solver = self.solver or ScaleBiO
        kappas = [float(κ) for κ in np.geomspace(10, 1000, 3 if self.quick else 5)]
        away, first, second, smooth = [], [], [], []
        for κ in kappas:
            forms, x, α = _stiff_forms(κ), torch.zeros(6, dtype=torch.float64), 1e3 * κ
            problem, truth = Quadratic.of(forms, x=x), forms.grad_phi(x)
            points = {
                j: forms.lower_solution(x) - j * torch.linalg.solve(α * forms.A + j * forms.B, forms.slope(x)) for j in NODES
            }
            away.append(α * float((points[1] - points[0]).norm()))
            first.append(α * float((_gradient(problem, solver, α, {"y": points[1], "z": points[0]}) - truth).norm()))
            second.append(α**2 * float((_central(problem, α, points) - truth).norm()))
            smooth.append(float(torch.linalg.eigvalsh(forms.H)[-1]))
        yield exponent("α ‖y - z‖, quadratic", "κ", kappas, away, 1, 0.02, EXACT)
        yield exponent("α ‖bias‖, quadratic", "κ", kappas, first, 2, 0.02, EXACT)
        yield exponent("α² ‖bias‖, p = 2, quadratic", "κ", kappas, second, 3, 0.02, EXACT)
        yield exponent("curvature of Φ, quadratic", "κ", kappas, smooth, 2, 0.02, "one curvature is κ² + 1")

        first, second = [], []
        for κ in kappas:
            cubic, α = CubicBias(mu=1 / κ), 1e3 * κ**2
            x = cubic.slope(torch.tensor([1 / κ], dtype=torch.float64))
            points = {j: cubic.lower_solution(x - j / α) for j in NODES}
            first.append(
                α * float((_gradient(cubic, solver, α, {"y": points[1], "z": points[0]}) - cubic.grad_phi(x)).abs())
            )
            α = 50 * κ**2  # smaller, since its square comes closer to rounding errors
            points = {j: cubic.lower_solution(x - j / α) for j in NODES}
            second.append(α**2 * float((_central(cubic, α, points) - cubic.grad_phi(x)).abs()))
        yield exponent(
            "α |bias|, cubic-bias", "κ", kappas, first, 3, 0.02, EXACT, exact=[κ**3 / 8 for κ in kappas], allowed=1e-2
        )
        yield exponent(
            "α² |bias|, p = 2, cubic-bias",
            "κ",
            kappas,
            second,
            5,
            0.02,
            "the next term is (κ²/α)² = 4e-4; rounding is 1e-3 at κ = 1000",
        )
        kappas = [4.0, 8.0, 16.0] if self.quick else [4.0, 8.0, 16.0, 32.0]
        yield exponent(
            "lower steps to 1e-4",
            "κ",
            kappas,
            [self._lower_steps(κ) for κ in kappas],
            1,
            0.1,
            "log(1 - 1/κ) is -1/κ up to 1/κ²",
        )

    def _lower_steps(self, κ: float) -> float:
        forms = _stiff_forms(κ)
        x = torch.zeros(6, dtype=torch.float64)
        y, away = forms.lower_solution(x), torch.ones(6, dtype=torch.float64)
        solver = configure(self.solver or ScaleBiO, penalty=1e3, lr_x=0.0, lr_z=1.0)
        with Session(Quadratic.of(forms, x=x, y=y + away), solver) as session:
            while float((session.values("z") - y).norm()) > 1e-4:
                session.step()
            return float(session.t)


NODES = (-1, 0, 1)


def _stiff_forms(κ: float) -> QuadraticForms:
    """A from 1/κ to 1, B = C = D = I, E = 0, and ∇_y f(0, y*(0)) along the weakest direction of A."""
    identity, zero = torch.eye(6).double(), torch.zeros(6).double()
    weakest = torch.zeros(6).double()
    weakest[0] = 1
    A = torch.logspace(0, 1, 6, base=κ, dtype=torch.float64).diag() / κ
    return QuadraticForms(
        A=A, B=identity, C=identity, D=identity, E=0 * identity, Q=identity, b=zero, d=zero, q=zero, t=-weakest
    )  # fmt: skip


def _gradient(
    problem: Problem[Any], solver: type[Solver[Any]], α: float, lower: dict[str, Tensor], **settings: Any
) -> Tensor:
    """The solver's gradient of x at the given lower variables."""
    chosen = configure(solver, penalty=α, lr_x=1.0, lr_z=0.0, lr_y=0.0, **settings)
    with Session(problem, chosen) as session:
        for name, value in lower.items():
            session.put(name, {"value": value})
        before = session.values("x")
        session.step()
        return before - session.values("x")


def _central(problem: Problem[Any], α: float, points: dict[int, Tensor]) -> Tensor:
    return _gradient(problem, F2SAp, α, {"y-1": points[-1], "y+1": points[1]}, p=2, lower_steps=1)
