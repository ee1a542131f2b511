"""A progress bar while data files are read: tokenizing them can take many minutes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import progress
from rich.console import Console


class Progress:
    """Counts rows, and shows which part of the files is done."""

    def __init__(self, bar: progress.Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("tokenizing", total=total, rows=0)
        self._rows = 0

    def advance(self, rows: int) -> None:
        """So many more rows are done."""
        self._rows += rows
        self._bar.update(self._task, rows=self._rows)

    def finish(self, path: Path) -> None:
        """A file is done."""
        self._bar.advance(self._task, _size(path))


@contextmanager
def reading(files: Sequence[Path]) -> Iterator[Progress]:
    """Show progress through some files, on a terminal, until the block is left."""
    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[rows]:,} rows"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Progress(bar, sum(map(_size, files)))


def _size(path: Path) -> int:
    members = path.rglob("*") if path.is_dir() else [path]
    return sum(member.stat().st_size for member in members if member.is_file())
