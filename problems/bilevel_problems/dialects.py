"""`dialects`: data reweighting whose best mix is known, and lies inside the simplex.

Each dialect is a Markov chain over a small vocabulary. A source is a mixture of dialects, row by row; so is the target. The
lower variable is a table of logits for the next token, so that g is convex in it:

    g(x, y) = Σ_i p_i l_i(y),   f(y) = l_target(y),   l(y) = mean over rows and transitions of -log softmax(y[a])_b   (a → b)

With pure sources and long training the best weights are the shares of the target. A single loop in which x is too fast ends
in a corner here, whatever the target: this is the problem to try a solver for weights on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bilevel.data import Stratified, Stream, generator
from bilevel.distribution import Distribution
from bilevel.problem import Forward, Loss, Problem, Shard
from bilevel_problems.variables import ParameterVector


@dataclass(frozen=True)
class Sentences:
    """One micro-batch.

    ids: tokens. Shape: (rows, length).
    source: the source of each row. Shape: (rows,).
    weight: one over the rows of that source in the global batch. Shape: (rows,).
    size: the number of rows.
    """

    ids: Tensor
    source: Tensor
    weight: Tensor
    size: int


@dataclass
class Dialects(Problem[Sentences]):
    """Mixtures of Markov chains, learned by a table of logits.

    mixes: for each source, the shares of the dialects in it.
    target: the shares of the dialects in the validation rows.
    noise: the number of further sources that consist of random words.
    vocabulary: the number of words.
    length: the number of words of a row.
    rows: the number of rows of each source, and of the validation set.
    batch_size: the rows of a batch of either level.
    concentration: of the Dirichlet distribution that the chains are drawn from; the smaller, the more a dialect differs from
        another.
    instance: the seed of the dialects and of the rows.
    """

    smooth: ClassVar[bool | None] = True

    mixes: list[list[float]] = field(default_factory=lambda: [[1.0, 0.0], [0.0, 1.0]])
    target: list[float] = field(default_factory=lambda: [0.7, 0.3])
    noise: int = 1
    vocabulary: int = 16
    length: int = 17
    rows: int = 1000
    batch_size: int = 24
    concentration: float = 0.3
    instance: int = 0

    def __post_init__(self) -> None:
        for name, shares in (("target", self.target), *((f"mixes[{i}]", mix) for i, mix in enumerate(self.mixes))):
            if len(shares) != len(self.target) or min(shares, default=-1) < 0 or abs(sum(shares) - 1) > 1e-9:
                raise ValueError(f"{name} must hold {len(self.target)} shares that sum to 1, not {shares}")
        if len(self.mixes) + self.noise < 1 or self.noise < 0:
            raise ValueError("there must be a source: give mixes, or noise")

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return [f"mix-{i}" for i in range(len(self.mixes))] + [f"noise-{i}" for i in range(self.noise)]

    @cached_property
    def chains(self) -> NDArray[np.float64]:
        """The probability of a word after another in each dialect, and, last, in random words. Shape: (d + 1, V, V)."""
        V = self.vocabulary
        draw = generator(self.instance, Stream.INIT, 0)
        made = [draw.dirichlet([self.concentration] * V, size=V) for _ in self.target]
        return np.array([*made, np.full((V, V), 1 / V)])

    @cached_property
    def training(self) -> Tensor:
        """The rows of all sources. Shape: (k, rows, length)."""
        shares = [[*mix, 0.0] for mix in self.mixes] + [[0.0] * len(self.target) + [1.0]] * self.noise
        return torch.stack([self.draw(share, self.rows, 1, i) for i, share in enumerate(shares)])

    @cached_property
    def validation(self) -> Tensor:
        """The rows of the target. Shape: (rows, length)."""
        return self.draw([*self.target, 0.0], self.rows, 2)

    def draw(self, shares: Sequence[float], rows: int, *purpose: int) -> Tensor:
        """Rows of a mixture of dialects. Shape: (rows, length)."""
        random = generator(self.instance, Stream.INIT, *purpose)
        cumulative = self.chains.cumsum(2)
        dialect = random.choice(len(self.chains), size=rows, p=shares)
        ids = np.empty((rows, self.length), dtype=np.int64)
        ids[:, 0] = random.integers(self.vocabulary, size=rows)
        for t in range(1, self.length):
            above = random.random((rows, 1)) > cumulative[dialect, ids[:, t - 1]]
            ids[:, t] = above.sum(1).clip(0, self.vocabulary - 1)
        return torch.from_numpy(ids)

    def upper(self) -> nn.Module:
        """The weights of the sources."""
        return Distribution(self.names)

    def lower(self) -> nn.Module:
        """The table of logits, which starts at 0."""
        return ParameterVector(torch.zeros(self.vocabulary, self.vocabulary))

    def row_losses(self, y: Forward, ids: Tensor) -> Tensor:
        """The mean loss of every row. Shapes: (rows, length) -> (rows,)."""
        scores = torch.log_softmax(y(), 1)
        return -scores[ids[:, :-1], ids[:, 1:]].mean(1)

    def upper_loss(self, x: Forward, y: Forward, batch: Sentences) -> Tensor:
        """f(y)."""
        return self.row_losses(y, batch.ids) @ batch.weight

    def lower_loss(self, x: Forward, y: Forward, batch: Sentences) -> Loss:
        """g(x, y), with the loss of every source."""
        weighted = batch.weight * self.row_losses(y, batch.ids)
        losses = torch.zeros(len(self.names), dtype=weighted.dtype).index_add(0, batch.source, weighted)
        return torch.dot(x().to(losses), losses), dict(zip(self.names, losses.detach(), strict=True))

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Sentences]:
        """Validation rows."""
        return self._batch(self.validation[None], Stream.UPPER, index, shard)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Sentences]:
        """Rows of every source."""
        return self._batch(self.training, Stream.LOWER, index, shard)

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The weight of every source."""
        return dict(zip(self.names, x().tolist(), strict=True))

    def _batch(self, table: Tensor, stream: int, index: int, shard: Shard) -> list[Sentences]:
        sampler = Stratified((self.rows,) * len(table), self.batch_size, stream)
        counts = sampler.counts(index)
        parts = [np.array(part).T for part in shard.split(sampler.batch(index, shard.seed, shard.fold))]
        return [
            Sentences(
                table[torch.from_numpy(source), torch.from_numpy(row)],
                torch.from_numpy(source),
                torch.from_numpy(1.0 / counts[source]),
                len(source),
            )
            for source, row in parts
        ]
