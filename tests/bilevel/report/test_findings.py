import numpy as np
import pytest

from bilevel import Finding
from bilevel.report.findings import statements, upper_rows
from bilevel.report.groups import Group, group_runs
from bilevel.run_reader import read_run
from tests.bilevel.conftest import SETTLED, STEPS, WARMUP, Make

T2 = 4.303  # Student's t, two-sided 95%, two degrees of freedom


def group(*paths) -> Group:  # type: ignore[no-untyped-def]
    (found,) = group_runs([read_run(path) for path in paths])
    return found


def test_a_single_run_has_the_average_of_the_second_half_and_no_interval_unless_it_gives_one(make_run: Make) -> None:
    rows = {row.name: row for row in upper_rows(group(make_run(final={"web": 0.6, "books": 0.3, "chat": 0.1})))}
    moved = STEPS - WARMUP
    share = np.mean([(t + 1) / moved for t in range(moved // 2, moved)])
    expected = (1 - share) / 3 + share * 0.6
    assert rows["web"].average.mean == pytest.approx(expected, abs=0.004)  # noise of 0.004, over 16 steps
    assert not rows["web"].average.known
    assert rows["web"].final == pytest.approx(0.6, abs=0.02)
    assert list(rows) == ["web", "books", "chat"]


def test_the_interval_over_seeds_is_students(make_run: Make) -> None:
    finals = [{"web": 0.5, "books": 0.5}, {"web": 0.6, "books": 0.4}, {"web": 0.7, "books": 0.3}]
    seeds = group(*(make_run(f"s{i}", seed=i, final=final) for i, final in enumerate(finals)))
    row = next(row for row in upper_rows(seeds) if row.name == "web")
    half = T2 * np.std(row.each, ddof=1) / 3**0.5
    assert row.average.mean == pytest.approx(np.mean(row.each))
    assert row.average.high - row.average.mean == pytest.approx(half, rel=1e-3)


def test_intervals_of_weights_stay_within_0_and_1(make_run: Make) -> None:
    finals = [{"web": 0.99, "books": 0.01}, {"web": 0.5, "books": 0.5}]
    rows = upper_rows(group(*(make_run(f"s{i}", seed=i, final=final) for i, final in enumerate(finals))))
    assert all(0 <= row.average.low <= row.average.high <= 1 for row in rows)


def test_an_order_within_the_spread_over_seeds_is_flagged_with_its_numbers(make_run: Make) -> None:
    finals = [{"web": 0.6, "books": 0.3, "chat": 0.1}, {"web": 0.58, "books": 0.1, "chat": 0.32}]
    first = statements(group(*(make_run(f"s{i}", seed=i, final=final) for i, final in enumerate(finals))))[0]
    assert first.flagged
    assert first.sentences[0].startswith("within the spread over 2 seeds: do not read an order into ")
    assert "chat and books (" in first.sentences[0]
    assert "more seeds would narrow this" in first.sentences[0]


def test_nothing_is_said_of_an_order_that_holds_over_seeds_as_these_share_the_rows(make_run: Make) -> None:
    finals = [{"web": 0.6 + d, "books": 0.3 - d, "chat": 0.1} for d in (0.0, 0.01, 0.02)]
    found = statements(group(*(make_run(f"s{i}", seed=i, final=final) for i, final in enumerate(finals))))
    assert not any("order" in sentence for f in found for sentence in f.sentences)


MOVING = Finding("still-moving", True, "the weight of 'web' changed by +0.200; more steps would move it further")
CLOSED = Finding("gap-open", False, "penalty gap closed: y is +0.10% from z in lower loss")


def test_what_several_runs_say_is_gathered_by_its_name_flags_first(make_run: Make) -> None:
    paths = [make_run("a", seed=0, findings=[CLOSED, MOVING]), make_run("b", seed=1, findings=[CLOSED, SETTLED])]
    found = statements(group(*paths))
    assert [f.flagged for f in found] == sorted((f.flagged for f in found), reverse=True)
    moving, closed = (next(f for f in found if f.heading == heading) for heading in ("still moving", "gap open"))
    assert moving.flagged
    assert moving.where == "flagged in 1 of 2 runs"
    assert moving.sentences == [f"a: {MOVING.sentence}", f"b: {SETTLED.sentence}"]
    assert not closed.flagged
    assert closed.where == "flagged in 0 of 2 runs"


def test_a_finding_that_nobody_has_heard_of_is_shown_like_any_other(make_run: Make) -> None:
    """A sentence is shown as it is, colons and all."""
    odd = Finding("moon", True, "the moon is full: it was when 09:30 came")
    assert statements(group(make_run(findings=[CLOSED, odd])))[0].sentences == [odd.sentence]


def test_runs_of_other_problems_have_no_order_to_flag(make_run: Make) -> None:
    """Entries that are no weights cannot be ranked."""
    finals = [{"ridge": 2.0, "scale": 5.0}, {"ridge": 5.0, "scale": 2.0}]
    found = statements(group(*(make_run(f"s{i}", seed=i, final=final, findings=None) for i, final in enumerate(finals))))
    assert found == []
