"""What several processes decide together; here they are threads that meet at a barrier."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Barrier
from typing import Any

import pytest

from bilevel import Shard
from bilevel.agreement import require_same, together_at_length
from bilevel.errors import InputError
from bilevel.trust import remote_code_is_trusted, trusting_remote_code

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


def in_both(*acts: Callable[[Any], Any]) -> list[Any]:
    room = Room()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(act, Process(room, rank)) for rank, act in enumerate(acts)]
        return [call.result() for call in calls]


def act_in_both(*acts: Callable[[], Any]) -> list[Any]:
    return in_both(*[lambda backend, act=act: together_at_length(backend, act) for act in acts])


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


def test_work_in_a_thread_may_do_what_its_caller_may() -> None:
    with trusting_remote_code():
        contexts = [copy_context() for _ in range(2)]  # the threads that stand for processes have none of their own
    room = Room()
    processes = [Process(room, rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(context.run, together_at_length, process, remote_code_is_trusted)
            for context, process in zip(contexts, processes, strict=True)
        ]
    assert [call.result() for call in calls] == [[True, True]] * 2


class Part:
    """No dataclass."""


def test_parts_that_are_no_dataclasses_do_not_make_processes_disagree() -> None:
    parts = [Part(), Part()]
    assert in_both(*[lambda b, part=part: require_same(b, "recipe", {"solver": part}) for part in parts]) == [None, None]
    with pytest.raises(InputError, match="the recipe of process 1 differs from that of process 0"):
        in_both(*[lambda b, rate=rate: require_same(b, "recipe", {"rate": rate}) for rate in (0, 1)])
