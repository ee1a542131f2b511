"""A mixing law: a loss as a function of the mix trained on (Ye et al., "Data Mixing Laws", ICLR 2025, arXiv 2403.16952).

    log L(p) = c + Σ_i a_i p_i + b_i log(p_i + δ),    b ≤ 0

p are the weights of the sources. The paper's law is that with b = 0. A loss then falls or rises along every line, so that
the best mix is a single source whatever the data; the paper adds up the laws of several parts of the validation data, which
bends the sum only where the parts need different sources. The logarithms say what the loss of a text that needs several
sources does: it rises ever more steeply where one of them is missing, but for what is known without it, δ. With b ≤ 0 the
law is convex and has one minimum. The paper also adds a constant to the exponential, which a few runs do not determine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]

OFFSETS = (0.03, 0.1, 0.3)
"""Values of δ that are tried. Smaller ones bend the law in a corner that hardly a run has seen."""


@dataclass(frozen=True, eq=False)
class MixingLaw:
    """A law of these coefficients.

    constant: c. slopes: a, and curves: b. Shape: (sources,). offset: δ.
    """

    constant: float
    slopes: Array
    curves: Array
    offset: float

    @classmethod
    def fit(cls, mixes: Array, losses: Array, offset: float, ridge: float) -> MixingLaw:
        """Fit the logarithms of losses by least squares with b ≤ 0. Shapes: (runs, sources), (runs,).

        ridge: the penalty on the squared effect that a coefficient has over the runs, as a part of the squared error. It
            gives a law also where weights that sum to 1, or few runs, would leave it open.
        """
        sources, logs = mixes.shape[1], np.log(losses)
        features = np.hstack([mixes, np.log(mixes + offset)])
        center, spread = features.mean(0), np.maximum(features.std(0), 1e-12)
        penalty = np.sqrt(ridge * len(mixes)) * np.eye(2 * sources)
        system = np.vstack([(features - center) / spread, penalty])
        values = np.concatenate([logs - logs.mean(), np.zeros(2 * sources)])
        # what the slopes explain of the rest is taken out, so that only the curves, which are bounded, are left to be found
        basis = np.linalg.qr(system[:, :sources])[0]
        bent = system[:, sources:] - basis @ (basis.T @ system[:, sources:])
        curves = -nnls(-bent, values - basis @ (basis.T @ values))[0]
        slopes = np.linalg.lstsq(system[:, :sources], values - system[:, sources:] @ curves, rcond=None)[0]
        found = np.concatenate([slopes, curves]) / spread
        return cls(float(logs.mean() - center @ found), found[:sources], found[sources:], offset)

    def losses(self, mixes: Array) -> Array:
        """The predicted losses. Shape: (mixes, sources) -> (mixes,)."""
        predicted: Array = np.exp(self.constant + mixes @ self.slopes + np.log(mixes + self.offset) @ self.curves)
        return predicted

    def best(self, start: Array, least: Array, most: Array) -> Array:
        """The mix with the smallest predicted loss, with least <= p <= most. Shapes: (sources,).

        The law is convex, so projected gradient descent with backtracking finds its minimum from any start.
        """
        mix, step = project(start, least, most), 1.0
        value = float(np.log(self.losses(mix[None]))[0])
        for _ in range(5000):
            slope = self.slopes + self.curves / (mix + self.offset)
            while True:
                new = project(mix - step * slope, least, most)
                move = new - mix
                after = float(np.log(self.losses(new[None]))[0])
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

    measured, predicted: the loss of each run, and what the law of all other runs says of it. Shape: (runs,).
    """

    measured: Array
    predicted: Array

    @classmethod
    def leaving_one_out(cls, mixes: Array, losses: Array, offset: float, ridge: float) -> Fit:
        """Each run predicted by the law that is fitted to the others. Shapes: (runs, sources), (runs,)."""
        every = np.arange(len(mixes))
        laws = (MixingLaw.fit(mixes[every != run], losses[every != run], offset, ridge) for run in every)
        return cls(losses, np.array([law.losses(mix[None])[0] for law, mix in zip(laws, mixes, strict=True)]))

    @property
    def r2(self) -> float:
        """1 - (squared errors) / (squared deviations from the mean), of logarithms, which are what the law is fitted to.

        1 is perfect; noise gives less than 0.
        """
        measured, predicted = np.log(self.measured), np.log(self.predicted)
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


def fitted(mixes: Array, losses: Array, ridge: float) -> tuple[MixingLaw, Fit]:
    """The law with the δ that predicts runs best that it was not fitted to. Shapes: (runs, sources), (runs,)."""
    fits = {offset: Fit.leaving_one_out(mixes, losses, offset, ridge) for offset in OFFSETS}
    offset = max(fits, key=lambda offset: fits[offset].r2)
    return MixingLaw.fit(mixes, losses, offset, ridge), fits[offset]
