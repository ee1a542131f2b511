"""Progress on the terminal: a live panel, or plain lines where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from bilevel.answer import answer_of, ends_by_verdict, in_words
from bilevel.hookspecs import hookimpl
from bilevel.record import pace, warmup_steps
from bilevel.terminal import Terminal, in_notebook

if TYPE_CHECKING:
    from bilevel.account import Labels
    from bilevel.record import Record
    from bilevel.run import Run

FIRST, LATEST = 8, 400  # steps by which is told how long a run will take
MOST_BARS = 24  # what fits on a screen; the rest is in the run directory


class ProgressLogger:
    """Shows the step, losses, penalty gap, upper variable (as bars), throughput and remaining time."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Terminal()
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._silent = False

    @hookimpl
    def bilevel_run_start(self, run: Run) -> None:
        """Open the live panel. In a notebook, `bilevel.loggers.notebook` shows the run."""
        self._silent = in_notebook()
        if self._silent:
            return
        if not self._console.is_terminal:
            resumed = f", resuming after step {run.start}" if run.start else ""
            self._console.print(f"{length(run)}{resumed}")
            return
        self._progress = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            console=self._console,
        )  # fmt: skip
        self._progress.add_task("run", total=run.steps, completed=run.start, left="")
        self._live = Live(self._progress, console=self._console, refresh_per_second=4)
        self._live.start()

    @hookimpl
    def bilevel_step_end(self, run: Run, record: Record) -> None:
        """Show the step, and once, as soon as it can be told, how long the run will take."""
        if self._silent:
            return
        if expected := expectation(run):
            self._console.print(expected, soft_wrap=True)
        if self._live is None or self._progress is None:
            self._console.print(line(record, run), soft_wrap=True)
            return
        self._progress.update(self._progress.task_ids[0], completed=record.step + 1, left=time_left(run))
        self._live.update(Group(self._progress, headline(record, run.problem.labels), bars(record.upper)))

    @hookimpl(tryfirst=True)  # whatever other plugins do at the end, the terminal is as it was before
    def bilevel_run_end(self, run: Run, error: BaseException | None) -> None:
        """Close the panel, and print the problem's report."""
        if self._silent:
            return
        if self._live is not None:
            self._live.stop()
            self._live = self._progress = None
        report = run.problem.report(run.history) if run.history else None
        if report is not None:
            self._console.print(report)
        if run.history:
            self._console.print(answer_of(run), crop=False)
        if run.output is not None and run.history:
            self._console.print(f"written to {run.output}", soft_wrap=True)


def headline(record: Record, labels: Labels) -> str:
    """Losses, gap and throughput of one step, in one line."""
    words = []
    if "round" in record.metrics:
        words.append(f"round {record.metrics['round'] + 1:.0f}, step {record.metrics['round_step'] + 1:.0f}")
    elif record.upper and not record.moved:
        words.append("upper variable held")
    for key, label in (
        ("upper_loss", labels.upper_loss),
        ("lower_loss", labels.lower_loss),
        ("gap", "gap"),
        ("penalty", "penalty"),
    ):
        if key in record.metrics:
            words.append(f"{label} {record.metrics[key]:.4g}")
    if record.size:
        words.append(f"{record.size / record.seconds:.0f} {labels.unit}/s")
    words.append(f"{record.seconds:.2f} s/step")
    return "  ".join(words)


def line(record: Record, run: Run) -> str:
    """One step as a plain line."""
    upper = "  ".join(f"{name} {value:.3f}" for name, value in list(record.upper.items())[:MOST_BARS])
    return f"step {record.step + 1}/{run.steps}  {headline(record, run.problem.labels)}  {time_left(run)}  {upper}".rstrip()


def time_left(run: Run) -> str:
    """How long the run will go on, in words."""
    seconds = pace(run.history)
    if seconds is None:
        return "time left: known after the warm-up"
    return f"{timedelta(seconds=round(seconds * (run.steps - len(run.history))))} left"


def length(run: Run) -> str:
    """How many steps a run takes, in words."""
    return f"at most {run.steps} steps" if ends_by_verdict(run) else f"{run.steps} steps"


def expectation(run: Run) -> str:
    """How long a run will take, by the first steps of it that tell; empty after any other step.

    Steps of a warm-up take less, and the very first step more, as what it needs is set up: they are not counted. Where some
    steps do more than others, such as an evaluation, the steps up to the second one of them are counted.
    """
    here = run.history[run.start :]
    if len(here) > LATEST:
        return ""
    after = here[warmup_steps(here) :]
    counted, left = after[1:], run.steps - len(run.history)
    if len(counted) < FIRST or left < FIRST:
        return ""
    more = after[0].metrics.keys() - after[1].metrics.keys()
    telling = [place for place in range(FIRST, len(after)) if more <= after[place].metrics.keys()]
    if telling[:1] != [len(counted)]:
        return ""
    seconds = left * sum(record.seconds for record in counted) / len(counted)
    early = ", less if the result is good enough before" if ends_by_verdict(run) else ""
    return f"{length(run)}: about {in_words(seconds)} more, by the pace of {len(counted)} steps{early}"


def bars(values: Mapping[str, float]) -> RenderableType:
    """Named numbers as bars, relative to the largest."""
    table = Table.grid(padding=(0, 2))
    largest = max((abs(value) for value in values.values()), default=0.0) or 1.0
    for name, value in list(values.items())[:MOST_BARS]:
        table.add_row(name, ProgressBar(total=largest, completed=abs(value), width=32), f"{value:.3f}")
    if len(values) > MOST_BARS:
        table.add_row(f"and {len(values) - MOST_BARS} more", "", "")
    return table


logger = ProgressLogger()
