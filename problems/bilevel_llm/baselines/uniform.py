"""Uniform: p_i = 1 / k. Every source gets the same weight: what a learned weight has to beat first."""

from dataclasses import dataclass

from bilevel_llm.baselines.base import Baseline, Outcome, Task


@dataclass(frozen=True)
class Uniform(Baseline):
    """The same weight for every source. No settings, no cost."""

    trains = False

    def find(self, task: Task) -> Outcome:
        """1 / k each."""
        names = list(task.problem.source_tables)
        return Outcome(dict.fromkeys(names, 1 / len(names)))
