"""Whether there are enough validation rows: how far the order of sources, and the validation loss, depend on the rows drawn.

Per-row gradients would tell, at the price of one backward pass per row. What a run records anyway tells nearly as well: a
minibatch of validation rows is drawn without replacement, so stretches of steps see different rows, and how much the push
on the weights differs between stretches shows how much it depends on the rows. y keeps what it learned from earlier
minibatches, so the push of a stretch is that of the one before, faded, plus what the new rows gave; only the latter is
resampled (an autoregression whose residuals are resampled: Bühlmann, "Sieve bootstrap for time series", Bernoulli 1997).
As many stretches are drawn as the set is worth, which is fewer than there are where the run went through the set several
times (m out of n: Bickel, Götze and van Zwet, Statistica Sinica 1997). Noise of the training minibatches is in the
residuals too.

The test is lenient: a flag can be believed, its absence is no proof. On simulated pushes of known rows (60 sets each; 45 to
1000 steps, memories from none to 50 steps; test_resampling.py), an order that six standard errors hold
passes in at least 88% of the runs, and one that nothing holds in up to 20%, where 2.5% would be right; without the
autoregression in up to 37%.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bilevel.record import Record
from bilevel.statistics import BATCHES, batch_means

DRAWS = 4000  # resamples: shares of a few percent are then known to a few tenths of a percent


@dataclass(frozen=True)
class TargetRows:
    """What the upper loss is measured on, by validation set.

    rows: the number of rows in the set.
    batch: the number of its rows in one minibatch.
    part: its share of the upper loss; the shares of all sets sum to 1.
    """

    rows: Mapping[str, int]
    batch: Mapping[str, float]
    part: Mapping[str, float]

    @property
    def total(self) -> int:
        """The number of rows in all sets together."""
        return sum(self.rows.values())

    def effective(self, rows: Mapping[str, float]) -> float:
        """The rows of a single set whose mean would be as certain: 1 / Σ (part² / rows) (Kish, "Survey Sampling", 1965)."""
        return 1.0 / sum(self.part[name] ** 2 / rows[name] for name in self.rows)

    def seen(self, batches: float) -> dict[str, float]:
        """The number of distinct rows of every set within that many minibatches."""
        return {name: min(float(rows), batches * self.batch[name]) for name, rows in self.rows.items()}

    def worth(self, batches: float) -> float:
        """How many minibatches of fresh rows the sets are worth, when `batches` minibatches were drawn from them."""
        return self.effective(self.seen(batches)) / self.effective(self.batch)

    def shortest_pass(self) -> float:
        """The number of minibatches after which the first of the sets has been seen in full."""
        return min(self.rows[name] / self.batch[name] for name in self.rows)


def batches_of(record: Record) -> float:
    """The number of minibatches of validation rows in a step."""
    return float(record.metrics.get("upper_batches", 1))


def rows_seen(history: Sequence[Record], target: TargetRows) -> int:
    """The number of distinct rows of all sets that the run has seen while weights moved."""
    return round(sum(target.seen(sum(map(batches_of, history))).values()))


def effective_rows(history: Sequence[Record], target: TargetRows) -> float:
    """The same as `rows_seen`, in rows of a single set whose mean would be as certain."""
    return target.effective(target.seen(sum(map(batches_of, history))))


def loss_error(history: Sequence[Record], target: TargetRows) -> float:
    """The standard error of the validation loss, as an estimate of the loss on all rows that these are a sample of.

    The spread between rows comes from differences of successive minibatches, which a falling loss hardly touches (von
    Neumann et al., Annals of Mathematical Statistics 1941): of m rows each, drawn without replacement, half their mean
    square is variance / m.
    """
    batches = sum(map(batches_of, history))
    variance = 0.0
    for name, seen in target.seen(batches).items():
        losses = np.array([record.parts["upper_parts"][name] for record in history], dtype=np.float64)
        rows = target.batch[name] * batches / len(history)
        variance += target.part[name] ** 2 * rows * float((np.diff(losses) ** 2).mean()) / 2 / seen
    return float(np.sqrt(variance))


def share_reversed(difference: NDArray[np.float64], history: Sequence[Record], target: TargetRows) -> float | None:
    """The share of the resamples of the validation rows in which the second of two sources is pushed up more than the first.

    difference: the push on the first minus the push on the second, at every step of `history`. Shape: (steps,).
    Returns None if the rows come round too soon to tell: two neighboring stretches must not see the same ones.
    """
    steps = len(difference)
    length = min(steps // BATCHES, int(steps_of_a_pass(history, target) / 2))
    if length < 1:
        return None
    means = np.concatenate([[0.0], batch_means(difference, steps // length)])  # y starts where z is: nothing pushes yet
    news = means[1:] - _memory(means) * means[:-1]
    worth = target.worth(sum(map(batches_of, history))) / sum(map(batches_of, history)) * len(news)
    draws = max(
        1, round(min(worth, len(news))) - 1
    )  # one less: drawn without replacement, stretches differ by less than rows do
    resampled = news[np.random.default_rng(0).integers(len(news), size=(DRAWS, draws))].mean(1)
    return float((resampled <= 0).mean())


def steps_of_a_pass(history: Sequence[Record], target: TargetRows) -> float:
    """The number of steps after which the first of the sets has been seen in full."""
    return target.shortest_pass() * len(history) / sum(map(batches_of, history))


def _memory(series: NDArray[np.float64]) -> float:
    """Coefficient of an autoregression of order one, in [0, 1].

    By least squares, with half of the bias of short stationary series taken off, which is -(1 + 3 c)/n (Kendall, Biometrika
    1954). Half, because this series begins at 0: its rise, where it shows, tells the coefficient better than noise does.
    """
    before, after = series[:-1] - series[:-1].mean(), series[1:] - series[1:].mean()
    square = float(before @ before)
    c = float(before @ after) / square if square else 0.0
    return min(max(c + 0.5 * (1 + 3 * c) / len(before), 0.0), 1.0)
