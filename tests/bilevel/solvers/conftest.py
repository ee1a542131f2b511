"""Every solver with settings that suit a small, well conditioned problem, and the lower optimum that each of them has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import AID, BOME, F2BA, F2SA, F3SA, MEHA, PBGD, SGD, F2SAp, ScaleBiO, Solver
from bilevel.solvers.f2sa_p import difference
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms

PENALTY, GAMMA, LR_Z, LR_X = 20.0, 5.0, 0.6, 0.01


@dataclass(frozen=True)
class Case:
    """A solver, and where its lower variables go while x is held; None for BOME, whose y depends on where it comes from.

    matrix: the penalty is ½ e'Pe around y*(x), P a function of the forms; its gradient is ∇Φ - S'(αP + B)⁻¹ s.
    scale: what the solver's gradient of x is multiplied by.
    """

    solver: Solver[Any]
    optimum: Callable[[QuadraticForms, Tensor], Mapping[str, Tensor]] | None
    gradient: Callable[[QuadraticForms, Tensor], Tensor]
    scale: float = 1.0
    second_order: bool = False


def resolvent(P: Tensor, forms: QuadraticForms, x: Tensor) -> Tensor:
    return torch.linalg.solve(PENALTY * P + forms.B, forms.slope(x))


def penalised(P: Callable[[QuadraticForms], Tensor]) -> Callable[[QuadraticForms, Tensor], Tensor]:
    return lambda forms, x: forms.grad_phi(x) - resolvent(P(forms), forms, x) @ forms.S


def value_gap(forms: QuadraticForms, x: Tensor) -> dict[str, Tensor]:
    return {"y": forms.penalised_solution(x, PENALTY), "z": forms.lower_solution(x)}


def gradient_norm_matrix(forms: QuadraticForms) -> Tensor:
    return 2 * forms.A @ forms.A


def envelope_matrix(forms: QuadraticForms) -> Tensor:
    eye = torch.eye(len(forms.A), dtype=torch.float64)
    return GAMMA * forms.A @ forms.A @ torch.linalg.inv(eye + GAMMA * forms.A)


def envelope(forms: QuadraticForms, x: Tensor) -> dict[str, Tensor]:
    """y, and z = argmin g(x, z) + ‖z - y‖²/(2γ)."""
    y = forms.lower_solution(x) - resolvent(envelope_matrix(forms), forms, x)
    eye = torch.eye(len(forms.A), dtype=torch.float64)
    return {"y": y, "z": torch.linalg.solve(GAMMA * forms.A + eye, y - GAMMA * (forms.C @ x + forms.b))}


def path(p: int) -> Case:
    def optimum(forms: QuadraticForms, x: Tensor) -> dict[str, Tensor]:
        return {
            f"y{j:+d}": forms.penalised_solution(x, PENALTY / j) if j else forms.lower_solution(x) for j in difference(p)
        }

    def gradient(forms: QuadraticForms, x: Tensor) -> Tensor:
        weights = {j: float(c) for j, c in difference(p).items()}
        return forms.grad_phi(x) + forms.difference_bias(x, PENALTY, weights)

    return Case(F2SAp(p=p, penalty=PENALTY, lr_z=LR_Z, lr_x=LR_X, lower_steps=2), optimum, gradient)


GAP = penalised(lambda forms: forms.A)
COMMON: dict[str, Any] = {"penalty": PENALTY, "lr_x": LR_X, "lr_z": LR_Z}
CASES = {
    "scalebio": Case(ScaleBiO(**COMMON, warmup=0, optimizer_x=SGD(), optimizer_z=SGD()), value_gap, GAP),
    "f2sa": Case(F2SA(**COMMON, lower_steps=2), value_gap, GAP),
    "f3sa": Case(F3SA(**COMMON, lr_y=LR_Z, momentum=0.3), value_gap, GAP),
    "f2ba": Case(F2BA(**COMMON, lower_steps=3), value_gap, GAP),
    **{f"f2sa-p, p={p}": path(p) for p in (1, 2, 3, 4)},
    "pbgd": Case(PBGD(**COMMON, lower_steps=2), value_gap, GAP),
    "pbgd, gradient norm": Case(
        PBGD(**COMMON, kind="gradient-norm", lr_y=0.8),
        lambda forms, x: {"y": forms.lower_solution(x) - resolvent(gradient_norm_matrix(forms), forms, x)},
        penalised(gradient_norm_matrix),
        second_order=True,
    ),
    "meha": Case(MEHA(**COMMON, gamma=GAMMA), envelope, penalised(envelope_matrix), scale=1 / PENALTY),
    "bome": Case(BOME(lr_x=LR_X, lr_z=LR_Z, lower_steps=3), None, GAP),
    "aid": Case(
        AID(lr_x=LR_X, lr_z=LR_Z, lower_steps=2, cg_tolerance=1e-12),
        lambda forms, x: {"z": forms.lower_solution(x)},
        lambda forms, x: forms.grad_phi(x),
        second_order=True,
    ),
}
WITH_OPTIMUM = {name: case for name, case in CASES.items() if case.optimum is not None}
FIRST_ORDER = {name: case for name, case in CASES.items() if not case.second_order}


def small(**settings: Any) -> Quadratic:
    """Two upper and four lower coordinates; no coefficient is zero, as a zero would hide errors."""
    return Quadratic(m=2, n=4, kappa=3.0, **settings)
