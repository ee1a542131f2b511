"""What can be read from the records of a reweighting run, and the findings about whether to trust its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bilevel.account import Finding
from bilevel.evidence import ENOUGH, Evidence
from bilevel.plugins import load_plugins
from bilevel.record import Record, average, moving, upper_table


class Trust:
    """Reads the history of a reweighting run.

    validation_rows: the number of rows of each validation set; None if they are not known.

    Only the solver `rounds` leaves evidence that can be tested: signals that were measured with the weights held, on
    disjoint folds of the rows. Of the runs of other solvers, it can be said what speaks against them, but not what for.
    """

    def __init__(self, history: Sequence[Record], validation_rows: Mapping[str, int] | None = None) -> None:
        self.history = history
        self.validation_rows = validation_rows
        self.names = list(history[0].upper)
        self.moving = moving(history)

    @property
    def has_one_source(self) -> bool:
        """Whether there is only one source, which always has all the weight."""
        return len(self.names) == 1

    @cached_property
    def of_rounds(self) -> bool:
        """Whether the run's solver goes in rounds."""
        return "round" in self.history[-1].metrics

    @cached_property
    def horizon(self) -> int:
        """The number of steps of a round, as far as the run has come."""
        return 1 + max(int(record.metrics["round_step"]) for record in self.history)

    @cached_property
    def rounds(self) -> list[Sequence[Record]]:
        """The records of each whole round; none for other solvers."""
        if not self.of_rounds:
            return []
        whole: list[Sequence[Record]] = []
        for record in self.history:
            if "signal" in record.parts:
                last = int(record.metrics["round_step"])
                whole.append(self.history[record.step - last : record.step + 1])
        return whole

    @cached_property
    def evidence(self) -> Evidence | None:
        """The signals of all rounds; None if there are none."""
        ends = [records[-1] for records in self.rounds]
        if not ends or self.has_one_source:
            return None

        def table(key: str) -> NDArray[np.float64]:
            return np.array([[record.parts[key][name] for name in self.names] for record in ends])

        tried, signals, prior = table("tried"), table("signal"), table("prior")[-1]
        last = ends[-1].metrics
        return _evidence(tried.tobytes(), signals.tobytes(), int(last["folds"]), prior.tobytes(), last["pull"])

    @property
    def judged(self) -> Evidence | None:
        """The evidence, if there is enough of it for standard errors."""
        return self.evidence if self.evidence is not None and self.evidence.enough else None

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """The weights after each step that could move them. Shape: (steps, sources)."""
        return upper_table(self.moving, self.names)

    @cached_property
    def average(self) -> dict[str, float]:
        """The weights that the run comes to; see `bilevel.record.average`."""
        return average(self.history)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% interval of each weight; none where there is not enough evidence."""
        if self.judged is None or not self.judged.ordered:
            return {}
        low, high = self._with_floor(self.judged.intervals[0]), self._with_floor(self.judged.intervals[1])
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(self.names)}

    @cached_property
    def ranked(self) -> list[str]:
        """The sources, heaviest first."""
        return sorted(self.names, key=lambda name: -self.average[name])

    @cached_property
    def neighbors(self) -> list[tuple[str, str, bool]]:
        """Neighbors in the ranking, and whether the order of the two is beyond doubt."""
        return [(upper, lower, self.is_clear(upper, lower)) for upper, lower in pairwise(self.ranked)]

    def is_clear(self, upper: str, lower: str) -> bool:
        """Whether it is beyond doubt that one source deserves more weight than another."""
        return self.judged is not None and self.judged.clear(self.names.index(upper), self.names.index(lower))

    def change_over_round(self, metric: str) -> NDArray[np.float64]:
        """The change of a loss from the first quarter of each round to its last, as a share of it. Shape: (rounds,)."""
        quarter = max(1, self.horizon // 4)
        changes = []
        for records in self.rounds:
            values = [record.metrics[metric] for record in records]
            first = float(np.mean(values[:quarter]))
            changes.append((float(np.mean(values[-quarter:])) - first) / abs(first) if first else 0.0)
        return np.array(changes)

    @cached_property
    def findings(self) -> list[Finding]:
        """What a careful reader should know before using the weights, from every registered kind of finding."""
        return [finding for find in registered_findings() for finding in find(self)]

    def table(self, rows: Mapping[str, int]) -> Table:
        """The weights as a table, heaviest first."""
        final = self.history[-1].upper
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("source")
        columns = ("rows", "weight", "95% interval") if self.of_rounds else ("rows", "weight", "average")
        for column in columns:
            table.add_column(column, justify="right")
        for name in self.ranked:
            if not self.of_rounds:
                shown = [f"{final[name]:.3f}", f"{self.average[name]:.3f}"]
            elif name in self.intervals:
                low, high = self.intervals[name]
                shown = [f"{self.average[name]:.3f}", f"{low:.3f} to {high:.3f}"]
            else:
                shown = [f"{self.average[name]:.3f}", "unknown"]
            table.add_row(name, f"{rows[name]:,}", *shown)
        return table

    def _with_floor(self, free: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weights that belong to what of them is above the floor."""
        floor = self.rounds[-1][-1].metrics["floor"]
        value: NDArray[np.float64] = floor + (1 - len(self.names) * floor) * free
        return value


@lru_cache(maxsize=8)
def _evidence(tried: bytes, signals: bytes, folds: int, prior: bytes, strength: float) -> Evidence:
    """The same object for the same rounds: intervals take many fits, and a run asks for them again and again."""
    q = np.frombuffer(prior)
    return Evidence(np.frombuffer(tried).reshape(-1, len(q)), np.frombuffer(signals).reshape(-1, len(q)), folds, q, strength)


FindingsOf: TypeAlias = Callable[[Trust], Sequence[Finding]]
"""A kind of finding: what it has to say about a run, which may be nothing."""


@cache
def registered_findings() -> list[FindingsOf]:
    """The kinds of findings that the installed plugins register, in the order of their registration."""
    return [part.load() for part in load_plugins().parts["findings"].values()]


def has_evidence(trust: Trust) -> bool:
    """Whether there are enough rounds to test anything."""
    return len(trust.rounds) >= ENOUGH
