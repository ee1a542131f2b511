"""What loggers tell of a run: the numbers of a step, what the run has come to, how it ended, and its small files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bilevel.record import Record
    from bilevel.run import Run

LARGEST = 5_000_000  # bytes of a file that is small
_KINDS = (".json", ".yaml", ".png", ".html")
_OF_THIS_MACHINE = ("working_directory.json", "micro_batch.json")

_drawing = Lock()  # matplotlib is not made for several threads at once

Ending = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    numbers: the upper variable that it arrives at ("result/NAME"), with the ends of its 95% intervals where there are any
        ("interval_low/NAME", "interval_high/NAME").
    words: the verdict and its reason, and the sentence of each finding that is a reason not to trust the result
        ("finding/NAME"); "error" if it failed or was interrupted.
    """

    numbers: Mapping[str, float]
    words: Mapping[str, str]


def numbers_of(record: Record) -> dict[str, float]:
    """Every number of a step, by name; nested names become groups ("upper/books")."""
    named = {**record.parts, "upper": record.upper, "average": record.average}
    known = {"seconds": record.seconds, "size": record.size, "optimizer_bytes": record.optimizer_bytes}
    grouped = {f"{group}/{name}": value for group, values in named.items() for name, value in values.items()}
    return {**record.metrics, **known, **grouped}


def ending(error: BaseException | None) -> Ending:
    """How a run ended."""
    if error is None:
        return "finished"
    from bilevel.loop import Interrupted  # with torch, for which commands that only list what is installed do not wait

    return "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"


def outcome_of(run: Run, error: BaseException | None) -> Outcome:
    """What a run has come to, complete or not."""
    numbers: dict[str, float] = {}
    words: dict[str, str] = {}
    if run.history:
        from bilevel.answer import answer_of

        answer = answer_of(run)
        numbers = {f"result/{name}": value for name, value in answer.values.items()}
        numbers |= {f"interval_low/{name}": low for name, (low, _) in answer.intervals.items()}
        numbers |= {f"interval_high/{name}": high for name, (_, high) in answer.intervals.items()}
        if answer.verdict is not None:
            words |= {"verdict": answer.verdict.decision, "reason": answer.verdict.reason}
        words |= {f"finding/{finding.name}": finding.sentence for finding in answer.findings if finding.flagged}
    if error is not None:
        words["error"] = str(error) or type(error).__name__
    return Outcome(numbers, words)


@contextmanager
def files_of(run: Run) -> Iterator[list[Path]]:
    """The small files of a run: its recipe, weights, pictures, and the report on it, which is there within the context."""
    if run.output is None or not run.history:
        yield []
        return
    from bilevel.report.page import read, write

    small = [
        file
        for file in sorted(run.output.iterdir())
        if file.suffix in _KINDS and file.name not in _OF_THIS_MACHINE and file.stat().st_size <= LARGEST
    ]
    with TemporaryDirectory() as folder:
        with _drawing:
            (report,) = write(read([run.output]), output=Path(folder) / "report.html")
        yield [*(file for file in small if file.name != report.name), report]
