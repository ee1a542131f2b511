"""A random sample of rows that are read one by one, without knowing how many there will be."""

import heapq
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def sampled(rows: Iterable[T], size: int, seed: int) -> tuple[list[tuple[int, T]], int]:
    """At most `size` of the rows, each set of them as likely as any other.

    Every row draws a number by its place in the order of reading, and the rows with the smallest numbers are kept: in one
    pass, with no more than `size` rows in memory. The same rows, size and seed give the same sample in every process; a
    smaller sample of the same seed is a part of a larger one.

    Returns the sample with the place of each row, from 0 and in order, and the number of all rows.
    """
    draw = random.Random(seed).random  # the same numbers in every version of Python
    kept: list[tuple[float, int, T]] = []  # a heap, with the largest number on top
    count = 0
    for place, row in enumerate(rows):
        count += 1
        number = -draw()
        if len(kept) < size:
            heapq.heappush(kept, (number, place, row))
        elif number > kept[0][0]:
            heapq.heapreplace(kept, (number, place, row))
    return sorted(((place, row) for _, place, row in kept), key=lambda entry: entry[0]), count
