"""Verdicts on histories made to deserve them."""

import numpy as np
import pytest

from bilevel_problems.llm.trust import Trust

NAMES = ("good", "fair", "bad")


def history(weights, *, gap: float = 0.01, push=(0.05, 0.0, -0.05), noise: float = 0.02, warmup: int = 5):  # type: ignore[no-untyped-def]
    """weights: step -> weights; push: what moves each weight up; noise: its standard deviation at a step."""
    draw = np.random.default_rng(0)
    records = [{"step": t, "upper": dict(zip(NAMES, weights(0), strict=True)), "lower_loss": 2.0} for t in range(warmup)]
    for t in range(60):
        pushes = np.array(push) + noise * draw.normal(size=3)
        records.append({
            "step": warmup + t, "upper": dict(zip(NAMES, weights(t), strict=True)), "lower_loss": 2.0, "gap": gap,
            "penalty": 10.0, "gap_parts": dict(zip(NAMES, (-pushes / 10).tolist(), strict=True)),
        })  # fmt: skip
    return records


def still(t: int) -> tuple[float, float, float]:
    return (0.6, 0.3, 0.1)


def moving(t: int) -> tuple[float, float, float]:
    return (0.3 + t / 200, 0.4 - t / 400, 0.3 - t / 400)


def test_a_settled_run_with_a_clear_order_is_said_to_be_one() -> None:
    moving_, gap, order = Trust(history(still)).verdicts()
    assert moving_.startswith("settled")
    assert gap.startswith("penalty gap closed")
    assert order.startswith("every neighbouring pair")


def test_a_run_that_still_moves_is_said_to_and_by_how_much() -> None:
    """0.005 a step, and the centres of the last two quarters are 15 steps apart."""
    assert "still moving: the weight of 'good' changed by +0.075" in Trust(history(moving)).verdicts()[0]


@pytest.mark.parametrize(("gap", "words"), [(0.2, "penalty gap open: y is 10.0% above z"), (-0.2, "z is behind y")])
def test_an_open_gap_is_said_to_either_side(gap: float, words: str) -> None:
    assert words in Trust(history(still, gap=gap)).verdicts()[1]


def test_an_order_within_the_noise_is_not_read_out() -> None:
    verdict = Trust(history(still, push=(0.05, 0.0, 0.001), noise=0.05)).verdicts()[2]
    assert "within the noise" in verdict
    assert "fair and bad" in verdict
    assert "good" not in verdict


def test_of_a_single_source_no_order_is_said() -> None:
    records = [{**record, "upper": {"good": 1.0}} for record in history(still)]
    assert [verdict.split(":")[0] for verdict in Trust(records).verdicts()] == ["penalty gap closed"]


def test_signal_is_the_mean_push_with_a_standard_error_that_covers_it() -> None:
    signal = Trust(history(still)).signal
    for name, push in zip(NAMES, (0.05, 0.0, -0.05), strict=True):
        mean, error = signal[name]
        assert abs(mean - push) < 4 * error
        assert 0.3 * 0.02 / 60**0.5 < error < 3 * 0.02 / 60**0.5


def test_the_average_is_over_the_second_half_of_the_steps_that_moved() -> None:
    average = Trust(history(moving)).average
    assert average["good"] == pytest.approx(0.3 + np.mean(range(30, 60)) / 200)


def test_short_runs_get_no_verdict() -> None:
    assert "too short to judge: 3 steps moved the weights (5 were warm-up)" in Trust(history(still)[:8]).verdicts()[0]
