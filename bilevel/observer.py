"""Who follows a run: an observer, such as all plugins, which is told at once, and loggers, which must not hold it up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, Protocol

import pluggy

from bilevel import hookspecs
from bilevel.background import Background
from bilevel.errors import ProblemError
from bilevel.logger import Logger
from bilevel.plain import name_of
from bilevel.record import Record
from bilevel.run import Run

log = logging.getLogger("bilevel")

SILENT, PATIENCE = 3.0, 60.0
"""Seconds that the end of a run waits for a logger: before it says so, and at the most. All is saved by then."""


class Observer(Protocol):
    """Receives the events of a run; see the hooks of the same names."""

    def bilevel_run_start(self, *, run: Run) -> Any:
        """The run begins."""

    def bilevel_step_end(self, *, run: Run, record: Record) -> Any:
        """A step is done."""

    def bilevel_run_end(self, *, run: Run, error: BaseException | None) -> Any:
        """The run is over."""


class Followers:
    """All that follow one run, told as one."""

    def __init__(self, observer: Observer | None, loggers: Sequence[Logger]) -> None:
        self._observer = observer
        self._threads = [LoggerThread(logger) for logger in loggers]

    def bilevel_run_start(self, *, run: Run) -> None:
        """The run begins."""
        if self._observer is not None:
            self._observer.bilevel_run_start(run=run)
        for thread in self._threads:
            thread.tell("bilevel_run_start", run=run)

    def bilevel_step_end(self, *, run: Run, record: Record) -> None:
        """A step is done."""
        if self._observer is not None:
            self._observer.bilevel_step_end(run=run, record=record)
        for thread in self._threads:
            thread.tell("bilevel_step_end", run=run, record=record)

    def bilevel_run_end(self, *, run: Run, error: BaseException | None) -> None:
        """The run is over. Loggers are told last: by then, the files of the observers are written."""
        try:
            if self._observer is not None:
                self._observer.bilevel_run_end(run=run, error=error)
        finally:
            begun = [thread for thread in self._threads if thread.begun]  # none, if the observer failed at the start
            for thread in begun:
                thread.tell("bilevel_run_end", run=run, error=error)
            for thread in begun:
                thread.finish()


class LoggerThread:
    """Tells one logger, in the order of events, in a thread that ends with the run or with the process."""

    def __init__(self, logger: Logger) -> None:
        self._name = getattr(logger, "name", type(logger).__name__)
        self._hooks = hooks_of(logger)
        self._events: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
        self._work: Background[None] | None = None
        self._given_up = False

    @property
    def begun(self) -> bool:
        """Whether it was told anything."""
        return self._work is not None

    def tell(self, event: str, **facts: Any) -> None:
        """Add an event, and return at once."""
        self._events.put((event, facts))
        if self._work is None:
            self._work = Background(self._listen)

    def finish(self) -> None:
        """Wait until the logger has been told all, but not for too long."""
        assert self._work is not None  # it has begun
        self._work.wait(SILENT)
        if self._work.outcome is None:
            log.info("waiting for %s to take the rest of the run, %.0f seconds at the most", self._name, PATIENCE)
            self._work.wait(PATIENCE)
        if self._work.outcome is None:
            self._given_up = True
            log.warning("%s has not taken all of the run in %.0f seconds; what is left may be lost", self._name, PATIENCE)

    def _listen(self) -> None:
        broken, event = False, ""
        while event != "bilevel_run_end":
            event, facts = self._events.get()
            if broken and event != "bilevel_run_end":
                continue
            try:
                getattr(self._hooks, event)(**facts)
            except BaseException as error:  # a server that is down, a full disk, or whatever a package ends a thread by
                if not broken and not self._given_up:
                    what = str(error).strip().partition("\n")[0] or "no reason is given"
                    log.warning("%s logs no more of this run: %s: %s", self._name, type(error).__name__, what)
                broken = True


def check_loggers(loggers: Sequence[Logger]) -> None:
    """Raise `InputError` for what a logger needs and does not find, and for an object that is none."""
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise ProblemError(f"loggers has {logger!r}, which is no bilevel.Logger, such as bilevel.loggers.wandb.Wandb()")
        logger.check()
        hooks_of(logger)


def hooks_of(logger: Logger) -> pluggy.HookRelay:
    """The hooks of a new follower of the logger, called as a plugin's are. Raises `ProblemError` for one that is none."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(logger.follower(), name="logger")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ProblemError(f"the logger {name_of(logger)}: {error}") from error
    return manager.hook
