"""Whether learned weights can be trusted: said plainly, from the run's own records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bilevel.problem import Record

MOVING = 0.02  # a change of the mean weight from one quarter to the next that a reader would notice
OPEN_GAP = 0.02  # of the lower loss: y is then measurably worse on the training mix than the optimum is
CLEAR = 2.0  # standard errors: the usual two-sided 5%


class Trust:
    """Reads the history of a reweighting run.

    The signal of a source is penalty * (gap of that source - mean gap over sources): what pushes its weight down. Its
    standard error comes from means over blocks of steps, because neighbouring steps share blocks and moments.
    """

    def __init__(self, history: Sequence[Record]) -> None:
        self.history = history
        self.names = list(history[0]["upper"])
        self.moving = [record for record in history if "gap" in record]

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """Weights of the steps in which they could move. Shape: (steps, sources)."""
        rows = [[record["upper"][name] for name in self.names] for record in self.moving]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.names))

    @cached_property
    def average(self) -> dict[str, float]:
        """Mean weights over the second half of those steps: less noisy than the last ones. Or the solver's own average."""
        if "average" in self.history[-1]:
            return dict(self.history[-1]["average"])
        half = self.weights[len(self.weights) // 2 :]
        final = np.array([self.history[-1]["upper"][name] for name in self.names])
        return dict(zip(self.names, (half.mean(0) if len(half) else final).tolist(), strict=True))

    @cached_property
    def signal(self) -> dict[str, tuple[float, float]]:
        """Source -> (mean, standard error) of what pushes its weight UP, over the steps in which weights could move."""
        rows = [[-r["penalty"] * r["gap_parts"][name] for name in self.names] for r in self.moving]
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(self.names))
        values = values - values.mean(1, keepdims=True) if len(values) else values
        return {name: _mean_and_error(values[:, i]) for i, name in enumerate(self.names)}

    def verdicts(self) -> list[str]:
        """What a careful reader should know before using the weights, one sentence each."""
        if "average" in self.history[-1]:
            return [
                "from a solver without a penalty gap: the weights come with no sign of their noise; repeat with other seeds"
            ]
        if len(self.moving) < 8:
            held = len(self.history) - len(self.moving)
            return [f"too short to judge: {len(self.moving)} steps moved the weights ({held} were warm-up); run more steps"]
        return [self._still_moving(), self._gap(), self._order()]

    def table(self, rows: Mapping[str, int]) -> Group:
        """The weights as a table, heaviest first, and the verdicts below."""
        final = self.history[-1]["upper"]
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("source")
        for column in ("rows", "weight", "average", "signal ± s.e."):
            table.add_column(column, justify="right")
        for name in sorted(self.names, key=lambda name: -final[name]):
            mean, error = self.signal[name]
            signal = "" if np.isnan(error) else f"{mean:+.3f} ± {error:.3f}"
            table.add_row(name, f"{rows[name]:,}", f"{final[name]:.3f}", f"{self.average[name]:.3f}", signal)
        return Group(table, *(Text(f"- {verdict}") for verdict in self.verdicts()))

    def _still_moving(self) -> str:
        quarter = len(self.weights) // 4
        change = self.weights[-quarter:].mean(0) - self.weights[-2 * quarter : -quarter].mean(0)
        most = int(np.abs(change).argmax())
        if abs(change[most]) > MOVING:
            return (
                f"still moving: the weight of {self.names[most]!r} changed by {change[most]:+.3f} over the last quarter; "
                "more steps would move it further"
            )
        return f"settled: no weight changed by more than {max(abs(change[most]), 0.001):.3f} over the last quarter"

    def _gap(self) -> str:
        last = self.moving[-max(1, len(self.moving) // 4) :]
        gap = float(np.mean([record["gap"] for record in last]))
        share = gap / float(np.mean([record["lower_loss"] for record in last]))
        if share > OPEN_GAP:
            return (
                f"penalty gap open: y is {share:.1%} above z in lower loss, so the weights serve a compromise; "
                "raise solver.penalty"
            )
        if share < -OPEN_GAP:
            return (
                f"z is behind y, by {-share:.1%} in lower loss, so the lower level is far from its optimum; "
                "use a longer solver.warmup, more steps or a larger solver.lr_z"
            )
        return f"penalty gap closed: y is {share:+.2%} from z in lower loss"

    def _order(self) -> str:
        """Whether neighbours in the ranking are told apart by their signals."""
        ranked = sorted(self.names, key=lambda name: -self.average[name])
        unclear = []
        for upper, lower in pairwise(ranked):
            (a, error_a), (b, error_b) = self.signal[upper], self.signal[lower]
            if a - b <= CLEAR * np.hypot(error_a, error_b):
                unclear.append(f"{upper} and {lower}")
        if unclear:
            return f"within the noise, do not read an order into: {'; '.join(unclear)}"
        return "every neighbouring pair in the ranking differs by more than the noise"


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error from eight block means. NaN error for fewer than eight values."""
    if len(values) < 8:
        return (float(values.mean()) if len(values) else 0.0), float("nan")
    means = np.array([block.mean() for block in np.array_split(values, 8)])
    return float(values.mean()), float(means.std(ddof=1) / np.sqrt(8))
