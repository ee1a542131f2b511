"""Findings, intervals and verdicts, on histories made to deserve them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bilevel.record import Record
from bilevel_llm.reweighting.findings import order
from bilevel_llm.reweighting.trust import Trust
from bilevel_llm.reweighting.verdict import verdict

NAMES = ("good", "fair", "bad")
HORIZON = 8
GOAL = (0.6, 0.3, 0.1)


def rounds(
    count: int = 10,
    *,
    goal: Sequence[float] = GOAL,
    steep: float = 1.0,
    noise: float = 0.02,
    gap: float = 0.0,
    learns: float = 0.5,
    serves: float = 0.2,
    arrives: Callable[[int], float] = lambda r: 1 - 0.5**r,
    floor: float = 0.0,
) -> list[Record]:
    """A run of whole rounds on Φ(q) = ½ steep ‖q - goal‖².

    learns, serves: by how much the training and the validation loss, 2 at first, fall within a round.
    arrives: round -> how much of the way from equal weights to the goal its weights have gone.
    """
    random = np.random.default_rng(0)
    records: list[Record] = []

    def named(values: Any) -> dict[str, float]:
        return dict(zip(NAMES, np.asarray(values).tolist(), strict=True))

    def weights(r: int) -> Any:
        return np.full(3, 1 / 3) + arrives(r) * (np.array(goal) - 1 / 3)

    for r in range(count):
        for k in range(HORIZON):
            part = k / (HORIZON - 1)
            ends = k == HORIZON - 1
            held = floor + (1 - 3 * floor) * weights(r + 1 if ends else r)
            metrics = {
                "lower_loss": 2.0 - learns * part + 0.01 * random.normal(),
                "upper_loss": 2.0 - serves * part + 0.01 * random.normal(),
                "gap": gap,
                "penalty": 10.0,
                "round": float(r),
                "round_step": float(k),
            }
            parts = {}
            if ends:
                metrics |= {"folds": 8.0, "pull": 0.05, "floor": floor}
                signal = -steep * (weights(r) - goal) + noise * random.normal(size=3)
                parts = {"tried": named(weights(r)), "signal": named(signal), "prior": named(np.full(3, 1 / 3))}
            records.append(
                Record(len(records), 0.5, named(held), moved=ends, metrics=metrics, parts=parts, average=named(held))
            )
    return records


def loop(moves: float = 0.0, gap: float = 0.0) -> list[Record]:
    """A run of a single loop, whose weights move by so much a step."""
    return [
        Record(t, 0.5, {"good": 0.4 + moves * t, "fair": 0.6 - moves * t}, metrics={"gap": gap, "lower_loss": 2.0})
        for t in range(40)
    ]


def findings(records: list[Record], rows: int = 2000) -> dict[str, Any]:
    return {f.name: f for f in Trust(records, {"target": rows}).findings}


def flags(records: list[Record]) -> list[str]:
    return [name for name, finding in findings(records).items() if finding.flagged]


def test_a_run_that_learned_and_settled_with_a_clear_order_passes_every_test() -> None:
    found = findings(rounds())
    assert flags(rounds()) == []
    assert {name for name, f in found.items() if f.passed} == {
        "nothing-learned", "validation-risen", "still-moving", "gap-open", "order-unclear"
    }  # fmt: skip
    assert found["still-moving"].sentence.startswith("settled: no weight changed by more than 0.0")


def test_its_intervals_hold_the_goal_and_its_verdict_is_to_use_it() -> None:
    trust = Trust(rounds())
    assert all(low < goal < high for (low, high), goal in zip(trust.intervals.values(), GOAL, strict=True))
    found = verdict(trust, 0.1)
    assert found is not None
    assert found.decision == "use"
    assert "they are the best mix for 8 steps of training" in found.sentence()


def test_a_floor_lifts_the_intervals_with_the_weights() -> None:
    plain, lifted = Trust(rounds()).intervals["bad"], Trust(rounds(floor=0.1)).intervals["bad"]
    assert lifted == pytest.approx([0.1 + 0.7 * end for end in plain])


def test_sources_that_differ_by_noise_alone_have_no_order_and_ask_for_more_rounds() -> None:
    records = rounds(goal=(1 / 3, 1 / 3, 1 / 3), steep=0.0, noise=1.0)
    assert flags(records) == ["no-order"]
    found = verdict(Trust(records), 0.1)
    assert found is not None
    assert (found.decision, found.steps) == ("run longer", 2 * len(records))


def test_after_many_rounds_without_an_order_the_weights_are_not_to_be_used() -> None:
    found = verdict(Trust(rounds(32, goal=(1 / 3, 1 / 3, 1 / 3), steep=0.0, noise=1.0)), 0.1)
    assert found is not None
    assert found.decision == "do not use"
    assert "whether equal weights would do as well" in found.sentence()
    assert "a longer solver.horizon" in found.sentence()


def test_a_pair_within_the_noise_is_named_and_the_others_are_not() -> None:
    found = findings(rounds(goal=(0.6, 0.2, 0.2)))["order-unclear"]
    assert not found.passed
    assert "fair and bad" in found.sentence
    assert "good" not in found.sentence


def test_neighbors_within_the_noise_are_named_once_each() -> None:
    assert order._chains([("a", "b"), ("b", "c"), ("d", "e")]) == [["a", "b", "c"], ["d", "e"]]
    assert order._chains([]) == []


def test_a_model_that_learns_nothing_makes_the_weights_useless() -> None:
    records = rounds(learns=0.0, serves=0.0, steep=1e-5, noise=1e-6)
    assert "nothing-learned" in flags(records)
    found = verdict(Trust(records), 0.1)
    assert found is not None
    assert found.decision == "do not use"
    assert "raise solver.lr_z" in found.sentence()


def test_a_loss_whose_fall_is_lost_in_noise_is_neither_flagged_nor_passed() -> None:
    found = findings(rounds(learns=0.0, serves=0.0))["nothing-learned"]
    assert not found.flagged
    assert not found.passed


def test_a_validation_loss_that_rises_is_a_reason_not_to_use_the_weights() -> None:
    found = verdict(Trust(rounds(serves=-0.2)), 0.1)
    assert found is not None
    assert found.decision == "do not use"
    assert "the validation loss rises by" in found.sentence()


@pytest.mark.parametrize(("gap", "words"), [(0.2, "y is 10.0% above z"), (-0.2, "z is behind y, by 10.0%")])
def test_an_open_gap_is_said_to_either_side(gap: float, words: str) -> None:
    found = findings(rounds(gap=gap, learns=0.0))["gap-open"]
    assert found.flagged
    assert words in found.sentence


@pytest.mark.parametrize(("share", "flagged"), [(0.019, False), (0.021, True), (-0.021, True)])
def test_the_gap_is_open_from_two_percent_on(share: float, flagged: bool) -> None:
    assert findings(rounds(gap=share * 2.0, learns=0.0))["gap-open"].flagged == flagged


def test_weights_that_still_move_ask_for_half_as_many_rounds_again() -> None:
    records = rounds(10, arrives=lambda r: r / 10)
    assert flags(records) == ["still-moving"]
    assert "the weight of 'good' changed by +0.080" in findings(records)["still-moving"].sentence
    found = verdict(Trust(records), 0.1)
    assert found is not None
    assert (found.decision, found.steps) == ("run longer", 15 * HORIZON)


@pytest.mark.parametrize(("change", "flagged"), [(0.028, False), (0.032, True)])
def test_a_change_of_a_weight_by_three_hundredths_counts_as_moving(change: float, flagged: bool) -> None:
    """The weight goes on by a third of this in each of the last three rounds of nine."""
    records = rounds(9, goal=(0.6, 0.3, 0.1), arrives=lambda r: 1 - max(0, 9 - max(r, 6)) * change / 3 / (0.6 - 1 / 3))
    assert findings(records)["still-moving"].flagged == flagged


def test_a_short_run_has_no_interval_and_asks_for_eight_rounds() -> None:
    records = rounds(4)
    trust = Trust(records)
    assert trust.intervals == {}
    assert flags(records) == ["too-short"]
    found = verdict(trust, 0.1)
    assert found is not None
    assert (found.decision, found.steps) == ("run longer", 8 * HORIZON)
    assert "4 whole rounds of 8 steps" in found.sentence()


def test_the_records_of_an_unfinished_round_are_left_out() -> None:
    records = rounds(6)
    assert len(Trust(records[:-3]).rounds) == 5


def test_weights_that_are_known_less_precisely_than_asked_for_need_more_rounds() -> None:
    records = rounds(noise=0.1)
    trust = Trust(records)
    half = max(high - low for low, high in trust.intervals.values()) / 2
    found = verdict(trust, half / 1.5)
    assert found is not None
    assert found.decision == "run longer"
    assert found.steps == (round(10 * 1.5**2) + 1) * HORIZON
    assert verdict(trust, half * 1.01).decision == "use"  # type: ignore[union-attr]


def test_a_single_loop_is_never_passed_however_still_it_is() -> None:
    found = findings(loop())
    assert flags(loop()) == ["not-tested"]
    assert not any(finding.passed for finding in found.values())
    decided = verdict(Trust(loop()), 0.1)
    assert decided is not None
    assert decided.decision == "do not use"
    assert "solver.name=rounds" in decided.sentence()


def test_what_speaks_against_a_single_loop_is_said() -> None:
    assert flags(loop(moves=0.01)) == ["not-tested", "still-moving"]
    assert flags(loop(gap=-0.2)) == ["not-tested", "gap-open"]


@pytest.mark.parametrize(("rows", "flagged"), [(99, True), (100, False)])
def test_few_validation_rows_are_flagged(rows: int, flagged: bool) -> None:
    assert ("few-rows" in findings(rounds(), rows)) == flagged


def test_nearly_all_weight_on_one_source_is_said_and_flagged_only_if_that_is_in_doubt() -> None:
    sure = findings(rounds(goal=(0.95, 0.03, 0.02)))["one-source"]
    assert not sure.flagged
    assert "'good' has 94.9%" in sure.sentence
    assert findings(rounds(goal=(0.95, 0.03, 0.02), noise=3.0))["one-source"].flagged


def test_of_a_single_source_nothing_is_said() -> None:
    records = [replace(record, upper={"good": 1.0}, average={"good": 1.0}) for record in rounds()]
    assert flags(records) == []
    assert verdict(Trust(records), 0.1) is None
