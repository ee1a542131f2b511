"""Progress while data files are read: tokenizing them can take many minutes."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import progress
from rich.console import Console

from bilevel.terminal import NotebookLine
from bilevel_llm.data.files import size_of

log = logging.getLogger("bilevel.llm")

_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Counts rows, and shows which part of the files has been read.

    It does so by a bar on a terminal, a line that is replaced in a notebook, and elsewhere a line at times.
    """

    def __init__(self, bar: progress.Progress, line: NotebookLine, total: int) -> None:
        self._bar, self._line = bar, line
        self._task = bar.add_task("tokenizing", total=total, rows=0)
        self._total, self._read, self._rows = total, 0, 0
        self._next = time.monotonic() + _EVERY

    def read(self, size: int) -> None:
        """So many more bytes have been read."""
        self._read = min(self._read + size, self._total)
        self._show()

    def advance(self, rows: int) -> None:
        """So many more rows are tokenized."""
        self._rows += rows
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._read, rows=self._rows)
        part = self._read / self._total if self._total else 1.0
        words = f"tokenizing: {part:.0%} of the files read, {self._rows:,} rows tokenized"
        self._line.say(words)
        if self._bar.disable and time.monotonic() > self._next:
            self._next = time.monotonic() + _EVERY
            log.info(words)


@contextmanager
def reading(files: Sequence[Path]) -> Iterator[Progress]:
    """Show progress through some files until the block is left."""
    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[rows]:,} rows"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with (
        progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        NotebookLine() as line,
    ):
        yield Progress(bar, line, sum(map(size_of, files)))
