import numpy as np
import pytest
from scipy import stats

from bilevel.statistics import interval, interval_of_series, mean_and_error, smoothed, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 7, 30, 31, 60, 1000])
def test_the_quantiles_are_students(degrees: int) -> None:
    """The table has three digits; the series beyond it is within 0.005."""
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=0.0006 if degrees <= 30 else 0.005)


def test_an_interval_of_independent_values_is_that_of_scipy() -> None:
    values = [2.0, 3.5, 1.0, 4.0]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-3)


def test_a_single_value_has_no_interval() -> None:
    found = interval([1.0])
    assert found.mean == 1.0
    assert not found.known
    assert not found.excludes_zero


def test_the_interval_of_a_series_that_remembers_holds_the_truth_about_as_often_as_it_says() -> None:
    """An autoregression with a memory of 5 steps, 800 steps: batches of 100 are nearly independent. Were the values taken
    for independent, the intervals would hold the mean only half of the time.
    """
    draw = np.random.default_rng(0)
    held = naive = 0
    for _ in range(300):
        series = np.zeros(800)
        for t in range(1, 800):
            series[t] = 0.8 * series[t - 1] + draw.normal()
        found, independent = interval_of_series(series[50:]), interval(series[50:])
        held += found.low < 0 < found.high
        naive += independent.low < 0 < independent.high
    assert held / 300 > 0.9
    assert naive / 300 < 0.6


def test_short_series_have_a_mean_and_no_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert np.isnan(error)
    assert mean_and_error([])[0] == 0.0


def test_a_running_mean_leaves_gaps_as_they_are() -> None:
    found = smoothed([np.nan, np.nan, 1.0, 2.0, 6.0], 3)
    assert np.isnan(found[:2]).all()
    assert found[2:] == pytest.approx([1.5, 3.0, 4.0])
