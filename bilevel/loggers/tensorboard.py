"""TensorBoard events in the run directory: every number of every step."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from bilevel.files import append_whole
from bilevel.hookspecs import hookimpl
from bilevel.loggers.content import numbers_of

if TYPE_CHECKING:
    from pathlib import Path

    from bilevel.record import Record
    from bilevel.run import Run

log = logging.getLogger("bilevel")


class TensorBoardLogger:
    """Writes scalars; nested names become groups ("upper/reference"). A disk without room for them does not fail the run.

    Events are written here and now: torch's `SummaryWriter` does it in a thread, whose failures cannot be caught.
    """

    def __init__(self) -> None:
        self._file: Path | None = None

    @hookimpl
    def bilevel_run_start(self, run: Run) -> None:
        """Begin an event file; steps that a resumed run will do again are marked as void."""
        if run.output is None:
            return
        from tensorboard.compat.proto.event_pb2 import SessionLog

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = run.output / "tensorboard" / name
        self._add(file_version="brain.Event:2")
        if run.start:
            self._add(step=run.start, session_log=SessionLog(status=SessionLog.START))

    @hookimpl
    def bilevel_step_end(self, record: Record) -> None:
        """Write the step's numbers."""
        if self._file is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers_of(record).items()]
        self._add(step=record.step, summary=Summary(value=values))

    @hookimpl
    def bilevel_run_end(self) -> None:
        """Leave the event file."""
        self._file = None

    def _add(self, **facts: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            return
        event = _Collected()
        RecordWriter(event).write(Event(wall_time=time.time(), **facts).SerializeToString())
        try:
            self._file.parent.mkdir(exist_ok=True)
            append_whole(self._file, bytes(event))
        except OSError as error:
            log.warning("no more TensorBoard events are written: %s", error.strerror or error)
            self._file = None


class _Collected(bytearray):
    """Bytes, written like a file."""

    def write(self, data: bytes) -> None:
        """Add to them."""
        self.extend(data)


logger = TensorBoardLogger()
