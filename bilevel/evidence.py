"""What rounds of signals say about a distribution: the best one, how far off it may be, and whose order is beyond doubt.

The rows of the data are dealt into folds, and a round sees the rows of one fold. What differs between folds is therefore the
noise of the draws and of the rows together: an interval speaks of the best weights for data of this kind, not of these rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bilevel.response import Array, ResponseSurface, pull_of
from bilevel.statistics import t_quantile

ENOUGH = 5  # rounds: with fewer, the curvature and the noise cannot both be told
MODEL_ERROR = 0.01  # of a weight, one standard deviation: how far the zero of the signals is from the optimum (`make study`)
LEAST = 0.01  # of the signals, a pull that keeps a log-odds finite
LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Evidence:
    """The rounds of a run.

    tried: the distribution that was held in each round. Shape: (n, k).
    signals: what each round observed, up to a constant. Shape: (n, k).
    folds: how many folds the data were dealt into; round r saw fold r mod folds.
    prior: the distribution that the answer is drawn to. Shape: (k,).
    strength: how strongly; see `bilevel.response.pull_of`.
    """

    tried: Array
    signals: Array
    folds: int
    prior: Array
    strength: float

    @property
    def enough(self) -> bool:
        """Whether there are enough rounds for standard errors."""
        return min(self.folds, len(self.tried)) >= ENOUGH

    @cached_property
    def ordered(self) -> bool:
        """Whether there is an order beyond doubt: of the largest entry and the smallest one, or of any two neighbors.

        The largest and the smallest are chosen among all pairs, for which Bonferroni's level is.
        """
        ranked = [int(i) for i in np.argsort(-self.answer)]
        pairs = len(ranked) * (len(ranked) - 1) // 2
        ends = self._beyond_doubt(ranked[0], ranked[-1], pairs + len(ranked))
        return ends or any(self.clear(i, j) for i, j in pairwise(ranked))

    @cached_property
    def surface(self) -> ResponseSurface:
        """The model of all rounds."""
        return ResponseSurface.fit(self.tried, self.signals)

    @cached_property
    def pull(self) -> float:
        """The pull to the prior, in the unit of the signals."""
        return pull_of(self.signals, self.surface.noise, self.strength)

    @cached_property
    def log_answer(self) -> Array:
        """The log of the best distribution. Shape: (k,)."""
        return self.surface.minimizer(self.prior, self.pull)

    @cached_property
    def answer(self) -> Array:
        """The best distribution. Shape: (k,)."""
        return np.exp(self.log_answer)

    @cached_property
    def groups(self) -> list[NDArray[np.bool_]]:
        """For each fold, a mask of its rounds."""
        numbers = np.arange(len(self.tried)) % self.folds
        return [numbers == fold for fold in range(min(self.folds, len(self.tried)))]

    @cached_property
    def intervals(self) -> tuple[Array, Array]:
        """The ends of the 95% interval of every entry. Shapes: (k,), (k,).

        They are around the answer as it would be without the part of the pull that noise adds, which would hide how far off
        it may be, and reach as far as the answer. The standard error is that of the delete-one-fold jackknife for folds of
        unequal size (Busing, Meijer and van der Leeden, Statistics and Computing 1999), on the scale of log-odds and on that
        of weights, of which the wider one is taken: the first is right for small weights, the second for those that vanish.
        To it comes the error of the model itself, `MODEL_ERROR`.

        NaN if there are too few rounds, or if not even the largest and the smallest entry are told apart: the curvature is
        then unknown, and a standard error with it.
        """
        if not self.ordered:
            unknown = np.full_like(self.answer, np.nan)
            return unknown, unknown
        pull = pull_of(self.signals, 0.0, max(self.strength, LEAST))
        centre = self.surface.minimizer(self.prior, pull)
        full = _log_odds(centre)
        left_out = np.array([_log_odds(self._without(group, pull)) for group in self.groups])
        t = t_quantile(len(self.groups) - 1)
        half = t * _jackknife_error(full, left_out, self._ratios)
        low, high = _odds_to_share(full - half), _odds_to_share(full + half)
        half = t * _jackknife_error(np.exp(centre), _odds_to_share(left_out), self._ratios)
        low, high = np.minimum(low, np.exp(centre) - half), np.maximum(high, np.exp(centre) + half)
        model = 2 * MODEL_ERROR
        q = np.exp(centre)
        low, high = q - np.hypot(q - low, model), q + np.hypot(high - q, model)
        return np.minimum(low, self.answer).clip(0.0), np.maximum(high, self.answer).clip(None, 1.0)

    def t_value(self, i: int, j: int) -> float:
        """How clearly i deserves more weight than j: an estimate by its standard error, the clearer one of two.

        What is estimated is the difference of their signals where they have equal weights: if Φ is convex, its sign is that
        of the difference of their best weights. `_intercept` needs rounds in which the two weights differ more and less;
        `_bound` finds an entry that deserves nothing, and of which all rounds soon say the same.
        """
        return max(self._intercept(i, j), self._bound(i, j))

    def _intercept(self, i: int, j: int) -> float:
        """By a regression of the difference of the signals on that of the weights.

        The standard error is the larger one of the usual and that which is robust to folds.
        """
        difference = self.signals[:, i] - self.signals[:, j]
        apart = self.tried[:, j] - self.tried[:, i]
        n = len(difference)
        means = np.array([difference[group].mean() for group in self.groups])
        if apart.std() > 1e-9:
            design = np.stack([np.ones(n), apart], axis=1)
            estimate = np.linalg.lstsq(design, difference, rcond=None)[0]
            if estimate[1] > 0:  # else Φ would be concave: noise
                residual = difference - design @ estimate
                inverse = np.linalg.inv(design.T @ design)
                by_fold = [design[group].T @ residual[group] for group in self.groups]
                folds = len(by_fold)
                middle = sum(np.outer(v, v) for v in by_fold) * folds / (folds - 1) * (n - 1) / (n - 2)
                usual = inverse[0, 0] * residual @ residual / (n - 2)
                return _ratio(estimate[0], max((inverse @ middle @ inverse)[0, 0], usual))
        return _ratio(means.mean(), means.var(ddof=1) / len(means))

    def _bound(self, i: int, j: int) -> float:
        """By the mean over the rounds in which i had at least the weight of j; -inf if a fold has none.

        If Φ is convex, the difference of the signals there is at most what it is at equal weights.
        """
        heavier = self.tried[:, i] >= self.tried[:, j]
        difference = self.signals[:, i] - self.signals[:, j]
        groups = [group & heavier for group in self.groups]
        if not all(group.any() for group in groups):
            return -np.inf
        means = np.array([difference[group].mean() for group in groups])
        return _ratio(means.mean(), means.var(ddof=1) / len(means))

    def clear(self, i: int, j: int) -> bool:
        """Whether it is beyond doubt that i deserves more weight than j, its neighbor in the ranking.

        Runs without any true order claim one in about 5%: Bonferroni's level over the neighbors, and one more for having
        chosen them by the same data, and one for the choice between two estimates.
        """
        return self._beyond_doubt(i, j, len(self.prior) + 1)

    def _beyond_doubt(self, i: int, j: int, comparisons: int) -> bool:
        freedom = min(len(self.groups) - 1, len(self.tried) - 2)  # of the mean of folds, and of the regression's residuals
        return self.enough and self.t_value(i, j) > t_quantile(freedom, LEVEL / comparisons)

    @cached_property
    def _ratios(self) -> Array:
        """For each fold, the number of all rounds by that of its own."""
        return np.array([len(self.tried) / group.sum() for group in self.groups])

    def _without(self, group: NDArray[np.bool_], pull: float) -> Array:
        return ResponseSurface.fit(self.tried[~group], self.signals[~group]).minimizer(self.prior, pull)


def _jackknife_error(full: Array, left_out: Array, ratios: Array) -> Array:
    """Shapes: (k,), (folds, k), (folds,) -> (k,)."""
    h = ratios[:, None]
    pseudo = h * full - (h - 1) * left_out
    centre = len(h) * full - ((1 - 1 / h) * left_out).sum(0)
    error: Array = np.sqrt(((pseudo - centre) ** 2 / (h - 1)).mean(0))
    return error


def _log_odds(log_share: Array) -> Array:
    value: Array = log_share - np.log1p(-np.exp(np.minimum(log_share, -1e-12)))
    return value


def _odds_to_share(log_odds: Array) -> Array:
    value: Array = 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))
    return value


def _ratio(value: float, variance: float) -> float:
    return float(value / np.sqrt(variance)) if variance > 0 else float(np.inf * np.sign(value)) if value else 0.0
