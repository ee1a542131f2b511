"""Proportional: p_i = n_i / Σ_j n_j. This is what pooling all data and drawing from it gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bilevel_llm.baselines.base import Baseline, Outcome, Task
from bilevel_llm.data.tokens import TokenTable

Unit = Literal["rows", "tokens", "targets"]
"""How size is counted. tokens: those that the model sees, after the cut at max_length. targets: those that carry a loss."""


def sizes(tables: Mapping[str, TokenTable], by: Unit) -> dict[str, int]:
    """Source -> its size, which is at least 1, because every table has a target. Of a source that was sampled, the whole."""

    def size(table: TokenTable) -> int:
        if by == "rows":
            return len(table)
        return len(table.ids) if by == "tokens" else int(table.labels.sum())

    return {name: round(size(table) * table.stands_for) for name, table in tables.items()}


@dataclass(frozen=True)
class Proportional(Baseline):
    """Weights in proportion to size.

    by: whether to count rows, tokens or targets. Rows by default, because rows are what is drawn when a mix is made: these
        weights then leave the data as they are.
    """

    trains = False

    by: Unit = "rows"

    def find(self, task: Task) -> Outcome:
        """n_i / Σ n."""
        size = sizes(task.problem.source_tables, self.by)
        return Outcome({name: n / sum(size.values()) for name, n in size.items()})
