"""Which samples make batch number `index`: counter-based and stratified, so that nothing has to be remembered.

Every random number of a run comes from `generator(seed, stream, *counters)`: a Philox generator keyed by its arguments.
A batch is therefore a function of (seed, index): both replicas see the same one, and a resumed run goes on as if it had
never stopped.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import InputError


class Stream(IntEnum):
    """The purposes of random numbers. Different streams are independent of each other."""

    ACTIVE = 1
    UPPER = 2
    LOWER = 3
    NOISE = 4
    INIT = 5


DEAL = 2**32 - 1  # a counter that no walk reaches: the shuffle by which rows are dealt into folds


def generator(seed: int, stream: int, *counters: int) -> np.random.Generator:
    """A random generator that is a function of its arguments."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(stream), *counters])))


@dataclass(frozen=True)
class Stratified:
    """Batches that hold a fixed number of samples of every stratum (data source, validation set).

    sizes: rows of each stratum.
    batch_size: samples of one global batch; every stratum gets batch_size // k of them, and the remainder goes round
        robin over the strata, so that over k batches all get the same number.
    stream: which random numbers to use; the two levels must use different ones.

    The rows of each stratum are taken in random order without replacement, and reshuffled when all have been taken. At any
    index each row of a stratum is equally likely, so the mean over a stratum's samples estimates the stratum's mean without
    bias.

    Raises `InputError` if batch_size is smaller than the number of strata: a source absent from a batch would get a
    gradient that says nothing about it.
    """

    sizes: tuple[int, ...]
    batch_size: int
    stream: int

    def __post_init__(self) -> None:
        if self.batch_size < len(self.sizes):
            raise InputError(
                f"a batch of {self.batch_size} cannot hold a sample of each of {len(self.sizes)} sources; "
                f"set batch_size to at least {len(self.sizes)}"
            )

    def counts(self, index: int) -> NDArray[np.int64]:
        """Samples of each stratum in batch `index`; they sum to batch_size. Shape: (strata,)."""
        return self._drawn_before(index + 1) - self._drawn_before(index)

    def batch(self, index: int, seed: int, fold: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """The samples of batch `index`, as (stratum, row) in order of stratum.

        fold: walk through one fold of each stratum's rows alone; see `Shard`. Every seed deals the rows differently. A fold
            with fewer rows than a batch takes gives some of them twice.

        Raises `InputError` if a stratum has fewer rows than there are folds.
        """
        first, last = self._drawn_before(index), self._drawn_before(index + 1)
        return [
            (stratum, row)
            for stratum in range(len(self.sizes))
            for row in self._walk(stratum, int(first[stratum]), int(last[stratum]), seed, fold)
        ]

    def _walk(self, stratum: int, first: int, last: int, seed: int, fold: tuple[int, int] | None) -> list[int]:
        """Rows number first..last-1 of an endless walk through a stratum (or a fold of it), reshuffled in every round."""
        size, key = self.sizes[stratum], (seed, self.stream, stratum)
        if fold is None:
            return [int(_permutation(size, (*key, place // size))[place % size]) for place in range(first, last)]
        number, folds = fold
        if size < folds:
            raise InputError(f"{size} rows cannot be dealt into {folds} folds; add rows, or use fewer folds (solver.folds)")
        rows = _permutation(size, (*key, DEAL))[number::folds]
        n = len(rows)
        return [int(rows[_permutation(n, (*key, DEAL, number, place // n))[place % n]]) for place in range(first, last)]

    def _drawn_before(self, index: int) -> NDArray[np.int64]:
        """The number of samples of each stratum before batch `index`, in closed form, so that resuming needs no replay."""
        k = len(self.sizes)
        each, remainder = divmod(self.batch_size, k)
        extra = index * remainder  # the remainder's places are dealt out in turn
        turns, part = divmod(extra, k)
        return each * index + turns + (np.arange(k) < part).astype(np.int64)


def _permutation(size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    return _short(size, key) if size <= 1024 else _long(size, key)


@lru_cache(maxsize=4096)  # 32 MB at most, and enough for many seeds side by side
def _short(size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    return generator(*key).permutation(size)


@lru_cache(maxsize=256)
def _long(size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    return generator(*key).permutation(size)
