"""What the processes of a run decide together: what one of them finds wrong ends all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextvars import copy_context
from threading import Thread
from typing import Any, TypeVar, cast

from bilevel.backend import Backend
from bilevel.errors import InputError
from bilevel.plain import to_plain
from bilevel.problem import Problem

T = TypeVar("T")

_MEETING = 1.0  # seconds between two meetings at most: far below the time that processes wait for each other


def on_first(backend: Backend, act: Callable[[], T]) -> T:
    """Do something in the first process; all processes get what it returns, or the error that it raises."""
    return cast(T, together(backend, lambda: act() if backend.shard.rank == 0 else None)[0])


def together(backend: Backend, act: Callable[[], T]) -> list[T]:
    """Do something in every process; each gets the results of all, or the error of the first one that fails."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    try:
        outcome = (act(), None)
    except Exception as error:
        outcome = (None, error)
    outcomes = backend.all_gather(outcome)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [cast(T, value) for value, _ in outcomes]


def together_at_length(backend: Backend, act: Callable[[], T]) -> list[T]:
    """As `together`, for what may take one process longer than the others would wait for it: they meet until all are done.

    act: called in a thread of its own, and does not use the backend.
    """
    done: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            done.append((act(), None))
        except BaseException as error:
            done.append((None, error))

    if backend.shard.world_size == 1:
        return together(backend, act)
    worker = Thread(target=copy_context().run, args=(work,), daemon=True)  # it does what its caller may
    worker.start()
    pause, finished = 0.01, [False]
    while not all(finished):
        worker.join(pause)
        pause = min(2 * pause, _MEETING)
        met = backend.all_gather((bool(done), done[0][1] if done else None))
        for _, failure in met:
            if failure is not None:
                raise failure
        finished = [one for one, _ in met]
    return together(backend, lambda: cast(T, done[0][0]))


def require_same(backend: Backend, what: str, value: Any) -> None:
    """Raise `InputError` if the processes do not agree, which would train nonsense or wait forever."""
    digests = backend.all_gather(hashlib.sha256(json.dumps(to_plain(value), sort_keys=True).encode()).hexdigest())
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise InputError(
            f"the {what} of process {other[0]} differs from that of process 0; start all processes with the same recipe, "
            "and on file systems that hold the same files"
        )


def check_batches(problem: Problem[Any], backend: Backend) -> None:
    """Draw the first batches before a large module is built: what is wrong with them is then known at once.

    Raises `InputError` if processes would do different numbers of forward passes: one would wait for the others forever.
    """
    for draw in (problem.upper_batch, problem.lower_batch):
        counts = together(backend, lambda draw=draw: len(draw(0, backend.shard)))  # type: ignore[misc]
        if len(set(counts)) > 1:
            raise InputError(
                f"the processes get different numbers of micro-batches ({counts}); "
                "choose a batch size that is a multiple of the number of processes"
            )
