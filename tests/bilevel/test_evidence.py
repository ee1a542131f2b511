"""Statements about the best distribution: how often they are wrong, on a function whose optimum is known."""

from itertools import pairwise

import numpy as np
import pytest

from bilevel.evidence import ENOUGH, Evidence
from bilevel.response import Array, next_distribution


def rounds_of(target: list[float], noise: float, seed: int, n: int = 12, steep: float = 1.0) -> Evidence:
    """A run on Φ(q) = ½ steep ‖q - target‖², whose signals have independent normal noise."""
    random = np.random.default_rng(seed)
    goal = np.array(target)
    k = len(goal)
    prior = np.full(k, 1 / k)
    log_q, tried, signals = np.log(prior), [], []
    for _ in range(n):
        tried.append(np.exp(log_q))
        signals.append(-steep * (tried[-1] - goal) + noise * random.standard_normal(k))
        log_q = next_distribution(log_q, np.array(tried), np.array(signals), prior, 0.05, 1.0)
    return Evidence(np.array(tried), np.array(signals), 8, prior, 0.05)


def clear_pairs(evidence: Evidence) -> list[tuple[int, int]]:
    ranked = np.argsort(-evidence.answer)
    return [(int(i), int(j)) for i, j in pairwise(ranked) if evidence.clear(int(i), int(j))]


@pytest.mark.parametrize(("k", "n"), [(4, 6), (4, 12), (8, 10)])
def test_without_a_true_order_one_is_claimed_in_at_most_five_percent_of_runs(k: int, n: int) -> None:
    """60 flat Φ, noise alone: 3 claims are 5%, and 6 are two standard errors above it. `make study` has more."""
    runs = [rounds_of([1 / k] * k, 1.0, seed, n, steep=0.0) for seed in range(60)]
    assert sum(bool(clear_pairs(evidence)) for evidence in runs) <= 6
    assert sum(evidence.ordered for evidence in runs) <= 6


def test_a_true_order_is_found_and_hardly_ever_turned_round() -> None:
    found = wrong = 0
    for seed in range(40):
        evidence = rounds_of([0.6, 0.3, 0.1], 0.05, seed)
        pairs = clear_pairs(evidence)
        found += len(pairs)
        wrong += sum(i > j for i, j in pairs)
    assert found > 60  # of 80
    assert wrong == 0


def test_an_entry_that_deserves_nothing_is_told_apart_though_all_rounds_soon_say_the_same() -> None:
    """The optimum is at the border: from the second round on, its weight is next to nothing, and no slope can be seen."""
    runs = [rounds_of([0.9, 0.5, -0.4], 0.3, seed, n=10) for seed in range(40)]
    assert sum(evidence.ordered for evidence in runs) >= 38
    assert all(evidence.answer.argmin() == 2 for evidence in runs if evidence.ordered)


def test_the_intervals_hold_the_optimum_in_nine_of_ten_runs() -> None:
    held, widths = [], []
    for seed in range(60):
        low, high = rounds_of([0.6, 0.3, 0.1], 0.1, seed).intervals
        if np.isfinite(low).all():
            held.append((low <= [0.6, 0.3, 0.1]) & (high >= [0.6, 0.3, 0.1]))
            widths.append(high - low)
    assert len(held) > 40
    assert np.mean(held) > 0.9
    assert np.mean(widths) < 0.25


def test_too_few_rounds_give_no_interval_and_no_order() -> None:
    evidence = rounds_of([0.9, 0.1], 0.01, 0, n=ENOUGH - 1)
    assert not evidence.enough
    assert np.isnan(evidence.intervals[0]).all()
    assert not evidence.clear(0, 1)


def test_too_few_folds_are_too_few_however_many_rounds_there_are() -> None:
    many = rounds_of([0.9, 0.1], 0.01, 0, n=20)
    few = Evidence(many.tried, many.signals, ENOUGH - 1, many.prior, many.strength)
    assert many.clear(0, 1)
    assert not few.clear(0, 1)


def test_rows_that_come_round_again_count_once() -> None:
    """Every fold has its own offset, which all of its rounds share: 24 rounds are no more certain than 8."""
    random = np.random.default_rng(0)
    claims = 0
    for _ in range(200):
        offsets = random.standard_normal((8, 4))
        signals: Array = np.concatenate([offsets] * 3) + 0.1 * random.standard_normal((24, 4))
        tried = random.dirichlet(np.full(4, 50.0), 24)
        claims += bool(clear_pairs(Evidence(tried, signals, 8, np.full(4, 0.25), 0.05)))
    assert claims <= 18


def test_the_ends_of_an_interval_stay_within_the_simplex() -> None:
    low, high = rounds_of([1.5, -0.5], 0.05, 0).intervals
    assert (low >= 0).all()
    assert (high <= 1).all()
    assert high[0] > 0.99
