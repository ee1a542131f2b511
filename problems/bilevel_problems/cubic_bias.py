"""`cubic-bias`: the scalar problem on which the bias of the penalty grows with the cube of the condition number.

    g(x, y) = h(y) - xy,   h'(y) = ½ [y √(μ² + y²) + μ² asinh(y/μ)],   h''(y) = √(μ² + y²) ≥ μ
    f(x, y) = y + ½ x²

The Hessian of g is 1-Lipschitz, which is what the bound κ³/α on the bias needs (on a quadratic it is zero, and the bias
only grows as κ²). As y*_α(x) = y*(x - 1/α), the penalty gradient is a forward difference:

    ∇Φ(x) = x + 1/h''(y*(x))          ∇L_α(x) = x + α [y*(x) - y*(x - 1/α)]

and at x = h'(μ), where y* = μ, α (∇L_α - ∇Φ) tends to 1/(8μ³).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bilevel.problem import Forward, Problem, Shard
from bilevel_problems.variables import ParameterVector


@dataclass
class CubicBias(Problem[Tensor]):
    """The problem that the module's docstring defines.

    mu: the strong convexity of g; the condition number is 1/mu near |y| = 1.
    start: the value of x at the start; None takes h'(mu), where the bias is largest.
    """

    smooth: ClassVar[bool | None] = True
    strongly_convex: ClassVar[bool | None] = True

    mu: float = 0.1
    start: float | None = None

    def __post_init__(self) -> None:
        if self.mu <= 0:
            raise ValueError(f"mu must be positive, not {self.mu}")

    def h(self, y: Tensor) -> Tensor:
        """The lower loss at x = 0."""
        root = torch.sqrt(self.mu**2 + y**2)
        return root**3 / 6 + 0.5 * self.mu**2 * (y * torch.asinh(y / self.mu) - root)

    def slope(self, y: Tensor) -> Tensor:
        """h'(y)."""
        return 0.5 * (y * torch.sqrt(self.mu**2 + y**2) + self.mu**2 * torch.asinh(y / self.mu))

    def curvature(self, y: Tensor) -> Tensor:
        """h''(y)."""
        return torch.sqrt(self.mu**2 + y**2)

    def lower_solution(self, x: Tensor) -> Tensor:
        """y*(x): the inverse of h', by Newton's method from outside, where h' is convex and no step overshoots."""
        y = x.sign() * torch.minimum(x.abs() / self.mu, torch.sqrt(2 * x.abs()))
        for _ in range(50):
            y = y - (self.slope(y) - x) / self.curvature(y)
        return y

    def grad_phi(self, x: Tensor) -> Tensor:
        """∇Φ(x)."""
        return x + 1 / self.curvature(self.lower_solution(x))

    def penalized_solution(self, x: Tensor, penalty: float) -> Tensor:
        """y*_α(x)."""
        return self.lower_solution(x - 1 / penalty)

    def upper(self) -> nn.Module:
        """The variable x. Shape: (1,)."""
        start = self.slope(torch.tensor([self.mu], dtype=torch.float64))
        return ParameterVector(start if self.start is None else torch.full_like(start, self.start))

    def lower(self) -> nn.Module:
        """The variable y. Shape: (1,)."""
        return ParameterVector(torch.zeros(1))

    def upper_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        """f(x, y)."""
        return batch * (y() + 0.5 * x() ** 2).sum()

    def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        """g(x, y)."""
        value = y()
        return batch * (self.h(value) - x() * value).sum()

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        """The whole loss, as a batch of one sample."""
        return [torch.ones((), dtype=torch.float64) for _ in shard.split(range(1))]

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        """The whole loss, as a batch of one sample."""
        return self.upper_batch(index, shard)

    def summary(self, x: Forward) -> Mapping[str, float]:
        """|∇Φ(x)|."""
        return {"gradient": float(self.grad_phi(x()).abs())}
