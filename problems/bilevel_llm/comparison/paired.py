"""The difference between two methods, paired by seed and by test row, and how far it can be trusted.

    d = Σ_s Σ_r (a_sr - b_sr) / (S · Σ_r n_r)        s: seed, r: test row, n_r: what row r counts (tokens, or 1)

Two things could have been otherwise: the test rows, and the seeds. Rows are resampled (the bootstrap; Efron 1979), the same
ones for both methods and all seeds. Seeds are too few for that: resampling three of them gives intervals that miss the truth
one time in four. Their part is drawn from Student's t with S - 1 degrees of freedom, times the standard error of the seeds'
own differences. The two parts are added, draw by draw; the interval is between the 2.5% and 97.5% points.

A row's reaction to a seed is counted in both parts, which makes intervals slightly wide, never narrow (as in the pigeonhole
bootstrap of such crossed data; Owen, Annals of Applied Statistics 2007). With one seed, only the rows' part is there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bilevel.statistics import Interval

DRAWS = 10_000  # the ends are then known to within about 3% of the interval's width
_BLOCK = 1 << 22  # resampling counts held at once: 32 MiB


def paired_interval(a: ArrayLike, b: ArrayLike, counts: ArrayLike, *, draws: int = DRAWS) -> Interval:
    """The mean difference a - b and its 95% interval. The same data give the same interval.

    a, b: for each seed and test row, in the same order, the sum over what the row counts. Shape: (seeds, rows).
    counts: what each row counts, positive. Shape: (rows,).
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    weight = np.asarray(counts, np.float64)
    seeds, rows = difference.shape
    of_seeds = difference.sum(1) / weight.sum()
    mean = float(of_seeds.mean())
    if seeds < 2 and rows < 2:
        return Interval(mean, float("nan"), float("nan"))
    random = np.random.default_rng(0)
    spread = np.zeros(draws)
    if rows > 1:
        of_rows = difference.mean(0)
        parts = [drawn @ np.stack([of_rows, weight], 1) for drawn in _resampled(random, rows, draws)]
        sums = np.concatenate(parts)
        spread += sums[:, 0] / sums[:, 1] - mean
    if seeds > 1:
        spread += random.standard_t(seeds - 1, draws) * of_seeds.std(ddof=1) / np.sqrt(seeds)
    low, high = np.percentile(spread, [2.5, 97.5])
    return Interval(mean, float(mean + low), float(mean + high))


def _resampled(random: np.random.Generator, rows: int, draws: int) -> Iterator[NDArray[np.int64]]:
    """How often each row is drawn, with replacement. Shape of each block: (some draws, rows)."""
    size = max(1, _BLOCK // rows)
    for start in range(0, draws, size):
        yield random.multinomial(rows, np.full(rows, 1 / rows), size=min(size, draws - start))
