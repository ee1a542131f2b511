"""What can be read from the records of a reweighting run, and the findings about whether to trust its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bilevel.account import Finding
from bilevel.plugins import load_plugins
from bilevel.record import Record, average, moving
from bilevel.statistics import mean_and_error
from bilevel_llm.reweighting.resampling import TargetRows

CLEAR = 2.0  # standard errors: the usual two-sided 5%
ENOUGH_STEPS = 8  # with fewer, there is no standard error


class Trust:
    """Reads the history of a reweighting run.

    target: the validation rows; None if they are not known.

    The signal of a source is penalty * (gap of that source - mean gap over sources): what pushes its weight down. Its
    standard error comes from means over blocks of steps, because neighboring steps share blocks and moments.
    """

    def __init__(self, history: Sequence[Record], target: TargetRows | None = None) -> None:
        self.history = history
        self.target = target
        self.names = list(history[0].upper)
        self.moving = moving(history)

    @property
    def has_one_source(self) -> bool:
        """Whether there is only one source, which always has all the weight."""
        return len(self.names) == 1

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """The weights after each step that could move them. Shape: (steps, sources)."""
        rows = [[record.upper[name] for name in self.names] for record in self.moving]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.names))

    @cached_property
    def average(self) -> dict[str, float]:
        """The weights that the run comes to; see `bilevel.record.average`."""
        return average(self.history)

    @cached_property
    def signal(self) -> dict[str, tuple[float, float]]:
        """Source -> (mean, standard error) of what pushes its weight UP, over the steps that could move weights."""
        return {name: mean_and_error(self.pushes[:, i]) for i, name in enumerate(self.names)}

    @cached_property
    def pushes(self) -> NDArray[np.float64]:
        """What pushed each weight up at each step, minus the mean over all weights. Shape: (steps, sources)."""
        rows = [
            [-r.metrics["penalty"] * r.parts["gap_parts"][name] for name in self.names]
            for r in self.moving
            if r.parts.get("gap_parts")
        ]
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(self.names))
        return values - values.mean(1, keepdims=True) if len(values) else values

    @cached_property
    def neighbors(self) -> list[tuple[str, str, bool]]:
        """Neighbors in the ranking, and whether their signals differ by more than the noise of this run."""
        ranked = sorted(self.names, key=lambda name: -self.average[name])
        pairs = []
        for upper, lower in pairwise(ranked):
            (a, error_a), (b, error_b) = self.signal[upper], self.signal[lower]
            pairs.append((upper, lower, bool(a - b > CLEAR * np.hypot(error_a, error_b))))
        return pairs

    @cached_property
    def findings(self) -> list[Finding]:
        """What a careful reader should know before using the weights, from every registered kind of finding."""
        if not all(record.parts.get("gap_parts") for record in self.moving):
            words = (
                "from a solver without a penalty gap for each source, so nothing tells how noisy the weights are; repeat "
                "with other seeds"
            )
            return [Finding("no-signal", True, words)]
        if len(self.moving) < ENOUGH_STEPS:
            held = len(self.history) - len(self.moving)
            words = f"too short to judge: {len(self.moving)} steps moved the weights ({held} were warm-up); run more steps"
            return [Finding("too-short", True, words)]
        return [finding for find in registered_findings() for finding in find(self)]

    def table(self, rows: Mapping[str, int]) -> Table:
        """The weights as a table, heaviest first."""
        final = self.history[-1].upper
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("source")
        for column in ("rows", "weight", "average", "signal ± s.e."):
            table.add_column(column, justify="right")
        for name in sorted(self.names, key=lambda name: -final[name]):
            mean, error = self.signal[name]
            signal = "" if np.isnan(error) else f"{mean:+.3f} ± {error:.3f}"
            table.add_row(name, f"{rows[name]:,}", f"{final[name]:.3f}", f"{self.average[name]:.3f}", signal)
        return table


FindingsOf: TypeAlias = Callable[[Trust], Sequence[Finding]]
"""A kind of finding: what it has to say about a run, which may be nothing."""


@cache
def registered_findings() -> list[FindingsOf]:
    """The kinds of findings that the installed plugins register, in the order of their registration."""
    return [part.load() for part in load_plugins().parts["findings"].values()]
