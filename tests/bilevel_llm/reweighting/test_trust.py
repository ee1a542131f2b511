"""Verdicts on histories made to deserve them."""

from dataclasses import replace

import numpy as np
import pytest

from bilevel.record import Record
from bilevel_llm.reweighting.resampling import TargetRows
from bilevel_llm.reweighting.trust import Trust

NAMES = ("good", "fair", "bad")


def history(weights, *, gap: float = 0.01, push=(0.05, 0.0, -0.05), noise: float = 0.02, warmup: int = 5):  # type: ignore[no-untyped-def]
    """weights: step -> weights; push: what moves each weight up; noise: its standard deviation at a step."""
    draw = np.random.default_rng(0)
    losses = {"lower_loss": 2.0}
    records = [Record(t, 0.1, dict(zip(NAMES, weights(0), strict=True)), moved=False, metrics=losses) for t in range(warmup)]
    for t in range(60):
        pushes = np.array(push) + noise * draw.normal(size=3)
        records.append(Record(
            warmup + t, 0.1, dict(zip(NAMES, weights(t), strict=True)), metrics={**losses, "gap": gap, "penalty": 10.0},
            parts={"gap_parts": dict(zip(NAMES, (-pushes / 10).tolist(), strict=True))},
        ))  # fmt: skip
    return records


def sentences(records):  # type: ignore[no-untyped-def]
    return [finding.sentence for finding in Trust(records).findings]


def flagged(records):  # type: ignore[no-untyped-def]
    return [finding.name for finding in Trust(records).findings if finding.flagged]


def still(t: int) -> tuple[float, float, float]:
    return (0.6, 0.3, 0.1)


def moving(t: int) -> tuple[float, float, float]:
    return (0.3 + t / 200, 0.4 - t / 400, 0.3 - t / 400)


def test_a_settled_run_with_a_clear_order_is_said_to_be_one() -> None:
    moving_, gap, order = sentences(history(still))
    assert moving_.startswith("settled")
    assert gap.startswith("penalty gap closed")
    assert order.startswith("every neighboring pair")


def test_a_run_that_still_moves_is_said_to_and_by_how_much() -> None:
    """0.005 a step, and the centres of the last two quarters are 15 steps apart."""
    assert "still moving: the weight of 'good' changed by +0.075" in sentences(history(moving))[0]


@pytest.mark.parametrize(("gap", "words"), [(0.2, "penalty gap open: y is 10.0% above z"), (-0.2, "z is behind y")])
def test_an_open_gap_is_said_to_either_side(gap: float, words: str) -> None:
    assert words in sentences(history(still, gap=gap))[1]


def test_an_order_within_the_noise_is_not_read_out() -> None:
    verdict = sentences(history(still, push=(0.05, 0.0, 0.001), noise=0.05))[2]
    assert "within the noise" in verdict
    assert "fair and bad" in verdict
    assert "good" not in verdict


def test_of_a_single_source_no_order_is_said() -> None:
    records = [replace(record, upper={"good": 1.0}) for record in history(still)]
    assert [verdict.split(":")[0] for verdict in sentences(records)] == ["penalty gap closed"]


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
    assert "too short to judge: 3 steps moved the weights (5 were warm-up)" in sentences(history(still)[:8])[0]


def judged(weights=still, *, rows: int = 2000, **settings):  # type: ignore[no-untyped-def]
    """name -> finding, with a target set whose losses are 2.5 ± 0.1 a minibatch of 8."""
    records, draw = history(weights, **settings), np.random.default_rng(1)
    records = [
        replace(record, parts={**record.parts, "upper_parts": {"target": 2.5 + 0.1 * draw.normal()}})
        if record.moved
        else record
        for record in records
    ]
    trust = Trust(records, TargetRows({"target": rows}, {"target": 8.0}, {"target": 1.0}))
    return {finding.name: finding for finding in trust.findings}


def test_a_target_set_whose_resampled_rows_keep_the_order_passes() -> None:
    found = judged()["target-small"]
    assert not found.flagged
    assert "target set passes: the order holds when its 480 rows are resampled" in found.sentence  # 60 steps of 8
    assert "its loss is known to ±0.02" in found.sentence  # 1.96 · 0.1 · √8 / √480 = 0.025


def test_a_target_set_on_whose_rows_the_order_hangs_is_flagged_with_the_share_and_what_to_do() -> None:
    """A push of 0.05 ± 0.02 a step is clear over 60 steps; 24 rows are worth three steps, and a block holds one."""
    found = judged(rows=24, push=(0.03, 0.0, -0.03), noise=0.06)["target-small"]
    assert found.flagged
    assert "target set too small: with 24 other rows" in found.sentence
    assert "of the resamples" in found.sentence
    assert found.sentence.endswith("add validation rows")


def test_rows_that_were_not_seen_ask_for_steps_and_not_for_rows() -> None:
    found = judged(rows=9000, push=(0.012, 0.0, -0.012), noise=0.03)["target-small"]
    assert found.flagged
    assert "run more steps, as only 480 of 9000 rows were seen" in found.sentence


def test_a_set_of_less_than_two_minibatches_is_called_too_small_to_test() -> None:
    found = judged(rows=12)["target-small"]
    assert found.flagged
    assert "12 rows come round every 1.5 steps" in found.sentence


@pytest.mark.parametrize(("rows", "flagged"), [(99, True), (100, False)])
def test_few_rows_are_flagged(rows: int, flagged: bool) -> None:
    assert ("few-rows" in judged(rows=rows)) == flagged


@pytest.mark.parametrize(("share", "flagged"), [(0.91, True), (0.89, False)])
def test_one_source_with_nearly_all_the_weight_is_flagged(share: float, flagged: bool) -> None:
    found = judged(lambda t: (share, 0.06, 0.94 - share))
    assert ("one-source" in found) == flagged
    if flagged:
        assert "'good' has 91.0%" in found["one-source"].sentence


def test_flags_are_what_speaks_against_the_weights() -> None:
    assert flagged(history(moving)) == ["still-moving"]
    assert flagged(history(still, gap=0.2)) == ["gap-open"]
    assert flagged(history(still)[:8]) == ["too-short"]
    assert flagged(history(still)) == []


def test_weights_of_a_solver_without_a_gap_are_flagged_as_not_judged() -> None:
    records = [replace(record, metrics={"lower_loss": 2.0}, parts={}) for record in history(still)]
    assert flagged(records) == ["no-signal"]
    assert Trust(records).signal["good"][0] == 0.0
