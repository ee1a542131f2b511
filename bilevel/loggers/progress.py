"""Progress on the terminal: a live panel, or plain lines where the output is not a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bilevel.hookspecs import hookimpl
from bilevel.record import warmup_steps
from bilevel.run_directory import RunDirectory
from bilevel.terminal import Terminal, in_notebook

if TYPE_CHECKING:
    from bilevel.account import Labels, Verdict
    from bilevel.record import Record
    from bilevel.run import Run

MOST_BARS = 24  # what fits on a screen; the rest is in the run directory
RECENT = 50  # steps from whose speed the remaining time is estimated: with a solver that goes in rounds, about one of them


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
            self._console.print(f"{run.steps} steps{resumed}")
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
        """Show the step."""
        if self._silent:
            return
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
        verdict = run.problem.verdict(run.history) if run.history else None
        if verdict is not None:
            self._console.print(Text(f"→ {verdict.sentence(_command(verdict, run))}", style="bold"), soft_wrap=True)
        if run.output is not None and run.history:
            self._console.print(f"written to {run.output}", soft_wrap=True)


def _command(verdict: Verdict, run: Run) -> str:
    """How to run longer, and how long that takes; empty if nothing was saved."""
    if run.output is None or verdict.steps is None:
        return ""
    seconds = pace(run.history)
    time = "" if seconds is None else f" ({(verdict.steps - len(run.history)) * seconds / 60:.0f} minutes more)"
    recipe = shlex.quote(str(RunDirectory(run.output).recipe_file))
    return f"`bilevel run {recipe} --set run.steps={verdict.steps} --resume`{time}"


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


def pace(history: Sequence[Record]) -> float | None:
    """Seconds that a step takes after the warm-up, whose steps take less; None as long as that is not known."""
    recent = history[-RECENT:]
    after = recent[warmup_steps(recent) :]
    return sum(record.seconds for record in after) / len(after) if after else None


def time_left(run: Run) -> str:
    """How long the run will go on, in words."""
    seconds = pace(run.history)
    if seconds is None:
        return "time left: known after the warm-up"
    return f"{timedelta(seconds=round(seconds * (run.steps - len(run.history))))} left"


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
