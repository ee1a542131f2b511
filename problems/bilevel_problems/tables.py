"""Rows of data as weighted micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def batch(self, index: int, shard: Shard, batch_size: int | None, stream: int) -> Sequence[Rows]:
        """Batch number `index`: `batch_size` rows, equally many of every source; None takes all rows, in order."""
        if batch_size is None:
            numbers = [(source, row) for source, size in enumerate(self.sizes) for row in range(size)]
            counts = list(self.sizes)
        else:
            sampler = Stratified(self.sizes, batch_size, stream)
            numbers, counts = sampler.batch(index, shard.seed, shard.fold), sampler.counts(index).tolist()
        first = [sum(self.sizes[:source]) for source in range(len(self.sizes))]
        return [self._rows(part, counts, first, len(numbers)) for part in shard.split(numbers)]

    def _rows(self, part: Sequence[tuple[int, int]], counts: list[int], first: list[int], total: int) -> Rows:
        source = torch.tensor([source for source, _ in part])
        number = torch.tensor([first[source] + row for source, row in part])
        weight = (1 / torch.tensor(counts, dtype=torch.float64))[source]
        return Rows(self.features[number], self.targets[number], source, number, weight, len(part) / total, len(part))
