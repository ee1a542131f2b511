"""Rows of data as weighted micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.data import Stratified
from bilevel.problem import Shard


@dataclass(frozen=True)
class Rows:
    """One micro-batch.

    features: shape (rows, d). targets: shape (rows,).
    source: the source that each row belongs to. Shape: (rows,).
    number: the number of each row in the table. Shape: (rows,).
    weight: one over the rows of the same source in the global batch, so that a weighted sum over micro-batches is the
        mean over a source. Shape: (rows,).
    share: the share of the global batch's rows that are in this micro-batch.
    size: the number of rows.
    """

    features: Tensor
    targets: Tensor
    source: Tensor
    number: Tensor
    weight: Tensor
    share: float
    size: int

    def means(self, values: Tensor, sources: int) -> Tensor:
        """This micro-batch's share of the mean of a value over each source. Shapes: (rows,) -> (sources,)."""
        return torch.zeros(sources, dtype=values.dtype).index_add(0, self.source, self.weight * values)


@dataclass(frozen=True)
class RowTable:
    """All rows of one level, grouped by source.

    features: shape (rows, d). targets: shape (rows,).
    sizes: the number of rows of each source, in order.
    """

    features: Tensor
    targets: Tensor
    sizes: tuple[int, ...]
    _whole: dict[tuple[int, int, int | None], Sequence[Rows]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def batch(self, index: int, shard: Shard, batch_size: int | None, stream: int) -> Sequence[Rows]:
        """Batch number `index`: `batch_size` rows, equally many of every source; None takes all rows, in order."""
        if batch_size is not None:
            sampler = Stratified(self.sizes, batch_size, stream)
            return self._split(shard, sampler.batch(index, shard.seed, shard.fold), sampler.counts(index))
        part = (shard.rank, shard.world_size, shard.micro_batch_size)
        if part not in self._whole:  # it is the same at every index
            numbers = [(source, row) for source, size in enumerate(self.sizes) for row in range(size)]
            self._whole[part] = self._split(shard, numbers, np.array(self.sizes))
        return self._whole[part]

    def _split(self, shard: Shard, numbers: Sequence[tuple[int, int]], counts: NDArray[np.int64]) -> Sequence[Rows]:
        """This process's micro-batches of a batch: the rows, as (source, row in it), and how many each source has."""
        first, weights = np.cumsum([0, *self.sizes[:-1]]), 1 / counts
        made = []
        for part in shard.split(numbers):
            source, row = np.array(part, dtype=np.int64).reshape(-1, 2).T
            number = torch.from_numpy(first[source] + row)
            rows = self.features[number], self.targets[number], torch.from_numpy(source.copy()), number
            made.append(Rows(*rows, torch.from_numpy(weights[source]), len(part) / len(numbers), len(part)))
        return made
