"""Whether learned weights can be trusted: said plainly, from the run's own records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bilevel.account import Finding
from bilevel.record import Record, average, moving
from bilevel.statistics import mean_and_error
from bilevel_llm.reweighting.resampling import (
    TargetRows,
    effective_rows,
    loss_error,
    rows_seen,
    share_reversed,
    steps_of_a_pass,
)

MOVING = 0.02  # a change of the mean weight from one quarter to the next that a reader would notice
OPEN_GAP = 0.02  # of the lower loss: y is then measurably worse on the training mix than the optimum is
CLEAR = 2.0  # standard errors: the usual two-sided 5%
REVERSED = 0.025  # of the resamples: the same 5%, on the one side where the order turns
FEW_ROWS = 100  # a mean over fewer is off by more than a tenth of the spread between rows
NEARLY_ALL = 0.9  # of the weight: what is left for the others together is as small as what one run differs from the next by


class Trust:
    """Reads the history of a reweighting run.

    target: the validation rows; None leaves out what is said about them.

    The signal of a source is penalty * (gap of that source - mean gap over sources): what pushes its weight down. Its
    standard error comes from means over blocks of steps, because neighbouring steps share blocks and moments.
    """

    def __init__(self, history: Sequence[Record], target: TargetRows | None = None) -> None:
        self.history = history
        self.target = target
        self.names = list(history[0].upper)
        self.moving = moving(history)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """Weights of the steps in which they could move. Shape: (steps, sources)."""
        rows = [[record.upper[name] for name in self.names] for record in self.moving]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.names))

    @cached_property
    def average(self) -> dict[str, float]:
        """The weights that the run comes to; see `bilevel.record.average`."""
        return average(self.history)

    @cached_property
    def signal(self) -> dict[str, tuple[float, float]]:
        """Source -> (mean, standard error) of what pushes its weight UP, over the steps in which weights could move."""
        return {name: mean_and_error(self._pushes[:, i]) for i, name in enumerate(self.names)}

    @cached_property
    def findings(self) -> list[Finding]:
        """What a careful reader should know before using the weights."""
        if not all(record.parts.get("gap_parts") for record in self.moving):
            words = (
                "from a solver without a penalty gap for each source, so nothing tells how noisy the weights are; repeat "
                "with other seeds"
            )
            return [Finding("no-signal", True, words)]
        if len(self.moving) < 8:
            held = len(self.history) - len(self.moving)
            words = f"too short to judge: {len(self.moving)} steps moved the weights ({held} were warm-up); run more steps"
            return [Finding("too-short", True, words)]
        if len(self.names) == 1:  # it has all the weight, always
            return [self._gap()]
        return [self._still_moving(), self._gap(), self._order(), *self._dominated(), *self._rows()]

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

    @cached_property
    def _pushes(self) -> NDArray[np.float64]:
        """What pushed each weight up at each step, over what pushed them all. Shape: (steps, sources)."""
        rows = [
            [-r.metrics["penalty"] * r.parts["gap_parts"][name] for name in self.names]
            for r in self.moving
            if r.parts.get("gap_parts")
        ]
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(self.names))
        return values - values.mean(1, keepdims=True) if len(values) else values

    @cached_property
    def _neighbours(self) -> list[tuple[str, str, bool]]:
        """Neighbours in the ranking, and whether their signals differ by more than the noise of this run."""
        ranked = sorted(self.names, key=lambda name: -self.average[name])
        pairs = []
        for upper, lower in pairwise(ranked):
            (a, error_a), (b, error_b) = self.signal[upper], self.signal[lower]
            pairs.append((upper, lower, bool(a - b > CLEAR * np.hypot(error_a, error_b))))
        return pairs

    def _still_moving(self) -> Finding:
        quarter = len(self.weights) // 4
        change = self.weights[-quarter:].mean(0) - self.weights[-2 * quarter : -quarter].mean(0)
        most = int(np.abs(change).argmax())
        if abs(change[most]) > MOVING:
            words = (
                f"still moving: the weight of {self.names[most]!r} changed by {change[most]:+.3f} over the last quarter; "
                "more steps would move it further"
            )
            return Finding("still-moving", True, words)
        words = f"settled: no weight changed by more than {max(abs(change[most]), 0.001):.3f} over the last quarter"
        return Finding("still-moving", False, words)

    def _gap(self) -> Finding:
        last = self.moving[-max(1, len(self.moving) // 4) :]
        gap = float(np.mean([record.metrics["gap"] for record in last]))
        share = gap / float(np.mean([record.metrics["lower_loss"] for record in last]))
        if share > OPEN_GAP:
            words = (
                f"penalty gap open: y is {share:.1%} above z in lower loss, so the weights serve a compromise; "
                "raise solver.penalty"
            )
            return Finding("gap-open", True, words)
        if share < -OPEN_GAP:
            words = (
                f"z is behind y, by {-share:.1%} in lower loss, so the lower level is far from its optimum; "
                "use a longer solver.warmup, more steps or a larger solver.lr_z"
            )
            return Finding("gap-open", True, words)
        return Finding("gap-open", False, f"penalty gap closed: y is {share:+.2%} from z in lower loss")

    def _order(self) -> Finding:
        """Whether neighbours in the ranking are told apart by their signals."""
        unclear = [f"{upper} and {lower}" for upper, lower, clear in self._neighbours if not clear]
        if unclear:
            return Finding("order-unclear", True, f"within the noise, do not read an order into: {'; '.join(unclear)}")
        return Finding("order-unclear", False, "every neighbouring pair in the ranking differs by more than the noise")

    def _dominated(self) -> list[Finding]:
        """Whether the mix is in truth a single source."""
        final = self.history[-1].upper
        most = max(final, key=lambda name: final[name])
        if final[most] < NEARLY_ALL:
            return []
        words = (
            f"one source has nearly all the weight: {most!r} has {final[most]:.1%}; see that its rows are not those of the "
            "validation set, and keep the others in the mix by problem.floor or problem.prior_strength"
        )
        return [Finding("one-source", True, words)]

    def _rows(self) -> list[Finding]:
        """Whether there are enough validation rows."""
        if self.target is None:
            return []
        rows = effective_rows(self.moving, self.target)
        if rows >= FEW_ROWS:
            return [self._enough()]
        words = (
            f"few validation rows: {rows:.0f} effective ones, and the weights serve these more than their kind; at least "
            f"{FEW_ROWS} are safer; {self._more_rows()}"
        )
        return [Finding("few-rows", True, words), self._enough()]

    def _more_rows(self) -> str:
        assert self.target is not None
        seen = rows_seen(self.moving, self.target)
        if seen < self.target.total:
            return f"run more steps, as only {seen} of {self.target.total} rows were seen"
        return "add validation rows"

    def _enough(self) -> Finding:
        """Whether the order holds when the validation rows are resampled; see `target_rows`."""
        assert self.target is not None
        rows = rows_seen(self.moving, self.target)
        loss = f"its loss is known to ±{1.96 * loss_error(self.moving, self.target):.3f}"
        clear = [(upper, lower) for upper, lower, clear in self._neighbours if clear]
        if not clear:
            words = f"target set not tested: no two neighbours are told apart, so nothing hangs on its rows yet; {loss}"
            return Finding("target-small", False, words)
        column = {name: self._pushes[:, i] for i, name in enumerate(self.names)}
        fragile = []
        for upper, lower in clear:
            share = share_reversed(column[upper] - column[lower], self.moving, self.target)
            if share is None:
                again = steps_of_a_pass(self.moving, self.target)
                words = (
                    f"target set too small to test: its {rows} rows come round every {again:.1f} steps, so how far "
                    f"the weights hang on them cannot be told; {loss}; add rows, or lower problem.validation_batch_size"
                )
                return Finding("target-small", True, words)
            if share > REVERSED:
                fragile.append(f"{lower} comes out above {upper} in {share:.0%} of the resamples")
        if fragile:
            turned = "; ".join(fragile)
            words = f"target set too small: with {rows} other rows of its kind, {turned}; {loss}; {self._more_rows()}"
            return Finding("target-small", True, words)
        words = f"target set passes: the order holds when its {rows} rows are resampled; {loss}"
        return Finding("target-small", False, words)
