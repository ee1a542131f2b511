"""Something that is done in a thread of its own, while its caller goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """An act that has begun. It may do what its caller may, and ends with the process at the latest.

    outcome: what it returned, or the error that it raised; None as long as it goes on.
    """

    def __init__(self, act: Callable[[], T]) -> None:
        self.outcome: tuple[T | None, BaseException | None] | None = None
        self._thread = Thread(target=copy_context().run, args=(self._work, act), daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for the outcome, but not longer than this."""
        self._thread.join(seconds)

    def _work(self, act: Callable[[], T]) -> None:
        try:
            self.outcome = (act(), None)
        except BaseException as error:
            self.outcome = (None, error)
