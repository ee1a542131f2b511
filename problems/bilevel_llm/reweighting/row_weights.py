"""The upper variable as a distribution over the rows of all sources."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bilevel.distribution import free_part


class RowWeights(nn.Module):
    """p_r = floor / n_i + (1 - k · floor) · softmax_r(log p⁰_r + score_r): see `granularity`.

    score: a module that gives the score of every row, without arguments. Shape: (rows,).
    initial: weights of the sources to start from (where all scores are equal), above the floor. Shape: (k,).
    sizes: rows of each source; rows are numbered through all sources in this order.
    floor: smallest weight a source can get, spread evenly over its rows.

    The normalizer is that of all rows, in every forward: a batch that normalized itself would be biased.
    """

    log_start: Tensor
    least: Tensor

    def __init__(self, score: nn.Module, initial: Tensor, sizes: Sequence[int], floor: float = 0.0) -> None:
        super().__init__()
        self.score = score
        self.sizes = list(sizes)
        self.free = 1 - len(self.sizes) * floor
        rows = torch.tensor(self.sizes, dtype=torch.float64)
        start = free_part(initial, floor).log() - rows.log()
        # made from the recipe: not part of what is learned and saved
        self.register_buffer("log_start", start.repeat_interleave(rows.long()), persistent=False)
        self.register_buffer("least", (floor / rows).repeat_interleave(rows.long()), persistent=False)

    def forward(self, rows: Tensor | slice | None = None) -> Tensor:
        """The weights of these rows, shape (rows,); without any, the sum over every source's rows, shape (k,)."""
        weights = self.least + self.free * torch.softmax(self.log_start + self.score(), 0)
        if rows is not None:
            return weights[rows]
        return torch.stack([part.sum() for part in torch.split(weights, self.sizes)])


class RowLogits(nn.Module):
    """A score of its own for every row, from 0.

    In float64, as the logits of `bilevel.Distribution` are.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(rows, dtype=torch.float64))

    def forward(self) -> Tensor:
        """Shape: (rows,)."""
        return self.logits * 1  # a new tensor, never the bare parameter
