import numpy as np
import pytest
from scipy import stats

from bilevel.statistics import interval, smoothed, t_quantile


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


def test_a_running_mean_leaves_gaps_as_they_are() -> None:
    found = smoothed([np.nan, np.nan, 1.0, 2.0, 6.0], 3)
    assert np.isnan(found[:2]).all()
    assert found[2:] == pytest.approx([1.5, 3.0, 4.0])
