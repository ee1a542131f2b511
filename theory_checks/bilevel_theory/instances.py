"""The quadratic problems on which several claims are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.data import Stream, generator
from bilevel_problems.quadratic_forms import QuadraticForms

KAPPA = 5.0
FASTEST = 2 / (1 + 1 / KAPPA)
"""The step at which gradient descent on a lower level with curvature 1/KAPPA … 1 is fastest."""


def default_forms() -> QuadraticForms:
    """m = 5, n = 8 and condition number 5; no coefficient vanishes, since that would hide errors."""
    return QuadraticForms.random(5, 8, KAPPA, seed=0)


def mild_forms() -> QuadraticForms:
    """m = 2, n = 4, with a lower level and a Φ that take few steps to solve."""
    return QuadraticForms.random(2, 4, 3.0, seed=4)


def random_x(m: int, seed: int = 100) -> Tensor:
    """A random point, independent of the coefficients."""
    return torch.from_numpy(generator(seed, Stream.INIT).standard_normal(m))


def noisy_forms() -> QuadraticForms:
    """m = n = 2, for noisy gradients: well conditioned, with ∇_y f(0, y*(0)) = (1, 1) so that the penalty has a bias."""
    A, B = torch.tensor([0.5, 1.0]).double().diag(), torch.tensor([0.05, 0.03]).double().diag()
    b = torch.tensor([0.5, -0.4]).double()
    return QuadraticForms(
        A=A,
        B=B,
        C=torch.tensor([[0.6, 0.3], [-0.2, 0.5]]).double(),
        D=torch.tensor([1.5, 2.0]).double().diag(),
        E=torch.tensor([[0.3, -0.1], [0.05, 0.35]]).double(),
        Q=torch.eye(2).double(),
        b=b,
        d=torch.tensor([0.3, -0.7]).double(),
        q=torch.zeros(2).double(),
        t=-torch.linalg.solve(A, b) - torch.linalg.solve(B, torch.ones(2).double()),
    )
