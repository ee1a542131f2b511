"""`ridge-reweighting`: data reweighting in closed form. Which sources of training rows serve the validation rows?

    g(x, y) = Σ_i p_i l_i(y) + ½ ρ‖y‖²,   p = softmax(x),   l_i(y) = ½‖X_i y - b_i‖² / n_i
    f(y) = ½‖X_v y - b_v‖² / n_v

With H = Σ p_i X_i'X_i/n_i + ρI, r = Σ p_i X_i'b_i/n_i and H_v, r_v likewise for the validation rows,

    y* = H⁻¹r,   y*_α = (αH + H_v)⁻¹ (αr + r_v),   L_α = Φ - ½ s'(αH + H_v)⁻¹ s,   s = H_v y* - r_v,
    ∇L_α = α (diag(p) - pp') (l(y*_α) - l(y*))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from bilevel.data import Stream, generator
from bilevel.distribution import Distribution
from bilevel.problem import Forward, Loss, Problem, Shard
from bilevel_problems.tables import Rows, RowTable
from bilevel_problems.variables import ParameterVector


@dataclass
class RidgeReweighting(Problem[Rows]):
    """Clean sources follow the rule that the validation rows follow; flipped ones follow its negative.

    clean, flipped: the number of sources of either kind.
    rows: the number of rows of each source.
    validation_rows: the number of rows of the upper level.
    d: the number of features.
    ridge: ρ.
    noise: the standard deviation of the targets around the rule.
    batch_size: the rows of a batch of either level; None takes all.
    instance: the seed of the data.
    """

    smooth: ClassVar[bool | None] = True
    strongly_convex: ClassVar[bool | None] = True

    clean: int = 3
    flipped: int = 2
    rows: int = 40
    validation_rows: int = 40
    d: int = 8
    ridge: float = 0.05
    noise: float = 0.1
    batch_size: int | None = None
    instance: int = 1

    def __post_init__(self) -> None:
        if min(self.clean, self.rows, self.validation_rows, self.d) < 1 or self.flipped < 0:
            raise ValueError("clean, rows, validation_rows and d must be at least 1, and flipped at least 0")

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return [f"clean-{i}" for i in range(self.clean)] + [f"flipped-{i}" for i in range(self.flipped)]

    @cached_property
    def training(self) -> RowTable:
        """Rows of all sources."""
        return self._data[0]

    @cached_property
    def validation(self) -> RowTable:
        """Rows of the upper level."""
        return self._data[1]

    # Closed forms; x, the logits of the weights, of shape (k,), y of shape (d,).

    def source_losses(self, y: Tensor) -> Tensor:
        """l(y). Shape: (k,)."""
        residual = self.training.features @ y - self.training.targets
        return 0.5 * (residual**2).reshape(-1, self.rows).mean(1)

    def lower_solution(self, x: Tensor) -> Tensor:
        """y*(x)."""
        H, r = self._normal_equations(x)
        return torch.linalg.solve(H, r)

    def penalized_solution(self, x: Tensor, penalty: float) -> Tensor:
        """y*_α(x)."""
        H, r = self._normal_equations(x)
        H_v, r_v = self._validation_equations
        return torch.linalg.solve(penalty * H + H_v, penalty * r + r_v)

    def phi(self, x: Tensor) -> Tensor:
        """Φ(x); differentiable by autograd."""
        v = self.validation
        return 0.5 * ((v.features @ self.lower_solution(x) - v.targets) ** 2).mean()

    def penalized_phi(self, x: Tensor, penalty: float) -> Tensor:
        """L_α(x); differentiable by autograd."""
        H, _ = self._normal_equations(x)
        H_v, r_v = self._validation_equations
        s = H_v @ self.lower_solution(x) - r_v
        return self.phi(x) - 0.5 * s @ torch.linalg.solve(penalty * H + H_v, s)

    # The problem.

    def upper(self) -> nn.Module:
        """The variable x: the weights of the sources, which start equal. Its parameter is their logits."""
        return Distribution(self.names)

    def lower(self) -> nn.Module:
        """The variable y, which starts at 0."""
        return ParameterVector(torch.zeros(self.d))

    def upper_loss(self, x: Forward, y: Forward, batch: Rows) -> Tensor:
        """f(y)."""
        return torch.dot(batch.weight, _losses(y(), batch))

    def lower_loss(self, x: Forward, y: Forward, batch: Rows) -> Loss:
        """g(x, y), with the loss of every source."""
        value = y()
        losses = batch.means(_losses(value, batch), len(self.names))
        total = torch.dot(x(), losses) + 0.5 * self.ridge * batch.share * (value**2).sum()
        return total, dict(zip(self.names, losses.detach(), strict=True))

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Rows]:
        """Validation rows."""
        return self.validation.batch(index, shard, self.batch_size, Stream.UPPER)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Rows]:
        """Rows of every source."""
        return self.training.batch(index, shard, self.batch_size, Stream.LOWER)

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The weight of every source."""
        return dict(zip(self.names, x().tolist(), strict=True))

    def _normal_equations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(x, 0).repeat_interleave(self.rows) / self.rows
        a, b = self.training.features, self.training.targets
        return a.T @ (p[:, None] * a) + self.ridge * torch.eye(self.d, dtype=torch.float64), a.T @ (p * b)

    @cached_property
    def _validation_equations(self) -> tuple[Tensor, Tensor]:
        a, b = self.validation.features, self.validation.targets
        return a.T @ a / len(a), a.T @ b / len(a)

    @cached_property
    def _data(self) -> tuple[RowTable, RowTable]:
        random = generator(self.instance, Stream.INIT)
        rule = torch.from_numpy(random.standard_normal(self.d))

        def draw(rows: int, sign: float) -> tuple[Tensor, Tensor]:
            features = torch.from_numpy(random.standard_normal((rows, self.d)))
            noise = self.noise * torch.from_numpy(random.standard_normal(rows))
            return features, sign * features @ rule + noise

        signs = [1.0] * self.clean + [-1.0] * self.flipped
        features, targets = zip(*(draw(self.rows, sign) for sign in signs), strict=True)
        training = RowTable(torch.cat(features), torch.cat(targets), (self.rows,) * len(signs))
        return training, RowTable(*draw(self.validation_rows, 1.0), (self.validation_rows,))


def _losses(y: Tensor, batch: Rows) -> Tensor:
    return 0.5 * (batch.features @ y - batch.targets) ** 2
