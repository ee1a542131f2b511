"""How many rows each source gives to a mix: whole numbers from weights, and what happens where a source has too few."""

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Weights = NDArray[np.float64]


def largest_remainder(weights: Weights, total: int) -> Counts:
    """Whole numbers that sum to `total` and differ from total * weights by less than one each. Shape: (sources,).

    Every source gets the whole part of its share; the rows that are left go to the largest fractions, of equal ones to
    the earlier source. weights: not negative, summing to 1.
    """
    exact = weights * total
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    first = np.argsort(counts - exact, kind="stable")[:left]  # largest fraction first
    counts[first] += 1
    return counts


def largest_total(weights: Weights, capacity: Counts) -> int:
    """The largest total whose quotas all fit: largest_remainder(weights, total) <= capacity."""
    used = weights > 0
    most = int(np.min((capacity[used] + 1) / weights[used]))  # a quota is never below the whole part of its share
    for total in range(most, 0, -1):
        if (largest_remainder(weights, total) <= capacity).all():
            return total
    return 0


def redistribute(weights: Weights, capacity: Counts, total: int) -> Counts:
    """Quotas in which a source that has too few rows gives all it has, and the others share the rest by their weights.

    Sums to the smaller of `total` and what all sources with a positive weight hold.
    """
    counts = np.zeros(len(weights), np.int64)
    open_ = weights > 0
    while open_.any() and total > 0:
        share = np.where(open_, weights, 0.0)
        wanted = largest_remainder(share / share.sum(), total)
        short = open_ & (wanted > capacity)
        if not short.any():
            return counts + wanted
        counts[short] = capacity[short]
        total -= int(capacity[short].sum())
        open_ &= ~short
    return counts
