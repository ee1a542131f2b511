"""comparison.json: what a comparison of methods measured, and its tables.

    {
      "methods": ["uniform", "learned"],
      "seeds": [0, 1, 2],
      "unit": "tokens",
      "metric_info": {"loss/target": {"better": "lower", "unit": "nats"}},
      "cells": [
        {"method": "uniform", "seed": 0, "metrics": {"loss/target": 2.41}, "cost": {"gpu_seconds": 61.5, "size": 100000}}
      ],
      "differences": [
        {"method": "learned", "against": "uniform", "metric": "loss/target", "mean": -0.08, "low": -0.11, "high": -0.05}
      ],
      "findings": [{"name": "one-seed", "flagged": true, "sentence": "one seed: the intervals are over test rows alone"}]
    }

`metrics` may hold null where a cell could not be scored; `cost`, `findings` and `unit` may be left out. `low` and `high`
are the ends of a 95% interval of the paired difference method - against. Other keys are allowed, and not shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from bilevel.account import Finding, Labels
from bilevel.documents import read_json
from bilevel.statistics import Interval, interval

FILE = "comparison.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class MetricInfo(_Part):
    """Whether lower or higher values of a metric are better, and its unit."""

    better: Literal["lower", "higher"]
    unit: str | None = None


class CellCost(_Part):
    """What a cell cost: GPU time, and the units on which it trained."""

    gpu_seconds: float | None = None
    size: int | None = None


class CellResult(_Part):
    """One method with one seed."""

    method: str
    seed: int
    metrics: dict[str, float | None]
    cost: CellCost = CellCost()


class Difference(_Part):
    """The difference in a metric between two methods, paired by seed (and held-out row), with its 95% interval."""

    method: str
    against: str
    metric: str
    mean: float
    low: float
    high: float


class Comparison(_Part):
    """The content of comparison.json."""

    methods: list[str]
    seeds: list[int]
    cells: list[CellResult]
    differences: list[Difference] = []
    findings: list[Finding] = []
    unit: str = Labels.unit
    metric_info: dict[str, MetricInfo]

    @model_validator(mode="after")
    def _names_agree(self) -> Comparison:
        for cell in self.cells:
            if cell.method not in self.methods:
                raise ValueError(f"a cell names the method {cell.method!r}, which is not among `methods`")
            if cell.seed not in self.seeds:
                raise ValueError(f"a cell of {cell.method!r} names the seed {cell.seed}, which is not among `seeds`")
            for metric in cell.metrics:
                if metric not in self.metric_info:
                    raise ValueError(f"metric_info does not describe {metric!r}, so which way is better is unknown")
        for difference in self.differences:
            if {difference.method, difference.against} - set(self.methods):
                raise ValueError(
                    f"a difference names {difference.method!r} and {difference.against!r}; `methods` does not have both"
                )
            if difference.metric not in self.metric_info:
                raise ValueError(f"metric_info does not describe {difference.metric!r}, so which way is better is unknown")
        return self

    @property
    def metrics(self) -> list[str]:
        """The metrics that were measured, in the order of `metric_info`."""
        measured = {metric for cell in self.cells for metric in cell.metrics} | {d.metric for d in self.differences}
        return [metric for metric in self.metric_info if metric in measured]

    def values(self, method: str, metric: str) -> list[float]:
        """The values of a metric, one for each seed."""
        found = [cell.metrics.get(metric) for cell in self.cells if cell.method == method]
        return [value for value in found if value is not None and math.isfinite(value)]

    def all_findings(self) -> list[Finding]:
        """The findings of the file, and what limits the comparison (missing cells, unequal budgets)."""
        found = list(self.findings)
        done = {(cell.method, cell.seed) for cell in self.cells}
        wanted = [(method, seed) for method in self.methods for seed in self.seeds]
        missing = [f"{method}, seed {seed}" for method, seed in wanted if (method, seed) not in done]
        if missing:
            words = f"not finished: {len(missing)} of {len(wanted)} cells are missing ({'; '.join(missing)})"
            found.append(Finding("not-finished", True, words))
        budgets = {cell.cost.size for cell in self.cells if cell.cost.size is not None}
        if budgets and max(budgets) > 1.01 * min(budgets):  # less is no difference: a run cannot end within a batch
            words = f"unequal budgets: cells trained on {min(budgets):,} to {max(budgets):,} {self.unit}"
            found.append(Finding("unequal-budgets", True, words))
        return found


def read_comparison(directory: Path) -> Comparison:
    """Read `comparison.json`. Raises `DamagedError` naming the file and the key that is wrong."""
    return read_json(directory / FILE, Comparison)


@dataclass(frozen=True)
class Score:
    """A method's mean over seeds on one metric. `best`: whether it is the best of all methods."""

    interval: Interval
    best: bool


@dataclass(frozen=True)
class ScoreRow:
    """A line of the table of scores."""

    method: str
    scores: Sequence[Score | None]
    gpu_seconds: float | None
    size: float | None


def score_rows(comparison: Comparison) -> list[ScoreRow]:
    """One line for each method: the mean and interval over seeds of every metric, and the mean cost of a seed."""
    means = {
        (method, metric): interval(values)
        for metric in comparison.metrics
        for method in comparison.methods
        if (values := comparison.values(method, metric))
    }
    best = {}
    for metric in comparison.metrics:
        candidates = [means[method, metric].mean for method in comparison.methods if (method, metric) in means]
        choose = min if comparison.metric_info[metric].better == "lower" else max
        best[metric] = choose(candidates, default=float("nan"))

    def score(method: str, metric: str) -> Score | None:
        found = means.get((method, metric))
        return None if found is None else Score(found, found.mean == best[metric])

    return [
        ScoreRow(
            method,
            [score(method, metric) for metric in comparison.metrics],
            _mean([cell.cost.gpu_seconds for cell in comparison.cells if cell.method == method]),
            _mean([cell.cost.size for cell in comparison.cells if cell.method == method]),
        )
        for method in comparison.methods
    ]


@dataclass(frozen=True)
class DifferenceRow:
    """A line of the table of differences; verdict: "better", "worse" or "not told apart"."""

    method: str
    against: str
    metric: str
    interval: Interval
    verdict: str


def difference_rows(comparison: Comparison) -> list[DifferenceRow]:
    """The differences with their verdicts in words, metric by metric."""
    rows = []
    for d in sorted(comparison.differences, key=lambda d: comparison.metrics.index(d.metric)):
        found = Interval(d.mean, d.low, d.high)
        gain = (d.mean < 0) == (comparison.metric_info[d.metric].better == "lower")
        verdict = ("better" if gain else "worse") if found.excludes_zero else "not told apart"
        rows.append(DifferenceRow(d.method, d.against, d.metric, found, verdict))
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
