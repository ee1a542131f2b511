import numpy as np
import pytest

from bilevel.verify.rates import fit_power_law


def test_a_power_law_is_recovered() -> None:
    xs = np.geomspace(1, 1e3, 7)
    fit = fit_power_law(xs, 5 * xs**-1.5)
    assert fit.exponent == pytest.approx(-1.5, abs=1e-12)
    assert fit.factor == pytest.approx(5)
    assert fit.low == pytest.approx(fit.high)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    xs = np.geomspace(1, 100, 6)
    fits = [fit_power_law(xs, np.exp(random.normal(0, 0.1, 6)) / xs) for _ in range(400)]
    covered = np.mean([fit.low <= -1 <= fit.high for fit in fits])
    assert 0.92 <= covered <= 0.98  # 95 %, with a sampling error of 1 %


@pytest.mark.parametrize(("xs", "ys"), [([1, 2, 3], [1, 0, 1]), ([1, 2, 3], [1, -1, 1]), ([1, 2, 3], [1, float("nan"), 1])])
def test_what_has_no_logarithm_is_refused(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(ValueError, match="no logarithm"):
        fit_power_law(xs, ys)


def test_two_points_and_equal_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least three"):
        fit_power_law([1, 2], [1, 2])
    with pytest.raises(ValueError, match="all x are equal"):
        fit_power_law([2, 2, 2], [1, 2, 3])
