"""The quadratic model of a function of a distribution: what it finds from exact gradients, and what it makes of noise."""

import numpy as np
import pytest

from bilevel.response import LARGEST, Array, ResponseSurface, half_range, next_distribution, pull_of

UNIFORM3 = np.full(3, 1 / 3)


class Bowl:
    """Φ(q) = ½ (q - target)'C(q - target)."""

    def __init__(self, target: list[float], noise: float = 0.0, seed: int = 0) -> None:
        self.target = np.array(target)
        self.random = np.random.default_rng(seed)
        root = self.random.standard_normal((len(target), len(target)))
        self.curvature = root @ root.T + np.eye(len(target))
        self.noise = noise

    def signal(self, q: Array) -> Array:
        seen: Array = -self.curvature @ (q - self.target) + self.noise * self.random.standard_normal(len(q)) + 5.0
        return seen

    def run(self, rounds: int, trust: float = 1.0, strength: float = 0.0) -> tuple[Array, Array, Array]:
        prior = np.full(len(self.target), 1 / len(self.target))
        log_q, tried, signals = np.log(prior), [], []
        for _ in range(rounds):
            tried.append(np.exp(log_q))
            signals.append(self.signal(tried[-1]))
            log_q = next_distribution(log_q, np.array(tried), np.array(signals), prior, strength, trust)
        return np.exp(log_q), np.array(tried), np.array(signals)


@pytest.mark.parametrize("target", [[0.7, 0.3], [0.5, 0.3, 0.2], [0.1, 0.2, 0.3, 0.15, 0.25]])
def test_exact_gradients_lead_to_the_optimum(target: list[float]) -> None:
    found, _, _ = Bowl(target).run(14)
    assert found == pytest.approx(target, abs=1e-3)


def test_a_constant_in_the_signals_changes_nothing() -> None:
    tried = np.random.default_rng(0).dirichlet(np.ones(3), 6)
    signals = np.array([Bowl([0.5, 0.3, 0.2]).signal(q) for q in tried])
    plain, shifted = (ResponseSurface.fit(tried, s) for s in (signals, signals + np.arange(6.0)[:, None]))
    assert plain.minimizer(UNIFORM3, 1e-6) == pytest.approx(shifted.minimizer(UNIFORM3, 1e-6), abs=1e-9)


def test_an_optimum_outside_the_simplex_gives_a_corner() -> None:
    found, _, _ = Bowl([1.6, -0.6]).run(10)
    assert found[0] > 0.999


def test_a_step_stays_within_the_trust_region() -> None:
    bowl = Bowl([0.9, 0.05, 0.05])
    _, tried, _ = bowl.run(6, trust=0.3)
    odds = np.log(tried[:, :, None] / tried[:, None, :])
    assert np.abs(np.diff(odds, axis=0)).max() == pytest.approx(0.6, rel=1e-6)


def test_without_any_difference_the_answer_stays_where_it_is() -> None:
    log_q = np.log([0.2, 0.3, 0.5])
    same = next_distribution(log_q, np.exp(log_q)[None], np.ones((1, 3)), UNIFORM3, 0.05, 1.0)
    assert same.tolist() == log_q.tolist()


def test_noise_alone_is_held_near_the_prior_and_more_so_with_more_of_it() -> None:
    """Signals of pure noise, 4 sources, 20 runs. Without the pull of one standard error half of them end near a corner."""
    heaviest = {}
    for strength in (0.0, 0.05):
        for rounds in (8, 20):
            ends = []
            for seed in range(20):
                random = np.random.default_rng(seed)
                tried, signals, log_q, prior = [], [], np.log(np.full(4, 0.25)), np.full(4, 0.25)
                for _ in range(rounds):
                    tried.append(np.exp(log_q))
                    signals.append(random.standard_normal(4))
                    log_q = next_distribution(log_q, np.array(tried), np.array(signals), prior, strength, 1.0)
                ends.append(np.exp(log_q).max())
            heaviest[strength, rounds] = float(np.median(ends))
    assert heaviest[0.05, 8] < 0.5
    assert heaviest[0.05, 20] < 0.45


def test_splitting_a_source_leaves_the_scale_as_it_is() -> None:
    assert half_range(np.array([0.4, -0.2])) == half_range(np.array([0.4, 0.4, -0.2])) == pytest.approx(0.3)


def test_the_pull_is_a_share_of_the_signals_and_a_standard_error() -> None:
    signals = np.array([[1.0, -1.0]] * 4)
    assert pull_of(signals, 0.2, 0.05) == pytest.approx(0.05 + 0.1)


def test_many_sources_share_one_curvature_and_are_fitted_in_no_time() -> None:
    k = LARGEST + 30
    target = np.random.default_rng(1).dirichlet(np.ones(k))
    prior, tried, signals = np.full(k, 1 / k), [], []
    log_q = np.log(prior)
    for _ in range(8):
        tried.append(np.exp(log_q))
        signals.append(-3.0 * (tried[-1] - target))
        log_q = next_distribution(log_q, np.array(tried), np.array(signals), prior, 0.0, 1.0)
    assert np.exp(log_q) == pytest.approx(target, abs=2e-3)
