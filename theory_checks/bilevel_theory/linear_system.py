"""F2SA, F3SA and ScaleBiO on a quadratic with additive noise, as the linear stochastic systems that they are.

With s = (x, y, z, 1), a step is s' = M s + N e: mean and covariance follow exactly, without sampling. It is written from the
published updates and shares only the schedules with the solvers, so that each can be checked against the other.

    z' = z - γ (Az + Cx + b + ζ)
    y' = y - β (Ay + Cx + b + ζ + [B(y - t) + E'x + ξ_y] / λ)
    x' = x - η (Dx + Ey + d + ξ_x + λ C'(y - z))

ζ is the same for y and z, which share a minibatch; for the same reason the noise of ∇_x g cancels in the difference.
With momentum the noise e is that of the estimates, e' = (1 - μ) e + μ (new noise): where gradients are affine STORM corrects
exactly for the moving point, and nothing else remains of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel_problems.quadratic_forms import QuadraticForms

Matrix = NDArray[np.float64]
CHUNK = 1024
"""How many steps are turned into matrices at a time."""

Order = Literal["together", "lower first"]
"""Whether x moves together with y and z (ScaleBiO, F3SA) or after them, at their new values (F2SA)."""


@dataclass(frozen=True)
class StepSizes:
    """The settings of one step: λ, the steps β of y, γ of z and η of x, and the momentum weight μ (1: none).

    Those of many steps at once are arrays of shape (steps, 1, 1).
    """

    penalty: float
    lr_y: float
    lr_z: float
    lr_x: float
    momentum: float = 1.0


@dataclass(frozen=True)
class Moments:
    """E[s s'], and the quantities that follow from it."""

    system: LinearSystem
    second: Matrix
    steps: StepSizes

    @property
    def mean(self) -> Matrix:
        """E[s], without the 1."""
        return self.second[:-1, self._one]

    def squared_gradient(self) -> float:
        """E‖∇Φ(x)‖²."""
        G = self.system.gradient_of_phi
        return float(((G @ self.second) * G).sum())

    def squared_bias(self) -> float:
        """‖∇L_λ - ∇Φ‖² at E[x]."""
        forms = self.system.forms
        x = torch.from_numpy(self.mean[: len(forms.d)])
        return float(forms.bias(x, self.steps.penalty).square().sum())

    def scaled_variance(self) -> float:
        """λ² times the variance of y - y*_λ(x), that is, of y around what it follows. x's gradient multiplies it by λ²."""
        forms, λ = self.system.forms, self.steps.penalty
        n = len(forms.b)
        follow = forms.J - torch.linalg.solve(λ * forms.A + forms.B, forms.S)
        return λ**2 * self._variance(np.hstack([-follow.numpy(), np.eye(n), np.zeros((n, n))]))

    def variance_of_gap(self) -> float:
        """The variance of y - z, which is much smaller if the two share their noise."""
        m, n = len(self.system.forms.d), len(self.system.forms.b)
        return self._variance(np.hstack([np.zeros((n, m)), np.eye(n), -np.eye(n)]))

    def _variance(self, T: Matrix) -> float:
        covariance = self.second[:-1, :-1] - np.outer(self.mean, self.mean)
        return float(np.trace(T @ covariance @ T.T))

    @property
    def _one(self) -> int:
        return len(self.second) - 1


class LinearSystem:
    """The step as matrices, for given coefficients, noise and order."""

    def __init__(self, forms: QuadraticForms, *, upper_noise: float, lower_noise: float, order: Order) -> None:
        self.forms = forms
        self.order = order
        m, n = len(forms.d), len(forms.b)
        A, B, C, D, E, b, d, t = (
            value.numpy() for value in (forms.A, forms.B, forms.C, forms.D, forms.E, forms.b, forms.d, forms.t)
        )
        self.size = size = m + 2 * n + 1
        x, y, z, one = slice(0, m), slice(m, m + n), slice(m + n, m + 2 * n), slice(size - 1, size)
        places = {"x": x, "y": y, "z": z, "one": one}

        def rows(place: slice, **columns: Matrix) -> Matrix:
            matrix = np.zeros((size, size))
            for name, block in columns.items():
                matrix[place, places[name]] = block.reshape(place.stop - place.start, -1)
            return matrix

        self.g_z, self.g_y = rows(z, z=A, x=C, one=b), rows(y, y=A, x=C, one=b)
        self.f_y, self.f_x = rows(y, y=B, x=E.T, one=-B @ t), rows(x, x=D, y=E, one=d)
        self.gap_x = rows(x, y=C.T, z=-C.T)
        # the noise vector is (ζ_y, ξ_y, ξ_x)
        inject = np.zeros((3, size, 2 * n + m))
        inject[0, z, :n] = inject[1, y, :n] = np.eye(n)
        inject[2, y, n : 2 * n] = np.eye(n)
        self.noise_g_z, self.noise_g_y, self.noise_f_y = inject
        self.noise_f_x = np.zeros((size, 2 * n + m))
        self.noise_f_x[x, 2 * n :] = np.eye(m)
        self.gradient_of_phi = np.zeros((m, size))  # ∇Φ(x) = G (x, y, z, 1)
        self.gradient_of_phi[:, x] = forms.H.numpy()
        self.gradient_of_phi[:, size - 1] = forms.grad_phi(forms.d * 0).numpy()
        self.variance = np.diag([lower_noise**2] * n + [upper_noise**2] * (n + m))

    def matrices(self, s: StepSizes) -> tuple[Matrix, Matrix]:
        """The matrices M and N of a step, or of many."""
        identity = np.eye(self.size)
        lower = s.lr_z * self.g_z + s.lr_y * self.g_y + s.lr_y / s.penalty * self.f_y
        lower_noise = s.lr_z * self.noise_g_z + s.lr_y * self.noise_g_y + s.lr_y / s.penalty * self.noise_f_y
        upper, upper_noise = s.lr_x * (self.f_x + s.penalty * self.gap_x), s.lr_x * self.noise_f_x
        if self.order == "together":
            return identity - lower - upper, -lower_noise - upper_noise
        after = identity - upper
        return after @ (identity - lower), -after @ lower_noise - upper_noise

    def factor(self, s: StepSizes) -> float:
        """The spectral radius of the step, which is the linear rate at which it converges."""
        return float(np.abs(np.linalg.eigvals(self.matrices(s)[0][:-1, :-1])).max())

    def run(self, start: Matrix, steps: Iterable[StepSizes]) -> Iterator[Moments]:
        """The moments after each step, from a fixed start (x, y, z)."""
        size, noises = self.size, len(self.variance)
        first = np.append(start, 1.0)
        second = np.zeros((noises + size, noises + size))  # of (e, s)
        second[noises:, noises:] = np.outer(first, first)
        rest = iter(steps)
        while some := list(islice(rest, CHUNK)):
            for s, step, added in zip(some, *self._transitions(some), strict=True):
                second = step @ second @ step.T + added
                yield Moments(self, second[noises:, noises:], s)

    def _transitions(self, steps: Sequence[StepSizes]) -> tuple[Matrix, Matrix]:
        """What each step multiplies (e, s) with, and the second moments that its noise adds. Shapes: (steps, k, k)."""
        several = StepSizes(*np.array([(s.penalty, s.lr_y, s.lr_z, s.lr_x, s.momentum) for s in steps]).T[:, :, None, None])
        M, N = self.matrices(several)
        noises, size = len(self.variance), self.size
        keep = 1 - several.momentum
        step = np.zeros((len(steps), noises + size, noises + size))
        step[:, :noises, :noises] = keep * np.eye(noises)
        step[:, noises:, :noises] = keep * N
        step[:, noises:, noises:] = M
        drive = several.momentum * np.concatenate([np.broadcast_to(np.eye(noises), (len(steps), noises, noises)), N], 1)
        return step, drive @ self.variance @ drive.transpose(0, 2, 1)

    def stationary(self, s: StepSizes) -> Moments:
        """The moments that the process keeps once the settings are held at these values.

        The mean solves m = M m, and the covariance of the estimates' noise and of (x, y, z) solves C = S C S' + R.
        """
        M, N = self.matrices(s)
        last, noises = self.size - 1, len(self.variance)
        mean = np.append(np.linalg.solve(np.eye(last) - M[:last, :last], M[:last, last]), 1.0)
        step = np.zeros((noises + last, noises + last))
        step[:noises, :noises] = (1 - s.momentum) * np.eye(noises)
        step[noises:, :noises] = (1 - s.momentum) * N[:last]
        step[noises:, noises:] = M[:last, :last]
        drive = s.momentum * np.vstack([np.eye(noises), N[:last]])
        added = drive @ self.variance @ drive.T
        system = np.eye(added.size) - np.kron(step, step)
        covariance = np.linalg.solve(system, added.ravel()).reshape(added.shape)
        second = np.outer(mean, mean)
        second[:last, :last] += covariance[noises:, noises:]
        return Moments(self, second, s)

    def equilibrium(self, penalty: float) -> Matrix:
        """The fixed point at this penalty: (x, y, z) with x = argmin L_α. A start there has no transient."""
        forms = self.forms
        x = forms.solution() + forms.penalized_shift(penalty)
        return np.concatenate([v.numpy() for v in (x, forms.penalized_solution(x, penalty), forms.lower_solution(x))])
