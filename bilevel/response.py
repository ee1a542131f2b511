"""A quadratic model of a function of a distribution, fitted to noisy gradients: where it is smallest, and how sure that is.

    Φ(q) ≈ const - s̄'(q - q̄) + ½ (q - q̄)'C(q - q̄),    q on the simplex, C symmetric and positive semidefinite

What is observed are signals s = -∇Φ(q) at several q, each with noise of its own, and up to a constant: on the simplex only
differences of a gradient's entries count. (A response surface: Box and Wilson, J. Royal Statistical Society B 1951; here
gradients are observed where they observed values.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LARGEST = 64  # entries with a curvature of their own; beyond, k²/2 of them are too many to fit, and all share one
FLATTEST = 0.05  # of the mean curvature: what noise has bent downwards is flat, not a maximum


@dataclass(frozen=True)
class ResponseSurface:
    """The model above, for k things.

    centre: q̄, the mean of the distributions where the signal was observed. Shape: (k,).
    slope: s̄, the mean signal, with mean 0. Shape: (k,).
    curvature: C; its rows sum to 0. Shape: (k, k).
    noise: the standard deviation of an entry of a signal around the model.
    count: the number of observations.
    """

    centre: Array
    slope: Array
    curvature: Array
    noise: float
    count: int

    @classmethod
    def fit(cls, tried: Array, signals: Array) -> ResponseSurface:
        """Fit the model by least squares.

        tried: where the signals were observed. Shape: (n, k).
        signals: what was observed. Shape: (n, k).

        The curvature is pulled to a multiple of the identity, the one that fits best, as strongly as the noise demands: a
        few observations along a line say nothing about the curvature across it (a ridge prior whose weight is the ratio
        of the variances of noise and curvature, found in three rounds).
        """
        n, k = tried.shape
        basis = _simplex_basis(k)
        centre, mean = tried.mean(0), signals.mean(0)
        moves, changes = (tried - centre) @ basis, (signals - mean) @ basis  # shapes (n, k - 1)
        square = float((moves**2).sum())
        shared = max(-float((moves * changes).sum()) / square, 0.0) if square > 0 else 0.0
        residual = changes + shared * moves
        curvature = shared * np.eye(k - 1)
        if square > 0 and 2 < k <= LARGEST:
            curvature, residual = _own_curvatures(moves, changes, shared)
        values, vectors = np.linalg.eigh(curvature)
        curvature = (vectors * values.clip(FLATTEST * shared)) @ vectors.T
        used = (k - 1) * (1 + min(k / 2, (n - 1) / 2))  # a mean, and of the curvature at most half of what was observed
        noise = np.sqrt(float((residual**2).sum()) / max(n * (k - 1) - used, 1.0))
        slope: Array = basis @ (basis.T @ mean)
        return cls(centre, slope, basis @ curvature @ basis.T, float(noise), n)

    def signal(self, q: Array) -> Array:
        """-∇Φ(q) of the model, with mean 0. Shapes: (k,) -> (k,)."""
        value: Array = self.slope - self.curvature @ (q - self.centre)
        return value

    def minimizer(self, prior: Array, pull: float) -> Array:
        """log of argmin_q Φ(q) + pull * KL(q || prior), by Newton's method in log q. Shape: (k,).

        pull: positive, however small; it keeps every q_i above 0.
        """
        k = len(prior)
        log_prior = np.log(prior)
        log_q = log_prior - np.log(prior.sum())

        def value(log_q: Array) -> float:
            q = np.exp(log_q)
            moved = q - self.centre
            return float(-self.slope @ moved + 0.5 * moved @ self.curvature @ moved + pull * q @ (log_q - log_prior))

        now = value(log_q)
        for _ in range(200):
            q = np.exp(log_q)
            push = self.signal(q) - pull * (log_q - log_prior)
            gradient = -q * (push - q @ push)
            if np.abs(gradient).max() <= 1e-10 * (np.abs(self.slope).max() + pull):
                break
            tangent = np.diag(q) - np.outer(q, q)
            hessian = tangent @ self.curvature @ tangent + pull * tangent
            # log q may grow by any constant; the ridge fixes it, and keeps what has vanished from moving at once
            step = -np.linalg.solve(hessian + (1e-9 * np.trace(hessian) + 1e-300) * np.eye(k), gradient)
            step = step * min(1.0, 2.0 / float(np.abs(step).max()))
            length = 1.0
            while length > 1e-6:
                candidate = _normalized(log_q + length * step)
                if (then := value(candidate)) < now:
                    break
                length /= 2
            else:
                break
            log_q, now = candidate, then
        found: Array = log_q
        return found


def half_range(signals: Array) -> Array:
    """Half of the largest entry less the smallest: the same when one thing is split in two. Shapes: (..., k) -> (...)."""
    value: Array = (signals.max(-1) - signals.min(-1)) / 2
    return value


def pull_of(signals: Array, noise: float, strength: float) -> float:
    """How strongly an answer is drawn to the prior: `strength` times the root mean square signal, and one standard error.

    The first part keeps what the signals barely tell apart together. The second keeps noise from being mistaken for a
    difference: without any true one, it holds the answer near the prior. It vanishes as observations add up.

    signals: shape (n, k). noise: `ResponseSurface.noise`.
    """
    scale = float(np.sqrt((half_range(signals) ** 2).mean()))
    return strength * scale + noise / float(np.sqrt(len(signals)))


def next_distribution(log_q: Array, tried: Array, signals: Array, prior: Array, strength: float, trust: float) -> Array:
    """The log of the distribution to try next: the minimizer of the model of all signals so far, within a trust region.

    log_q: the log of the one that was tried last. Shape: (k,).
    tried, signals: all that were tried, and what was observed there. Shapes: (n, k).
    strength: see `pull_of`.
    trust: the largest change of the odds of any two, as a logarithm, divided by 2.

    After the first observation nothing is known about the curvature: the step is along the signal, as far as trusted.
    """
    if not np.any(half_range(signals) > 0):
        return log_q
    if len(tried) == 1:
        wanted = signals[0] * trust / half_range(signals[0])
    else:
        surface = ResponseSurface.fit(tried, signals)
        wanted = surface.minimizer(prior, pull_of(signals, surface.noise, strength)) - log_q
    wanted = wanted - (wanted.max() + wanted.min()) / 2
    most = float(np.abs(wanted).max())
    return _normalized(log_q + wanted * (min(1.0, trust / most) if most > 0 else 0.0))


def _own_curvatures(moves: Array, changes: Array, shared: float) -> tuple[Array, Array]:
    """The symmetric A of changes ≈ -A moves, drawn to shared * I, and what it leaves. Shapes: (n, m) -> (m, m), (n, m)."""
    n, m = moves.shape
    rows, columns = np.triu_indices(m)
    design = np.zeros((n, m, len(rows)))
    entry = np.arange(len(rows))
    design[:, rows, entry] += moves[:, columns]
    off = rows != columns
    design[:, columns[off], entry[off]] += moves[:, rows[off]]
    flat = design.reshape(n * m, -1)
    prior = np.where(off, 0.0, shared)
    variance = np.where(off, 0.5, 1.0)  # an entry off the diagonal stands for two
    target = -changes.reshape(-1) - flat @ prior
    gram = (flat * variance) @ flat.T  # (n m, n m), smaller than the normal equations where entries outnumber observations
    typical = np.sqrt(float((moves**2).mean()))
    residual = target
    for _ in range(3):
        freedom = max(n * m - m - min(len(rows), (n - 1) * m / 2), 1)
        noise = float((residual**2).sum()) / freedom
        spread = max(shared, 1e-3 * np.sqrt(noise) / typical)
        ridge = noise / spread**2 + 1e-12 * np.trace(gram) / len(gram) + 1e-300
        own = variance * (flat.T @ np.linalg.solve(gram + ridge * np.eye(n * m), target))
        residual = target - flat @ own
    curvature = np.zeros((m, m))
    curvature[rows, columns] = curvature[columns, rows] = prior + own
    return curvature, -residual.reshape(n, m)


def _simplex_basis(k: int) -> Array:
    """An orthonormal basis of the vectors that sum to 0. Shape: (k, k - 1)."""
    basis: Array = np.linalg.qr(np.eye(k) - 1 / k)[0][:, : k - 1]
    return basis


def _normalized(log_q: Array) -> Array:
    """The same, such that exp of it sums to 1."""
    most = log_q.max()
    value: Array = log_q - most - np.log(np.exp(log_q - most).sum())
    return value
