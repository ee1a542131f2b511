"""A run's cost and memory do not grow with its length, and its history is what its records were."""

import gc
import os
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel import ScaleBiO, fit
from bilevel.account import Verdict
from bilevel.history import History
from bilevel.record import Record, average, moving, thinned
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.quadratic import Quadratic
from tests.bilevel.conftest import history

RECORDS = [
    *history({"web": 0.5, "books": 0.5}, steps=12),
    Record(
        12, 0.25, {"web": 0.3, "books": 0.7}, metrics={"upper_loss": 1.0}, average={"web": 0.4, "books": 0.6}, active=["a"]
    ),
    Record(13, 0.5, {"web": 0.2, "books": 0.8}, False, active=[], optimizer_bytes=2**40, size=7),
]


def test_a_history_gives_the_records_back_as_they_were() -> None:
    kept = History(RECORDS)
    assert list(kept) == RECORDS
    assert kept == RECORDS
    assert [record.to_json() for record in kept[8:]] == [record.to_json() for record in RECORDS[8:]]
    assert kept[-1] == RECORDS[-1]
    assert kept[10:2:-3] == RECORDS[10:2:-3]
    assert kept[2:][3:-1][0] == RECORDS[5]
    assert kept != RECORDS[:-1]
    with pytest.raises(IndexError):
        kept[len(RECORDS)]


def test_what_follows_from_a_history_is_what_follows_from_its_records() -> None:
    kept = History(RECORDS)
    assert moving(kept) == moving(RECORDS) == [record for record in RECORDS if record.moved]
    assert thinned(kept, 4) == thinned(RECORDS, 4) == RECORDS[1::4]
    assert average(kept) == average(RECORDS)
    assert average(kept[:12]) == average(RECORDS[:12])


def test_a_history_takes_little_more_than_its_numbers() -> None:
    sources = {f"source {i}": 0.5 for i in range(50)}
    kept, numbers = History(), 5 + 2 * 50 + 1
    tracemalloc.start()
    try:
        for step in range(500):
            kept.append(Record(step, 0.1, dict(sources), metrics={"gap": 0.5}, parts={"lower_parts": dict(sources)}))
        gc.collect()
        each = tracemalloc.get_traced_memory()[0] / len(kept)
    finally:
        tracemalloc.stop()
    assert each < 1.3 * 8 * numbers  # as dictionaries: 9 times as much


class Judged(Quadratic):
    """Notes when it is asked for a verdict."""

    asked: list[int]

    def verdict(self, history: Sequence[Record]) -> Verdict | None:
        self.asked.append(len(history))
        return None


def test_the_verdict_is_asked_for_after_every_move_and_then_less_and_less_often() -> None:
    problem = Judged(m=2, n=2)
    problem.asked = []
    fit(problem, ScaleBiO(warmup=0), TorchBackend(device="cpu"), steps=141, until_usable=True)
    assert problem.asked == [*range(1, 128), *range(128, 141, 2)]


@pytest.mark.soak
def test_seconds_memory_and_open_files_of_a_step_do_not_grow_over_20_000_steps(tmp_path: Path) -> None:
    seconds: list[float] = []
    megabytes: list[float] = []
    files: set[int] = set()

    class Observer:
        def bilevel_run_start(self, **_: Any) -> None:
            pass

        def bilevel_step_end(self, *, record: Record, **_: Any) -> None:
            if (record.step + 1) % 2000 == 0:
                gc.collect()
                seconds.append(time.process_time())
                megabytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
                files.add(len(os.listdir("/proc/self/fd")))

        def bilevel_run_end(self, **_: Any) -> None:
            pass

    problem = Judged(m=2, n=2)
    problem.asked = []
    fit(problem, ScaleBiO(), TorchBackend(device="cpu"), steps=20_000, until_usable=True, output=tmp_path / "run",
        checkpoint_every=500, observer=Observer())  # fmt: skip
    each = np.diff(seconds)
    assert each[-3:].mean() < 1.3 * each[:3].mean(), each
    assert megabytes[-1] - megabytes[0] < 12, megabytes  # as dictionaries, the records of 18,000 steps take 40
    assert len(files) == 1
