"""What the processes of a run decide together: what one of them finds wrong ends all of them."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from bilevel.backend import Backend
from bilevel.background import Background
from bilevel.errors import InputError
from bilevel.plain import to_plain
from bilevel.problem import Problem

T = TypeVar("T")

Outcome: TypeAlias = tuple[T | None, BaseException | None]
"""What something has returned, or the error that it raised."""

_MEETING = 1.0  # seconds between two meetings at most: far below the time that processes wait for each other


def on_first(backend: Backend, act: Callable[[], T]) -> T:
    """Do something in the first process; all processes get what it returns, or the error that it raises."""
    return cast(T, together(backend, lambda: act() if backend.shard.rank == 0 else None)[0])


def together(backend: Backend, act: Callable[[], T]) -> list[T]:
    """Do something in every process; each gets the results of all, or the error of the first one that fails."""
    outcome: Outcome[T] = (None, None)
    try:
        outcome = (act(), None)
    except Exception as error:
        outcome = (None, error)
    return results(backend.all_gather(outcome))


def together_at_length(backend: Backend, act: Callable[[], T]) -> list[T]:
    """As `together`, for what may take one process longer than the others would wait for it.

    act: called in a thread of its own, and does not use the backend.
    """
    return together(backend, act) if backend.shard.world_size == 1 else when_done(backend, Background(act))


def first_then_others(backend: Backend, act: Callable[[], T]) -> T:
    """Do something in every process, in the first one before the others: it may fill a cache, which the others find.

    act: as for `together_at_length`.
    """
    first = backend.shard.rank == 0
    mine: list[T] = []
    for turn in (first, not first):
        together_at_length(backend, lambda turn=turn: mine.append(act()) if turn else None)  # type: ignore[misc]
    return mine[0]


def when_done(
    backend: Backend, work: Background[T], patience: float = math.inf, impatient: Callable[[], None] = lambda: None
) -> list[T]:
    """What every process's work has come to, when all are done; they meet until then, so that none waits for too long.

    patience: seconds after which `impatient` is called, once.

    Raises the error of the first process that fails, as soon as it does.
    """
    pause, started, patient = _MEETING / 100, time.monotonic(), True
    while True:
        work.wait(pause)
        pause = min(2 * pause, _MEETING)
        met = backend.all_gather(work.outcome)
        values = results([outcome for outcome in met if outcome is not None])
        if len(values) == len(met):
            return values
        if patient and time.monotonic() - started > patience:
            patient = False
            impatient()


def results(outcomes: Sequence[Outcome[T]]) -> list[T]:
    """What all have returned. Raises the error of the first one that has failed."""
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [cast(T, value) for value, _ in outcomes]


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
