"""What is said about the validation rows, against simulated rows whose truth is known."""

import numpy as np
import pytest

from bilevel import Stratified
from bilevel.record import Record
from bilevel_llm.reweighting import resampling as target_rows
from bilevel_llm.reweighting.resampling import TargetRows, effective_rows, loss_error, rows_seen, share_reversed

BATCH = 8


def one_set(rows: int) -> TargetRows:
    return TargetRows({"v": rows}, {"v": BATCH}, {"v": 1.0})


def simulate(rows: int, steps: int, *, effect: float, memory: float, seed: int):  # type: ignore[no-untyped-def]
    """A set of rows, each with a push of its own on one source over another (mean `effect`, standard deviation 1); the push of
    a step is that of its minibatch, with `memory` of the steps before. Losses of the rows: 3 ± 0.5.
    """
    draw = np.random.default_rng(seed)
    pushes, losses = effect + draw.normal(size=rows), 3 + 0.5 * draw.normal(size=rows)
    sampler, held, difference, history = Stratified((rows,), BATCH, 2), 0.0, [], []
    for t in range(steps):
        picked = [row for _, row in sampler.batch(t, seed)]
        held = memory * held + (1 - memory) * pushes[picked].mean()
        difference.append(held)
        history.append(Record(len(history), 0.1, {}, parts={"upper_parts": {"v": float(losses[picked].mean())}}))
    return np.array(difference), history


def passing(rows: int, steps: int, *, effect: float, memory: float, runs: int = 30) -> float:
    """Share of the runs whose order passes. effect: in standard errors of a mean over the rows seen."""
    error, passed = 1 / np.sqrt(min(rows, steps * BATCH)), 0
    for seed in range(runs):
        difference, history = simulate(rows, steps, effect=effect * error, memory=memory, seed=seed)
        share = share_reversed(difference, history, one_set(rows))
        passed += share is not None and share < 0.025
    return passed / runs


@pytest.mark.parametrize("memory", [0.0, 0.9, 0.98])
@pytest.mark.parametrize(("rows", "steps"), [(400, 45), (400, 200), (120, 200)])
def test_an_order_that_the_rows_hold_passes_and_one_that_nothing_holds_mostly_does_not(
    rows: int, steps: int, memory: float
) -> None:
    """With six standard errors, and with none. The limits leave room for 30 runs; what was measured is in the module."""
    assert passing(rows, steps, effect=6.0, memory=memory) >= 0.8
    assert passing(rows, steps, effect=0.0, memory=memory) <= 0.3


def test_with_memory_ignored_orders_would_pass_that_nothing_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    regarded = passing(400, 45, effect=0.0, memory=0.98, runs=60)
    monkeypatch.setattr(target_rows, "_memory", lambda series: 0.0)
    assert passing(400, 45, effect=0.0, memory=0.98, runs=60) > 1.5 * regarded


def test_rows_that_come_round_at_once_tell_nothing() -> None:
    difference, history = simulate(12, 40, effect=1.0, memory=0.0, seed=0)
    assert share_reversed(difference, history, one_set(12)) is None


@pytest.mark.parametrize(("rows", "steps"), [(400, 40), (200, 200)])
def test_the_error_of_the_loss_is_that_of_the_mean_over_the_rows(rows: int, steps: int) -> None:
    """0.5 / √rows seen; over 20 simulated sets the mean estimate is within a tenth."""
    found = [loss_error(simulate(rows, steps, effect=0.0, memory=0.0, seed=seed)[1], one_set(rows)) for seed in range(20)]
    assert np.mean(found) == pytest.approx(0.5 / np.sqrt(min(rows, steps * BATCH)), rel=0.1)


def test_a_falling_loss_does_not_look_like_a_spread_between_rows() -> None:
    history = [Record(t, 0.1, {}, parts={"upper_parts": {"v": 3.0 - 0.01 * t}}) for t in range(100)]
    assert loss_error(history, one_set(800)) < 0.01 * np.sqrt(BATCH / 800)


def test_effective_rows_of_weighted_sets_are_kishs() -> None:
    target = TargetRows({"a": 900, "b": 100}, {"a": 4, "b": 4}, {"a": 0.5, "b": 0.5})
    history = [Record(0, 0.1, {}, metrics={"upper_batches": 1})] * 1000
    assert effective_rows(history, target) == pytest.approx(1 / (0.25 / 900 + 0.25 / 100))
    assert rows_seen(history, target) == 1000


def test_rows_count_only_as_far_as_they_were_seen_in_all_minibatches_of_a_step() -> None:
    assert rows_seen([Record(0, 0.1, {}, metrics={"upper_batches": 1})] * 10, one_set(400)) == 80
    assert rows_seen([Record(0, 0.1, {}, metrics={"upper_batches": 3})] * 10, one_set(400)) == 240
    assert rows_seen([Record(0, 0.1, {})] * 100, one_set(400)) == 400
