"""What several processes decide together; here they are threads that meet at a barrier."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from bilevel import Shard
from bilevel.agreement import together_at_length
from bilevel.errors import InputError

PATIENCE = 0.4  # seconds that a process waits for the others


class Room:
    """Where two processes meet. One that comes late is not waited for."""

    def __init__(self) -> None:
        self.barrier = Barrier(2, timeout=PATIENCE)
        self.values: list[Any] = [None, None]


class Process:
    def __init__(self, room: Room, rank: int) -> None:
        self.shard = Shard(rank=rank, world_size=2)
        self._room = room

    def all_gather(self, value: Any) -> list[Any]:
        self._room.barrier.wait()
        self._room.values[self.shard.rank] = value
        self._room.barrier.wait()
        values = list(self._room.values)
        self._room.barrier.wait()
        return values


def act_in_both(*acts: Callable[[], Any]) -> list[Any]:
    room = Room()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(together_at_length, Process(room, rank), act) for rank, act in enumerate(acts)]
        return [call.result() for call in calls]


def test_work_may_take_longer_than_processes_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.agreement._MEETING", 0.05)

    def work() -> str:
        time.sleep(2 * PATIENCE)
        return "done"

    assert act_in_both(work, lambda: None) == [["done", None]] * 2


def test_the_error_of_one_process_ends_all_while_others_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.agreement._MEETING", 0.05)

    def fail() -> None:
        raise InputError("a.jsonl:1: bad")

    start = time.monotonic()
    with pytest.raises(InputError, match="a.jsonl:1: bad"):
        act_in_both(fail, lambda: time.sleep(30))
    assert time.monotonic() - start < 20
