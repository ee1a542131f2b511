"""Work that a GPU does beside what it computes, such as sending gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class SideStream:
    """A stream of its own on a GPU. On a CPU there is none, and work is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, work: Callable[[], T]) -> Callable[[], T]:
        """Queue work behind what was queued so far. Returns what gives its result, and makes later work wait for it.

        What the work reads and writes must be kept until then, and must have been allocated before: memory that it allocates
        itself would be given away again without regard to what reads it.
        """
        stream = self._stream
        if stream is None:
            result = work()
            return lambda: result
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = work()
            done = stream.record_event()

        def finish() -> T:
            torch.cuda.current_stream().wait_event(done)
            return result

        return finish
