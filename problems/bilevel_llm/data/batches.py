"""Rows of token tables as micro-batches whose weights are those of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel import Shard, Stratified
from bilevel_llm.data.packing import Packing
from bilevel_llm.data.padding import PaddedRows
from bilevel_llm.data.tokens import TokenTable


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch.

    ids: tokens, padded on the right. Shape: (rows, length).
    positions: the places, in the flattened (rows * length), from which a target is predicted. Shape: (targets,).
    targets: the tokens to predict there. Shape: (targets,).
    weights: weight of every target in the mean of every source, taken from the global batch: the mean over a source's
        rows of the mean over a row's targets. Shape: (sources, targets).
    share: this micro-batch's share of the rows of the global batch; the shares of all sum to 1.
    size: tokens, without padding.
    rows: number of every row, counted through all tables. Shape: (rows,).
    packing: which places of the rows are computed; None for all.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    share: float
    size: int
    rows: Tensor
    packing: Packing | None = None

    @property
    def row_of_target(self) -> Tensor:
        """The row of the micro-batch that every target belongs to. Shape: (targets,)."""
        return self.positions // self.ids.shape[1]

    def means(self, losses: Tensor) -> Tensor:
        """This micro-batch's part of the mean loss of every source. Shapes: (targets,) -> (sources,)."""
        return self.weights.to(losses) @ losses


class MicroBatches(Sequence[TokenBatch]):
    """Micro-batches, each of which is built when a pass first comes to it, and kept for the passes that follow.

    A GPU is still busy with the one before it then, and does not wait for this one.

    build: makes a micro-batch of a part. parts: what each is made of.
    """

    def __init__(self, build: Callable[[Any], TokenBatch], parts: Sequence[Any]) -> None:
        self._build, self._parts = build, parts
        self._built: dict[int, TokenBatch] = {}

    def __len__(self) -> int:
        """How many there are. Builds none."""
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> TokenBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenBatch]: ...

    def __getitem__(self, index: int | slice) -> TokenBatch | list[TokenBatch]:
        """One of them, or some."""
        number = range(len(self))[index]
        if isinstance(number, range):
            return [self[one] for one in number]
        if number not in self._built:
            self._built[number] = self._build(self._parts[number])
        return self._built[number]


def micro_batches(
    tables: Sequence[TokenTable], sampler: Stratified, index: int, shard: Shard, *, packed: bool = False
) -> MicroBatches:
    """This process's part of batch `index` of the sampler over the tables.

    packed: whether the batches come with a packing, for a model that can take it (see `suitability`).

    Rows are grouped by length, so that little is padded. How they are grouped changes no result: every target's weight
    is fixed by the global batch.
    """
    counts = sampler.counts(index)
    first = np.cumsum([0, *map(len, tables)])
    rows = [
        _Row(source, int(first[source]) + row, *tables[source].row(row), 1.0 / counts[source])
        for source, row in sampler.batch(index, shard.seed, shard.fold)
    ]
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    return MicroBatches(lambda part: _batch(part, len(tables), len(rows), packed), shard.split(rows))


def per_token(batches: Sequence[TokenBatch], tables: Sequence[TokenTable], rows: Sequence[tuple[int, int]]) -> MicroBatches:
    """The same micro-batches, weighted per token instead of per row. rows: (table, row) of the whole global batch."""
    targets = torch.zeros(len(tables), 1)
    for table, row in rows:
        targets[table] += int(tables[table].row(row)[1].sum())
    return MicroBatches(lambda batch: replace(batch, weights=(batch.weights > 0) / targets), batches)


class _Row(NamedTuple):
    """One row, its number through all tables, and its weight in the mean of its source."""

    source: int
    number: int
    ids: NDArray[np.int32]
    labels: NDArray[np.bool_]
    weight: float


def _batch(rows: Sequence[_Row], sources: int, total: int, packed: bool) -> TokenBatch:
    padded = PaddedRows.of([(row.ids, row.labels) for row in rows])
    row_of_target = padded.row.numpy()
    in_row = np.array([row.weight for row in rows]) / np.bincount(row_of_target, minlength=len(rows))
    weights = np.zeros((sources, len(row_of_target)), np.float32)
    weights[np.array([row.source for row in rows])[row_of_target], np.arange(len(row_of_target))] = in_row[row_of_target]
    return TokenBatch(
        padded.ids,
        padded.positions,
        padded.targets,
        torch.from_numpy(weights),
        share=len(rows) / total,
        size=sum(len(row.ids) for row in rows),
        rows=torch.tensor([row.number for row in rows]),
        packing=Packing.of(padded.ids, padded.positions) if packed else None,
    )
