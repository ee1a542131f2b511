"""Which rows make a batch that is drawn from a mix of sources, and which make a pass through a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bilevel import Stratified

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class DrawnByWeight(Stratified):
    """Batches that hold rows of every source in proportion to its weight; see `Stratified` for the order of rows.

    weights: one for each source, not negative, summing to 1.

    Systematic sampling: batch t takes the rows at u_t, u_t + 1, u_t + 2, ... along a line on which a source is as long as
    its part of the batch, so that its number of rows is the whole number above or below that part. The offsets u_t go on by
    the golden ratio: over many batches, too, each source's total stays within a few rows of what its weight asks for. A
    source whose weight is small may be absent from a batch, which `Stratified` would not allow.
    """

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} sources need as many weights, not {len(self.weights)}")

    def _drawn_before(self, index: int) -> NDArray[np.int64]:
        ends = np.cumsum((0.0, *self.weights))
        ends /= ends[-1]
        offsets = (0.5 + _GOLDEN * np.arange(index)) % 1
        rows_before = np.floor(self.batch_size * ends + offsets[:, None]).astype(np.int64).sum(0)
        drawn: NDArray[np.int64] = rows_before[1:] - rows_before[:-1]
        return drawn


@dataclass(frozen=True)
class InOrder(Stratified):
    """One pass through the rows of a single table, in order. The last batch takes the last rows, some of them again."""

    @property
    def batches(self) -> int:
        """The number of batches in the pass."""
        return -(-self.sizes[0] // self.batch_size)

    def first(self, index: int) -> int:
        """The first row of a batch."""
        return min(index * self.batch_size, self.sizes[0] - self.batch_size)

    def counts(self, index: int) -> NDArray[np.int64]:
        """All rows of the batch are those of the table."""
        return np.array([self.batch_size])

    def batch(self, index: int, seed: int, fold: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """The rows of the batch, as (0, row). A pass goes through all rows, whatever the fold."""
        return [(0, self.first(index) + i) for i in range(self.batch_size)]
