"""Uniform: p_i = 1 / k. Every source gets the same weight, which is what learned weights have to beat first."""

from dataclasses import dataclass

from bilevel_llm.baselines.base import Baseline, Outcome, Task


@dataclass(frozen=True)
class Uniform(Baseline):
    """The same weight for every source. It has no settings and costs nothing."""

    trains = False

    def find(self, task: Task) -> Outcome:
        """Every source gets 1 / k."""
        names = list(task.problem.source_tables)
        return Outcome(dict.fromkeys(names, 1 / len(names)))
