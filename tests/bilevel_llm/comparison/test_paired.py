"""Intervals of differences against scipy, closed forms, and how often they hold the truth."""

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import stats

from bilevel.statistics import Interval
from bilevel_llm.comparison.paired import DRAWS, paired_intervals


def paired_interval(a: ArrayLike, b: ArrayLike, counts: ArrayLike, *, draws: int = DRAWS) -> Interval:
    """The interval of one pair."""
    (found,) = paired_intervals([np.subtract(a, b)], counts, draws=draws)
    return found


def test_with_one_seed_it_is_the_bootstrap_over_rows() -> None:
    """Against scipy's percentile interval of the ratio of sums. 10,000 draws each: ends agree within 5% of the width."""
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 30, 80).astype(float)
    a, b = draw.normal(2, 1, 80) * counts, draw.normal(1.9, 1, 80) * counts
    found = paired_interval(a[None], b[None], counts)
    truth = stats.bootstrap(
        (a - b, counts), lambda d, n, axis: d.sum(axis) / n.sum(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.mean == pytest.approx((a - b).sum() / counts.sum())
    width = truth.high - truth.low
    assert found.low == pytest.approx(truth.low, abs=0.05 * width)
    assert found.high == pytest.approx(truth.high, abs=0.05 * width)


def test_where_all_rows_are_alike_it_is_students_interval_over_seeds() -> None:
    """Percentiles of 10,000 draws of a t with 2 degrees of freedom: within 10%."""
    of_seeds = np.array([0.1, 0.3, 0.25])
    found = paired_interval(np.tile(of_seeds[:, None], 50), np.zeros((3, 50)), np.ones(50))
    half = stats.t.ppf(0.975, 2) * of_seeds.std(ddof=1) / np.sqrt(3)
    assert found.mean == pytest.approx(of_seeds.mean())
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)


def test_a_row_that_both_find_hard_says_nothing() -> None:
    """Pairs: what rows share, and what seeds share, cancels."""
    draw = np.random.default_rng(0)
    shared = draw.normal(0, 100, (3, 1)) + draw.normal(0, 100, 60)
    found = paired_interval(shared + 0.5, shared, np.ones(60))
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)


def test_the_same_data_give_the_same_interval_and_swapping_turns_it_round() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 3, 40))
    one, again, swapped = (paired_interval(*pair, np.ones(40)) for pair in ((a, b), (a, b), (b, a)))
    assert one == again
    assert swapped.mean == -one.mean
    assert swapped.high == pytest.approx(-one.low, abs=0.1 * (one.high - one.low))


@pytest.mark.parametrize(("seeds", "rows", "least"), [(1, 40, 0.90), (3, 40, 0.93), (5, 200, 0.93)])
def test_95_percent_of_the_intervals_hold_the_truth(seeds: int, rows: int, least: float) -> None:
    """No difference, with effects of seeds, of rows and of both together. 300 repeats have a standard error of 1.3%.

    With one seed no effect of seeds can be seen, so none is planted.
    """
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        seed = 0.3 * draw.normal(size=(seeds, 1)) * (seeds > 1)
        difference = seed + draw.normal(size=rows) + 0.5 * draw.normal(size=(seeds, rows))
        found = paired_interval(difference, np.zeros_like(difference), np.ones(rows), draws=1000)
        held += found.low <= 0 <= found.high
    assert held / 300 >= least


def test_a_single_number_has_no_interval() -> None:
    assert not paired_interval([[1.0]], [[0.5]], [1]).known


def test_several_differences_have_the_intervals_that_each_has_alone() -> None:
    random = np.random.default_rng(3)
    differences, counts = random.normal(size=(4, 3, 50)), random.integers(1, 9, 50)
    together = paired_intervals(differences, counts, draws=500)
    for one, difference in zip(together, differences, strict=True):
        alone = paired_interval(difference, np.zeros_like(difference), counts, draws=500)
        np.testing.assert_allclose([one.mean, one.low, one.high], [alone.mean, alone.low, alone.high], rtol=1e-12)
