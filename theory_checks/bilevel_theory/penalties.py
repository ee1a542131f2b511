"""Closed forms on the quadratic problem for any penalty that is quadratic around the lower solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_problems.quadratic_forms import QuadraticForms


@dataclass(frozen=True)
class QuadraticPenalty:
    """min f + c p with p(x, y) = ½ (y - y*(x))'P(y - y*(x)).

    The value gap has P = A. The squared gradient norm has P = 2A². The gap to the Moreau envelope of parameter γ has
    P = γA²(I + γA)⁻¹. With R = (cP + B)⁻¹, y is at y* - R s(x), and the gradient of x has the bias -S'R s(x).

    forms: the coefficients of the problem.
    P: the curvature of the penalty.
    """

    forms: QuadraticForms
    P: Tensor

    @staticmethod
    def value_gap(forms: QuadraticForms) -> QuadraticPenalty:
        """g - g*, the penalty of V-PBGD."""
        return QuadraticPenalty(forms, forms.A)

    @staticmethod
    def gradient_norm(forms: QuadraticForms) -> QuadraticPenalty:
        """‖∇_y g‖², the penalty of G-PBGD."""
        return QuadraticPenalty(forms, 2 * forms.A @ forms.A)

    @staticmethod
    def moreau_gap(forms: QuadraticForms, gamma: float) -> QuadraticPenalty:
        """The gap of g to its Moreau envelope, the penalty of MEHA."""
        identity = torch.eye(len(forms.A), dtype=forms.A.dtype)
        return QuadraticPenalty(forms, gamma * forms.A @ forms.A @ torch.linalg.inv(identity + gamma * forms.A))

    def solution(self, c: float) -> tuple[Tensor, Tensor]:
        """(x, y) = argmin f + c p."""
        forms = self.forms
        R = torch.linalg.inv(c * self.P + forms.B)
        x = forms.solution()
        x = x + torch.linalg.solve(forms.H - forms.S.T @ R @ forms.S, forms.S.T @ R @ forms.slope(x))
        return x, forms.lower_solution(x) - R @ forms.slope(x)

    def value(self, x: Tensor, y: Tensor) -> float:
        """p(x, y), without the cancellation that a difference of losses has."""
        e = y - self.forms.lower_solution(x)
        return float(0.5 * e @ self.P @ e)

    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """∇p(x, y), in x and in y."""
        along_y = self.P @ (y - self.forms.lower_solution(x))
        return -self.forms.J.T @ along_y, along_y

    def smoothness(self) -> float:
        """The largest eigenvalue of the Hessian of p in (x, y)."""
        J = torch.cat([-self.forms.J, torch.eye(len(self.P), dtype=self.P.dtype)], 1)
        return float(torch.linalg.eigvalsh(J.T @ self.P @ J)[-1])

    def curvature(self, c: float) -> float:
        """The smallest eigenvalue of the Hessian of f + c p in (x, y), which is the linear rate of descent on it."""
        forms = self.forms
        J = torch.cat([-forms.J, torch.eye(len(self.P), dtype=self.P.dtype)], 1)
        upper = torch.cat([torch.cat([forms.D, forms.E], 1), torch.cat([forms.E.T, forms.B], 1)])
        return float(torch.linalg.eigvalsh(upper + c * J.T @ self.P @ J)[0])


def upper_gradient(forms: QuadraticForms, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """∇f(x, y), in x and in y."""
    return forms.D @ x + forms.E @ y + forms.d, forms.B @ (y - forms.t) + forms.E.T @ x
