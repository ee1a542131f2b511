import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bilevel.errors import InputError
from bilevel.record import Record, RecordError, average, averaged, moving, read_records, thinned, warmup_steps


def record(step: int, weight: float, *, moved: bool = True, own: float | None = None) -> Record:
    average = {} if own is None else {"web": own, "books": 1 - own}
    return Record(step, 0.5, {"web": weight, "books": 1 - weight}, moved, {"lower_loss": 3.0}, average=average)


FOUND = {"lower_loss": 3.1, "gap": 0.02, "upper_batches": 2, "gap_parts": {"web": 0.01, "books": 0.03}}
KNOWN = {"seconds": 0.25, "upper": {"web": 0.4, "books": 0.6}, "active": ["model.1"], "optimizer_bytes": 12, "size": 500}


def test_what_a_solver_returns_is_sorted_into_numbers_and_numbers_by_name() -> None:
    made = Record.of_step(3, FOUND, **KNOWN)
    assert made.metrics == {"lower_loss": 3.1, "gap": 0.02, "upper_batches": 2}
    assert made.parts == {"gap_parts": {"web": 0.01, "books": 0.03}}
    assert made.moved
    assert made.average == {}
    assert not Record.of_step(3, {**FOUND, "held": 1.0}, **KNOWN).moved
    assert Record.of_step(3, {**FOUND, "average": {"web": 1.0}}, **KNOWN).average == {"web": 1.0}


def test_a_record_is_the_same_after_it_was_written_and_read() -> None:
    made = Record.of_step(3, {**FOUND, "odd metric of a plugin": -1e-300, "average": {"web": 1.0}}, **KNOWN)
    assert Record.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["schema"] == 1


GOOD = json.loads(record(0, 0.5).to_json())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "not the record of a step"),
        ('{"loss": 1.0}', "not the record of a step"),
        (json.dumps({**GOOD, "schema": 2}), "schema 2, and this version of bilevel reads schema 1"),
        (json.dumps({**GOOD, "upper": {"web": "much"}}), "not the record of a step: upper.web: "),
        (json.dumps({**GOOD, "loss": 1.0}), "not the record of a step: loss: "),
        (json.dumps({key: value for key, value in GOOD.items() if key != "seconds"}), "seconds"),
    ],
)
def test_a_damaged_line_is_named_by_file_and_line_with_the_reason(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{record(0, 0.5).to_json()}\n{line}\n{record(2, 0.5).to_json()}\n")
    with pytest.raises(RecordError) as caught:
        read_records(file)
    assert isinstance(caught.value, InputError)
    assert (caught.value.file, caught.value.line) == (file, 2)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert reason in str(caught.value)


def test_only_a_last_line_without_its_newline_may_be_incomplete(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(record(0, 0.5).to_json() + '\n{"step": 1, "upp')
    assert [r.step for r in read_records(file)] == [0]
    file.write_text(record(0, 0.5).to_json() + '\n{"step": 1, "upp\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl:2"):
        read_records(file)
    assert read_records(tmp_path / "none.jsonl") == []


def test_no_more_steps_are_read_than_asked_for_so_that_damage_after_a_checkpoint_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{record(0, 0.5).to_json()}\n{record(1, 0.5).to_json()}\n{{broken\n")
    assert [r.step for r in read_records(file, steps=2)] == [0, 1]


def test_the_average_is_over_the_second_half_of_the_steps_that_could_move_the_upper_variable() -> None:
    history = [record(t, 0.5, moved=False) for t in range(3)] + [
        record(3 + t, w) for t, w in enumerate((0.6, 0.7, 0.8, 0.9))
    ]
    assert [r.step for r in moving(history)] == [3, 4, 5, 6]
    assert [r.step for r in averaged(history)] == [5, 6]
    assert average(history) == pytest.approx({"web": 0.85, "books": 0.15})
    assert warmup_steps(history) == 3


def test_a_solver_s_own_average_is_the_average_and_is_over_all_steps_that_moved() -> None:
    weights = (0.5, 0.6, 0.7, 0.8, 0.9)
    history = [record(t, w, own=0.66) for t, w in enumerate(weights)]
    assert average(history) == {"web": 0.66, "books": 1 - 0.66}  # the mean over all is 0.7, over the second half 0.8
    assert averaged(history) == history


def test_before_anything_moved_the_average_is_where_the_upper_variable_stands() -> None:
    assert average([]) == {}
    history = [record(t, 0.5, moved=False) for t in range(3)]
    assert average(history) == {"web": 0.5, "books": 0.5}
    assert averaged(history) == history[-1:]
    assert warmup_steps(history) == 3


def test_training_alone_has_no_warm_up() -> None:
    assert warmup_steps([replace(record(0, 0.5, moved=False), upper={})]) == 0
    assert warmup_steps([replace(record(0, 0.5, moved=False), metrics={"round": 0.0})]) == 0


def test_a_record_costs_microseconds() -> None:
    start = time.perf_counter()
    for t in range(2000):
        Record.of_step(t, FOUND, **KNOWN)
    assert (time.perf_counter() - start) / 2000 < 200e-6  # about 3 on an idle machine


def test_a_thinned_history_ends_with_the_last_step_and_is_whole_where_it_is_short() -> None:
    history = [Record(t, 1.0, {}) for t in range(100_001)]
    kept = [record.step for record in thinned(history, 1000)]
    assert 900 < len(kept) <= 1000
    assert kept[-1] == 100_000
    assert len({after - before for before, after in pairwise(kept)}) == 1
    assert thinned(history[:1000], 1000) == history[:1000]
