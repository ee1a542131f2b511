"""`logistic-regularization`: how strongly should each coordinate of a logistic regression be regularized?

g(x, y) = mean_i softplus(-b_i a_i'y) + ½ Σ_j exp(x_j) y_j²
f(x, y) = mean over validation rows of softplus(-b a'y)

∂Φ/∂x_j = -exp(x_j) y*_j [H⁻¹ ∇_y f(y*)]_j,   H = ∇²_yy g
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.data import Stream, generator
from bilevel.problem import Forward, Problem, Shard
from bilevel_problems.tables import Rows, RowTable
from bilevel_problems.variables import ParameterVector


@dataclass
class LogisticRegularization(Problem[Rows]):
    """Gaussian features, and noisy labels of a linear rule in which only the first half of the coordinates count.

    rows, validation_rows, d: the numbers of training rows, validation rows and coordinates.
    batch_size: the rows of a batch of either level; None takes all.
    start: the value of every x_j (the logarithm of the strength) at the start.
    instance: the seed of the data.
    """

    smooth: ClassVar[bool | None] = True
    strongly_convex: ClassVar[bool | None] = True

    rows: int = 80
    validation_rows: int = 40
    d: int = 10
    batch_size: int | None = None
    start: float = -2.0
    instance: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.validation_rows, self.d) < 1:
            raise ValueError("rows, validation_rows and d must be at least 1")

    @cached_property
    def training(self) -> RowTable:
        """Rows of the lower level."""
        return self._data[0]

    @cached_property
    def validation(self) -> RowTable:
        """Rows of the upper level."""
        return self._data[1]

    def grad_phi(self, x: Tensor, y: Tensor) -> Tensor:
        """∇Φ at x, given y = y*(x)."""
        a, b = self.training.features, self.training.targets
        p = torch.sigmoid(b * (a @ y))
        H = a.T @ ((p * (1 - p))[:, None] * a) / len(a) + torch.exp(x).diag()
        v, c = self.validation.features, self.validation.targets
        grad_f = -(c * torch.sigmoid(-c * (v @ y))) @ v / len(v)
        return -torch.exp(x) * y * torch.linalg.solve(H, grad_f)

    def upper(self) -> nn.Module:
        """The variable x."""
        return ParameterVector(torch.full((self.d,), self.start))

    def lower(self) -> nn.Module:
        """The variable y."""
        return ParameterVector(torch.zeros(self.d))

    def upper_loss(self, x: Forward, y: Forward, batch: Rows) -> Tensor:
        """f(x, y)."""
        return _logistic(y(), batch)

    def lower_loss(self, x: Forward, y: Forward, batch: Rows) -> Tensor:
        """g(x, y)."""
        value = y()
        return _logistic(value, batch) + 0.5 * batch.share * (torch.exp(x()) * value**2).sum()

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Rows]:
        """Validation rows."""
        return self.validation.batch(index, shard, self.batch_size, Stream.UPPER)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Rows]:
        """Training rows."""
        return self.training.batch(index, shard, self.batch_size, Stream.LOWER)

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The mean logarithmic strength on the coordinates that count, and on those that do not."""
        value, half = x(), (self.d + 1) // 2
        means = {"informative": float(value[:half].mean())}
        return {**means, "uninformative": float(value[half:].mean())} if self.d > 1 else means

    @cached_property
    def _data(self) -> tuple[RowTable, RowTable]:
        random = generator(self.instance, Stream.INIT)
        rule = torch.from_numpy(random.standard_normal(self.d))
        rule[(self.d + 1) // 2 :] = 0

        def draw(rows: int) -> RowTable:
            features = torch.from_numpy(random.standard_normal((rows, self.d)))
            score = features @ rule + torch.from_numpy(random.standard_normal(rows))
            return RowTable(features, torch.where(score >= 0, 1.0, -1.0).double(), (rows,))

        return draw(self.rows), draw(self.validation_rows)


def _logistic(y: Tensor, batch: Rows) -> Tensor:
    return torch.dot(batch.weight, F.softplus(-batch.targets * (batch.features @ y)))
