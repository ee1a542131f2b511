"""Ctrl-C and SIGTERM: a run stops after a whole step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether the run was asked to stop."""

    asked: bool = False


@contextmanager
def stop_signals(*, impatient: bool) -> Iterator[Stop]:
    """Within this context, Ctrl-C and SIGTERM ask the run to stop after the current step.

    impatient: a second signal stops at once. False under a launcher, which passes on signals that its processes have
        already received.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked and impatient:
            raise KeyboardInterrupt
        if not stop.asked:
            print("\nstopping after this step" + " (press again to stop at once)" * impatient, file=sys.stderr)
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
