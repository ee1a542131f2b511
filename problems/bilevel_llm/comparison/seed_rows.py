"""The rows that the methods of a seed find weights on: the same for all seeds, or samples of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bilevel import InputError
from bilevel_llm.data.reading import each_row, reading_again
from bilevel_llm.data.rows import fingerprint
from bilevel_llm.data.settings import DataSet, Source, ValidationSet
from bilevel_llm.reweighting.problem import LLMReweighting

S = TypeVar("S", Source, ValidationSet)


class SeedRows:
    """Seed -> the problem with the rows of that seed, prepared.

    fresh: every source and validation set that has `max_rows`, and no `sample_seed`, is sampled by the seed.

    Raises `InputError` if there is nothing to be sampled.
    """

    def __init__(self, problem: LLMReweighting, fresh: bool) -> None:
        if fresh and not any(map(_is_sampled, (*problem.sources, *problem.validation))):
            raise InputError(
                "compare.fresh_rows is set, and no source or validation set can have fresh rows: give them max_rows, and no "
                "sample_seed"
            )
        self._problem = problem
        self._fresh = fresh
        self._of_seed: dict[int, LLMReweighting] = {}

    def __call__(self, seed: int) -> LLMReweighting:
        """The problem of the seed."""
        key = seed if self._fresh else 0
        if key not in self._of_seed:
            problem = self._problem if not self._fresh else self._sampled(seed)
            problem.prepare()
            self._of_seed[key] = problem
        return self._of_seed[key]

    def fingerprint(self) -> str:
        """The hash of the model, the files, and their rows as tokens; of one sample of them, where each seed has its own."""
        return self(0).fingerprint()

    @cached_property
    def elsewhere(self) -> Mapping[str, NDArray[np.uint64]]:
        """Source or validation set -> the fingerprints of its rows. Where rows are fresh, of all rows of its files.

        A test row that only the sample of another seed has would not be the same test for all seeds.
        """
        problem = self(0)
        tables = {
            **{f"the source {name!r}": table for name, table in problem.source_tables.items()},
            **{f"the validation set {name!r}": table for name, table in problem.validation_tables.items()},
        }
        found = {place: table.fingerprints for place, table in tables.items()}
        if self._fresh:
            on_bad = reading_again(problem.on_bad_row)
            for place, data in zip(found, (*self._problem.sources, *self._problem.validation), strict=True):
                if _is_sampled(data):
                    rows = (row for path in data.files() for row in each_row(path, data.format, None, on_bad, data.fields))
                    found[place] = np.fromiter((fingerprint(row) for row in rows), np.uint64)
        return found

    def _sampled(self, seed: int) -> LLMReweighting:
        def of_seed(data: S) -> S:
            return replace(data, sample_seed=seed) if _is_sampled(data) else data

        problem = self._problem
        return replace(problem, sources=[*map(of_seed, problem.sources)], validation=[*map(of_seed, problem.validation)])


def _is_sampled(data: DataSet) -> bool:
    return data.max_rows is not None and data.sample_seed is None
