"""`quadratic`: a problem of any size and condition number with a closed form for everything; see `QuadraticForms`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.constraint import Constraint, mapping
from bilevel.data import Stream, generator
from bilevel.problem import Forward, Problem, Shard
from bilevel_problems.quadratic_forms import QuadraticForms
from bilevel_problems.variables import BlockVector, ParameterVector


@dataclass(frozen=True)
class Noise:
    """One micro-batch: its share of the loss, and the linear term that makes the gradient noisy.

    share: the share of the global batch's samples that are in this micro-batch.
    along_x, along_y: what is added to the gradients of x and y. They have the shapes of these. None: nothing.
    size: the number of samples.
    """

    share: float
    along_x: Tensor | None
    along_y: Tensor | None
    size: int


@dataclass
class Quadratic(Problem[Noise]):
    """A random instance of the general quadratic problem.

    m, n: the dimensions of x and y.
    kappa: the condition number of the lower level.
    instance: the seed of the coefficients.
    rho, omega: the weight and frequency of a cosine in x that makes Φ nonconvex; 0 leaves it strongly convex.
    upper_noise, lower_noise: the standard deviation of each gradient coordinate of one sample of f, and of g.
    batch_size: the samples of one batch.
    split: the number of equal blocks into which y is divided, of which a subset may train at a time.
    copies: the number of independent runs side by side: x has shape (copies, m), the loss is the sum over copies, and each
        copy has its own noise. A solver treats them as one variable; with plain SGD each row is a run.
    start: the value of every coordinate of x at the start; y starts at 0.
    """

    smooth: ClassVar[bool | None] = True
    strongly_convex: ClassVar[bool | None] = True

    m: int = 5
    n: int = 8
    kappa: float = 10.0
    instance: int = 0
    rho: float = 0.0
    omega: float = 3.0
    upper_noise: float = 0.0
    lower_noise: float = 0.0
    batch_size: int = 1
    split: int = 1
    copies: int | None = None
    start: float = 1.0

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.batch_size, self.split, self.copies or 1) < 1:
            raise ValueError("m, n, batch_size, split and copies must be at least 1")
        if self.kappa < 1:
            raise ValueError(f"kappa must be at least 1, not {self.kappa}")
        if self.n % self.split:
            raise ValueError(f"split ({self.split}) must divide n ({self.n})")

    @classmethod
    def of(cls, forms: QuadraticForms, *, x: Tensor | None = None, y: Tensor | None = None, **settings: Any) -> Quadratic:
        """The problem with these coefficients and, if given, this start; `settings` are its other fields."""
        n, m = forms.C.shape
        problem = cls(m=m, n=n, **settings)
        problem.forms = forms
        if x is not None:
            problem.start_x = x
        if y is not None:
            problem.start_y = y
        return problem

    @cached_property
    def forms(self) -> QuadraticForms:
        """Coefficients and closed forms."""
        return QuadraticForms.random(self.m, self.n, self.kappa, self.instance, rho=self.rho, omega=self.omega)

    @cached_property
    def start_x(self) -> Tensor:
        """The start of x."""
        return torch.full(self._shape(self.m), self.start, dtype=torch.float64)

    @cached_property
    def start_y(self) -> Tensor:
        """The start of y."""
        return torch.zeros(self._shape(self.n), dtype=torch.float64)

    def upper(self) -> nn.Module:
        """The variable x."""
        return ParameterVector(self.start_x)

    def lower(self) -> nn.Module:
        """The variable y."""
        return ParameterVector(self.start_y) if self.split == 1 else BlockVector(self.start_y, self.split)

    def upper_loss(self, x: Forward, y: Forward, batch: Noise) -> Tensor:
        """f(x, y) + ξ_x'x + ξ_y'y."""
        return _with_noise(self.forms.f(x(), y()), x, y, batch)

    def lower_loss(self, x: Forward, y: Forward, batch: Noise) -> Tensor:
        """g(x, y) + ζ_x'x + ζ_y'y."""
        return _with_noise(self.forms.g(x(), y()), x, y, batch)

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Noise]:
        """The noise of f in this batch."""
        return self._batch(index, shard, self.upper_noise, Stream.UPPER)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Noise]:
        """The noise of g in this batch. It is the same for all lower variables, since all use the same batch."""
        return self._batch(index, shard, self.lower_noise, Stream.LOWER)

    def summary(self, x: Forward) -> Mapping[str, float]:
        """Φ(x) and ‖∇Φ(x)‖, or the norm of the gradient mapping under a constraint, as means over the copies."""
        phi, grad_phi = self.forms.expansion(x())
        if isinstance(self.upper_constraint, Constraint):
            grad_phi = mapping(self.upper_constraint.project, x(), grad_phi, 1.0)
        return {"phi": float(phi.mean()), "gradient": float(torch.linalg.vector_norm(grad_phi, dim=-1).mean())}

    def _shape(self, size: int) -> tuple[int, ...]:
        return (size,) if self.copies is None else (self.copies, size)

    def _batch(self, index: int, shard: Shard, deviation: float, stream: Stream) -> list[Noise]:
        parts = shard.split(range(self.batch_size))
        if deviation == 0:
            return [Noise(len(part) / self.batch_size, None, None, len(part)) for part in parts]
        shape = (self.batch_size, *self._shape(self.m + self.n))
        draws = deviation * generator(shard.seed, stream, index).standard_normal(shape)
        return [self._noise(draws[list(part)]) for part in parts]

    def _noise(self, draws: np.ndarray[Any, np.dtype[np.float64]]) -> Noise:
        mean = torch.from_numpy(draws.sum(0) / self.batch_size)
        return Noise(len(draws) / self.batch_size, mean[..., : self.m], mean[..., self.m :], len(draws))


def _with_noise(loss: Tensor, x: Forward, y: Forward, batch: Noise) -> Tensor:
    total = loss.sum() if loss.dim() else loss
    if batch.share != 1:
        total = batch.share * total
    if batch.along_x is None or batch.along_y is None:
        return total
    return total + (batch.along_x * x()).sum() + (batch.along_y * y()).sum()
