import math

import pytest

from bilevel.schedule import Cosine, Linear, Power, at


def test_a_number_is_a_constant() -> None:
    assert [at(0.5, t) for t in (0, 7)] == [0.5, 0.5]


def test_cosine_warms_up_linearly_then_falls_to_its_floor() -> None:
    schedule = Cosine(peak=2.0, steps=12, warmup=4, floor=0.5)
    assert [schedule(t) for t in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule(4) == 2.0
    assert schedule(8) == pytest.approx(1.25)  # half way down
    assert schedule(12) == schedule(50) == pytest.approx(0.5)


def test_power_gives_values_not_increments() -> None:
    schedule = Power(start=3.0, exponent=1 / 7, scale=10)
    assert schedule(0) == 3.0
    # a schedule of increments with this exponent would grow like t^(8/7); the value itself must grow like t^(1/7)
    assert math.log(schedule(10**7) / schedule(10**6)) / math.log(10) == pytest.approx(1 / 7, abs=1e-5)


def test_power_stops_at_its_bound_from_either_side() -> None:
    assert Power(1.0, 1.0, bound=3.0)(100) == 3.0
    assert Power(1.0, -1.0, bound=0.2)(100) == 0.2


def test_linear_reaches_its_end_and_stays() -> None:
    assert [Linear(0.0, 1.0, 4)(t) for t in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_value_that_is_negative_or_not_finite_is_refused_with_its_step(bad: float) -> None:
    with pytest.raises(ValueError, match="at step 3"):
        at(lambda t: bad, 3)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup"):
        Cosine(peak=1.0, steps=5, warmup=5)
    with pytest.raises(ValueError, match="scale"):
        Power(1.0, 1.0, scale=0)
