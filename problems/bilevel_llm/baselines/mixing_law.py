"""Mixing laws: Ye et al., "Data Mixing Laws" (ICLR 2025, arXiv 2403.16952): a loss as a function of the mix trained on.

    L(p) = Σ_d s_d L_d(p),    log L_d(p) = c_d + Σ_i b_di p_i

d are parts of the validation data, s_d their shares of the loss, p the weights of the sources. The law of a single part
falls or rises along every line, so that its best mix is a single source. A sum of laws is convex, and weighs what the parts
need: its best mix may lie between the sources. The paper's parts may be given or implicit; here they are the validation
sets, or their single rows. The paper's law has a constant that is added to the exponential, which a few runs do not
determine. Without it, the logarithm of a loss is linear in p and is fitted by ridge regression, which has one solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST = 1e-4  # nats; smaller losses count as this: they no longer matter to a mean, and their logarithms would


@dataclass(frozen=True, eq=False)
class MixingLaw:
    """The laws of all parts, and the mean loss that follows from them.

    constants: c. Shape: (parts,).
    slopes: b. Shape: (parts, sources).
    shares: s, summing to 1. Shape: (parts,).
    """

    constants: Array
    slopes: Array
    shares: Array

    @classmethod
    def fit(cls, mixes: Array, losses: Array, shares: Array, ridge: float) -> MixingLaw:
        """Fit the logarithms of losses. Shapes: (runs, sources), (runs, parts), (parts,).

        ridge: the penalty on squared slopes, as a part of the mean squared spread of the weights over the runs.
        """
        center, solve = _ridge(mixes, ridge)
        logs = _logs(losses)
        slopes = (solve @ (logs - logs.mean(0))).T
        return cls(logs.mean(0) - slopes @ center, slopes, shares)

    def losses(self, mixes: Array) -> Array:
        """The predicted mean losses. Shape: (mixes, sources) -> (mixes,)."""
        predicted: Array = np.exp(self.constants + mixes @ self.slopes.T) @ self.shares
        return predicted

    def gradient(self, mix: Array) -> Array:
        """The derivative of the mean loss in the weights. Shape: (sources,) -> (sources,)."""
        slope: Array = (self.shares * np.exp(self.constants + self.slopes @ mix)) @ self.slopes
        return slope

    def best(self, start: Array, least: Array, most: Array) -> Array:
        """The mix with the smallest predicted loss, with least <= p <= most. Shapes: (sources,).

        The predicted loss is convex, so projected gradient descent with backtracking finds its minimum from any start.
        """
        mix, step = project(start, least, most), 1.0
        value = float(self.losses(mix[None])[0])
        for _ in range(5000):
            slope = self.gradient(mix)
            while True:
                new = project(mix - step * slope, least, most)
                move = new - mix
                after = float(self.losses(new[None])[0])
                if after <= value + float(slope @ move) + float(move @ move) / (2 * step) or step < 1e-12:
                    break
                step /= 2
            mix, value, step = new, after, 2 * step
            if np.abs(move).max() < 1e-10:
                break
        return mix


@dataclass(frozen=True, eq=False)
class Fit:
    """How well a law predicts runs that it was not fitted to.

    measured, predicted: the mean loss of each run, and what the law of all other runs says of it. Shape: (runs,).
    """

    measured: Array
    predicted: Array

    @classmethod
    def leaving_one_out(cls, mixes: Array, losses: Array, shares: Array, ridge: float) -> Fit:
        """Each run predicted by the law of the others; exact, from one fit (the residuals over 1 - leverage).

        The others keep the penalty of all runs.
        """
        center, solve = _ridge(mixes, ridge)
        logs = _logs(losses)
        hat = 1 / len(mixes) + (mixes - center) @ solve
        residuals = logs - hat @ logs
        left_out = logs - residuals / (1 - np.diag(hat))[:, None]
        return cls(losses @ shares, np.exp(left_out) @ shares)

    @property
    def r2(self) -> float:
        """1 - (squared errors) / (squared deviations from the mean), of logarithms, which are what the law is fitted to.

        1 is perfect; noise gives less than 0.
        """
        measured, predicted = _logs(self.measured), _logs(self.predicted)
        spread = float(((measured - measured.mean()) ** 2).sum())
        errors = float(((measured - predicted) ** 2).sum())
        return 1 - errors / spread if spread else float("-inf")

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of predicted and measured losses; 0 if one of them is constant."""
        ranks = [np.unique(values, return_inverse=True)[1].astype(np.float64) for values in (self.measured, self.predicted)]
        if any(np.ptp(rank) == 0 for rank in ranks):
            return 0.0
        return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def project(point: Array, least: Array, most: Array) -> Array:
    """The nearest point with least <= p <= most and sum 1, which must exist. Shapes: (sources,)."""
    low, high = float((point - most).min()), float((point - least).max())
    for _ in range(100):  # the sum falls as the shift grows; each round halves the range of the shift
        shift = (low + high) / 2
        low, high = (shift, high) if np.clip(point - shift, least, most).sum() > 1 else (low, shift)
    projected: Array = np.clip(point - (low + high) / 2, least, most)
    return projected


def _ridge(mixes: Array, ridge: float) -> tuple[Array, Array]:
    """The mean mix, and what gives slopes when multiplied by centered values. Shapes: (sources,), (sources, runs)."""
    center = mixes.mean(0)
    spread = mixes - center
    square = spread.T @ spread
    # weights sum to 1, so one direction has no spread, where only the penalty (or the pseudo-inverse) says that slopes are 0
    penalized = square + ridge * np.trace(square) / len(square) * np.eye(len(square))
    return center, np.linalg.pinv(penalized, rcond=1e-10, hermitian=True) @ spread.T


def _logs(losses: Array) -> Array:
    logs: Array = np.log(np.maximum(losses, SMALLEST))
    return logs
