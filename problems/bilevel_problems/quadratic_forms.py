"""The general quadratic bilevel problem and its closed forms.

    g(x, y) = ½ y'Ay + y'(Cx + b) + ½ x'Qx + q'x                                                       A > 0
    f(x, y) = ½ (y - t)'B(y - t) + x'Ey + ½ x'Dx + d'x + ρ Σ_i (1 - cos ω x_i)

With J = -A⁻¹C, S = BJ + E' and s(x) = ∇_y f(x, y*(x)), the penalized problem differs from the true one by

    y*_α(x) - y*(x) = -(αA + B)⁻¹ s(x)          L_α(x) - Φ(x) = -½ s'(αA + B)⁻¹ s          ∇L_α - ∇Φ = -S'(αA + B)⁻¹ s

exactly, for every penalty α. The trigonometric term depends on x alone: it makes Φ nonconvex and changes none of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.data import Stream, generator


@dataclass(frozen=True)
class QuadraticForms:
    """The coefficients, and everything that follows from them.

    Every method takes x of shape (..., m) and, if it needs it, y of shape (..., n); what it returns has the same leading
    dimensions. Everything is in float64.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    E: Tensor
    Q: Tensor
    b: Tensor
    d: Tensor
    q: Tensor
    t: Tensor
    rho: float = 0.0
    omega: float = 3.0

    @staticmethod
    def random(m: int, n: int, kappa: float, seed: int, *, rho: float = 0.0, omega: float = 3.0) -> QuadraticForms:
        """An instance whose lower level has condition number kappa, and whose f is strongly convex (without ρ).

        A has the eigenvalues 1/kappa … 1 in geometric progression, B .2 … 1, D .5 … 1, in random directions. E couples x
        and y half as strongly as would make f lose its convexity; no coefficient is zero, since a zero would hide errors
        (with B = 0 and E = 0 the penalty has no bias at all).
        """
        random = generator(seed, Stream.INIT)

        def normal(*shape: int) -> Tensor:
            return torch.from_numpy(random.standard_normal(shape))

        def symmetric(eigenvalues: Tensor) -> Tensor:
            basis, _ = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues)))
            return basis @ eigenvalues.diag() @ basis.T

        A = symmetric(torch.logspace(0, 1, n, kappa, dtype=torch.float64) / kappa)
        B = symmetric(torch.linspace(0.2, 1, n, dtype=torch.float64))
        D = symmetric(torch.linspace(0.5, 1, m, dtype=torch.float64))
        K = normal(m, n)
        return QuadraticForms(
            A=A,
            B=B,
            C=normal(m, n).T / n**0.5,
            D=D,
            E=0.5 * _root(D) @ (K / torch.linalg.matrix_norm(K, 2)) @ _root(B),
            Q=symmetric(torch.linspace(0.5, 1, m, dtype=torch.float64)),
            b=normal(n),
            d=normal(m),
            q=normal(m),
            t=normal(n),
            rho=rho,
            omega=omega,
        )

    # The two losses.

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The upper loss."""
        r = y - self.t
        loss = 0.5 * _dot(r, _times(self.B.T, r)) + _dot(x, _times(self.E, y) + 0.5 * _times(self.D.T, x) + self.d)
        return loss if self.rho == 0 else loss + self.rho * (1 - torch.cos(self.omega * x)).sum(-1)

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The lower loss."""
        of_y = 0.5 * _times(self.A.T, y) + _times(self.C, x) + self.b
        return _dot(y, of_y) + _dot(x, 0.5 * _times(self.Q.T, x) + self.q)

    # The true problem.

    @cached_property
    def J(self) -> Tensor:
        """dy*/dx. Shape: (n, m)."""
        return -torch.linalg.solve(self.A, self.C)

    @cached_property
    def S(self) -> Tensor:
        """ds/dx. Shape: (n, m)."""
        return self.B @ self.J + self.E.T

    @cached_property
    def H(self) -> Tensor:
        """∇²Φ, without the trigonometric term. Shape: (m, m)."""
        return self.D + self.E @ self.J + (self.E @ self.J).T + self.J.T @ self.B @ self.J

    def lower_solution(self, x: Tensor) -> Tensor:
        """y*(x) = -A⁻¹(Cx + b)."""
        return -_solve(self.A, x @ self.C.T + self.b)

    def slope(self, x: Tensor) -> Tensor:
        """s(x) = ∇_y f(x, y*(x))."""
        return (self.lower_solution(x) - self.t) @ self.B + x @ self.E

    def phi(self, x: Tensor) -> Tensor:
        """Φ(x) = f(x, y*(x))."""
        return self.f(x, self.lower_solution(x))

    def grad_phi(self, x: Tensor) -> Tensor:
        """∇Φ(x)."""
        y = self.lower_solution(x)
        wave = self.rho * self.omega * torch.sin(self.omega * x)
        return x @ self.D + y @ self.E.T + self.d + self.slope(x) @ self.J + wave

    def expansion(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Φ(x) and ∇Φ(x) from their values at 0 and ∇²Φ: the same numbers, and no linear system to solve at every x."""
        phi, slope = self._at_zero
        grad_phi = _times(self.H, x) + slope
        phi = phi + 0.5 * _dot(x, grad_phi + slope)
        if self.rho != 0:
            phi = phi + self.rho * (1 - torch.cos(self.omega * x)).sum(-1)
            grad_phi = grad_phi + self.rho * self.omega * torch.sin(self.omega * x)
        return phi, grad_phi

    @cached_property
    def _at_zero(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self.d)
        return self.phi(zero), self.grad_phi(zero)

    def solution(self) -> Tensor:
        """x* = argmin Φ, where ρ = 0."""
        return -torch.linalg.solve(self.H, self.grad_phi(torch.zeros_like(self.d)))

    # The penalized problem, L_α(x) = min_y [f + α g] - α min_z g.

    def penalized_solution(self, x: Tensor, penalty: float) -> Tensor:
        """y*_α(x) = argmin_y g + f/α."""
        return self.lower_solution(x) - self._resolvent(self.slope(x), penalty)

    def penalized_phi(self, x: Tensor, penalty: float) -> Tensor:
        """L_α(x)."""
        s = self.slope(x)
        return self.phi(x) - 0.5 * _dot(s, self._resolvent(s, penalty))

    def bias(self, x: Tensor, penalty: float) -> Tensor:
        """∇L_α(x) - ∇Φ(x)."""
        return -self._resolvent(self.slope(x), penalty) @ self.S

    def difference_bias(self, x: Tensor, penalty: float, weights: Mapping[int, float]) -> Tensor:
        """Error of the finite difference Σ_j w_j d/dx min_y [g + jνf] / ν, with ν = 1/α, as a value of ∇Φ(x).

        {0: -1, 1: 1} is the forward difference, that is, the penalty method; {-1: -½, 1: ½} the central one. For weights
        with Σ_j w_j = 0 and Σ_j j w_j = 1, as these, it is -ν Σ_j w_j j² S'(A + jνB)⁻¹ s; others leave more.
        """
        s, nu = self.slope(x), 1 / penalty
        terms = [w * j**2 * _solve(self.A + j * nu * self.B, s) for j, w in weights.items() if j]
        zeroth, first = sum(weights.values()), sum(j * w for j, w in weights.items())
        grad_g = self.lower_solution(x) @ self.C + x @ self.Q + self.q
        return penalty * zeroth * grad_g + (first - 1) * self.grad_phi(x) - nu * torch.stack(terms).sum(0) @ self.S

    def penalized_hessian(self, penalty: float) -> Tensor:
        """∇²L_α, without the trigonometric term. Shape: (m, m)."""
        return self.H - self.S.T @ torch.linalg.solve(penalty * self.A + self.B, self.S)

    def penalized_shift(self, penalty: float) -> Tensor:
        """argmin L_α - argmin Φ, where ρ = 0: how far from x* a method with a fixed penalty ends."""
        return -torch.linalg.solve(self.penalized_hessian(penalty), self.bias(self.solution(), penalty))

    def value_gap(self, x: Tensor, penalty: float) -> Tensor:
        """g(x, y*_α) - g(x, y*)."""
        return 0.5 * _form(self.A, self._resolvent(self.slope(x), penalty))

    def _resolvent(self, s: Tensor, penalty: float) -> Tensor:
        return _solve(penalty * self.A + self.B, s)


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return torch.dot(u, v) if u.dim() == v.dim() == 1 else (u * v).sum(-1)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    """The matrix times each of the vectors."""
    return matrix.mv(v) if v.dim() == 1 else v @ matrix.T


def _form(matrix: Tensor, v: Tensor) -> Tensor:
    return _dot(v, v @ matrix.T)


def _solve(matrix: Tensor, v: Tensor) -> Tensor:
    """matrix⁻¹ v for every v of shape (..., n)."""
    return torch.linalg.solve(matrix, v.reshape(-1, v.shape[-1]).T).T.reshape(v.shape)


def _root(matrix: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return basis @ values.sqrt().diag() @ basis.T
