"""The rows that one source can give, in the order in which a mix takes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bilevel.data import generator
from bilevel_llm.data.overlap import rows_in
from bilevel_llm.data.tokens import TokenTable

_DRAW = 1001  # beside the streams of `bilevel.data.Stream`: a mix shares no random number with a run


@dataclass(frozen=True, eq=False)
class Pool:
    """One source's rows in an endless order: all of them in random order, then all again in another, and so on.

    The first n are the same whatever is drawn later, so that a larger mix of the same seed holds the smaller one.

    table: the source.
    rows: rows of the table that may be drawn. Shape: (available,).
    index: the source's place in the recipe.
    withheld: rows that are never drawn, because they also occur in a validation set.
    """

    name: str
    table: TokenTable
    rows: NDArray[np.int64]
    index: int
    seed: int
    withheld: int = 0

    def draw(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first `count`: rows of the table, and which copy each is, from 1. Shapes: (count,), (count,)."""
        if not count:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        available = len(self.rows)
        order = np.concatenate([self._round(number) for number in range(-(-count // available))])[:count]
        return order, np.arange(count) // available + 1

    def tokens(self, count: int) -> int:
        """Tokens of the first `count`, as the run that learned the weights sees them (cut at its max_length)."""
        if not count or not len(self.rows):
            return 0
        rounds, rest = divmod(count, len(self.rows))
        lengths = self.table.lengths
        return int(rounds * lengths[self.rows].sum() + lengths[self._round(rounds)[:rest]].sum())

    def _round(self, number: int) -> NDArray[np.int64]:
        return self.rows[_permutation(len(self.rows), self.seed, self.index, number)]


def make_pools(
    sources: Mapping[str, TokenTable],
    validation: Mapping[str, TokenTable],
    seed: int,
    selection: Mapping[str, NDArray[np.int64]] | None = None,
) -> list[Pool]:
    """A pool for every source, without the rows that also occur in a validation set (see `overlap`).

    selection: source -> the rows of its table that may be drawn; None allows all.
    """
    pools = []
    for index, (name, table) in enumerate(sources.items()):
        rows = np.arange(len(table)) if selection is None else np.sort(selection[name])
        known = rows_in(table, validation)[rows]
        pools.append(Pool(name, table, rows[~known], index, seed, int(known.sum())))
    return pools


@lru_cache(maxsize=64)
def _permutation(size: int, seed: int, index: int, number: int) -> NDArray[np.int64]:
    return generator(seed, _DRAW, index, number).permutation(size)
