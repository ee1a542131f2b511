"""Losses as pretraining papers define them: the mean over all tokens of a source, so that long rows count more.

`LLMReweighting` itself takes the mean over rows of each row's mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel import Shard
from bilevel_llm.data.batches import TokenBatch, per_token
from bilevel_llm.reweighting.problem import LLMReweighting


def token_batches(problem: LLMReweighting, index: int, shard: Shard) -> Sequence[TokenBatch]:
    """Lower batch number `index`, with weights that turn a source's losses into its mean over tokens of the global batch."""
    rows = problem.lower_rows(index, shard.seed)
    return per_token(problem.lower_batch(index, shard), list(problem.source_tables.values()), rows)


def batch_tokens(problem: LLMReweighting, index: int, seed: int) -> int:
    """The number of tokens in lower batch number `index`, over all processes."""
    tables = list(problem.source_tables.values())
    return sum(len(tables[source].row(row)[0]) for source, row in problem.lower_rows(index, seed))


def source_means(losses: Tensor, batch: TokenBatch) -> Tensor:
    """This micro-batch's part of the mean of every source, in float64 if the device has it. Shapes: (n,) -> (sources,)."""
    dtype = torch.float32 if losses.device.type == "mps" else torch.float64
    return batch.weights.to(dtype) @ losses.to(dtype)
