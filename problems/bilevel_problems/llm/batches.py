"""Rows of token tables as micro-batches whose weights are those of the global batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import Shard, Stratified
from bilevel_problems.llm.tokens import TokenTable


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
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    share: float
    size: int


def micro_batches(tables: Sequence[TokenTable], sampler: Stratified, index: int, shard: Shard) -> list[TokenBatch]:
    """This process's part of batch `index` of the sampler over the tables.

    Rows are grouped by length, so that little is padded. How they are grouped changes no result: every target's weight
    is fixed by the global batch.
    """
    counts = sampler.counts(index)
    rows = [(source, *map(torch.from_numpy, tables[source].row(row))) for source, row in sampler.batch(index, shard.seed)]
    rows.sort(key=lambda row: len(row[1]), reverse=True)
    return [
        _pad([(source, ids, labels, 1.0 / int(counts[source])) for source, ids, labels in part], len(tables), len(rows))
        for part in shard.split(rows)
    ]


def _pad(rows: Sequence[tuple[int, Tensor, Tensor, float]], sources: int, total: int) -> TokenBatch:
    """rows: (source, ids, labels, weight of the row in its source's mean)."""
    length = max(len(ids) for _, ids, _, _ in rows)
    padded = torch.zeros(len(rows), length, dtype=torch.int64)  # causal attention: what follows a token is never seen
    positions, targets, weights = [], [], []
    for place, (source, ids, labels, weight) in enumerate(rows):
        padded[place, : len(ids)] = ids
        predicted = labels[1:].nonzero().squeeze(1)  # the label of a token belongs to the position before it
        positions.append(predicted + place * length)
        targets.append(ids[1:][predicted])
        column = torch.zeros(sources, len(predicted))
        column[source] = weight / len(predicted)
        weights.append(column)
    return TokenBatch(
        padded,
        torch.cat(positions),
        torch.cat(targets).long(),
        torch.cat(weights, dim=1),
        share=len(rows) / total,
        size=sum(len(ids) for _, ids, _, _ in rows),
    )
