"""The answer of a run: what it comes to, how certain that is, what to do with it, and the commands to go on.

It is the same from a run that is going on (`answer_of`) and from a run directory (`bilevel.run_reader.SavedRun.answer`).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from bilevel.account import HERE, RUN, Account, Finding, NextStep, Verdict
from bilevel.launch import local_world_size, world_size
from bilevel.record import average, pace
from bilevel.working_directory import started_in

if TYPE_CHECKING:
    from bilevel.run import Run

REPORT = NextStep("see how it went, as one HTML file", ("bilevel", "report", RUN))


@dataclass(frozen=True)
class Command:
    """What to type next, and what for."""

    purpose: str
    line: str


@dataclass(frozen=True)
class Answer:
    """What a run comes to.

    name: what an entry of the upper variable is called, such as "source".
    values: the upper variable that the run arrives at, largest first; see `bilevel.record.average`.
    intervals: name -> the ends of its 95% interval; empty where there is no evidence for one.
    verdict: what to do with it; None if the problem does not say.
    findings: what to know before using it.
    commands: what to do next, the best first; none where nothing was saved.
    """

    name: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    verdict: Verdict | None
    findings: Sequence[Finding]
    commands: Sequence[Command]

    @classmethod
    def of(cls, account: Account, values: Mapping[str, float], run: Path | None, here: Path) -> Answer:
        """The answer that an account gives.

        run: the run directory as it is now. here: the directory to which the recipe's paths are relative.
        """
        steps = account.next_steps if run is not None else ()
        return cls(
            account.labels.upper,
            dict(sorted(values.items(), key=lambda item: -item[1])),
            account.intervals,
            account.verdict,
            account.findings,
            [Command(step.purpose, command_line(step.words, run, here)) for step in steps],
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The verdict, and the commands, whose lines are not wrapped: they are to be copied."""
        if self.verdict is not None:
            yield Text(f"→ {self.verdict.sentence()}", style="bold")
        if self.commands:
            yield Text("\nnext")
        for command in self.commands:
            yield Text(f"  {command.purpose}", style="dim")
            yield Text(f"    {command.line}", no_wrap=True, overflow="ignore")


def answer_of(run: Run) -> Answer:
    """The answer of a run as far as it has come, which is at least one step."""
    return Answer.of(account_of(run), average(run.history), run.output, Path.cwd())


def account_of(run: Run) -> Account:
    """What a run says of itself, as far as it has come."""
    problem, history = run.problem, run.history
    verdict = problem.verdict(history)
    return Account(
        steps=len(history),
        seed=run.seed,
        versions={name: version(name) for name in ("bilevel", "torch")},
        labels=problem.labels,
        findings=list(problem.findings(history)),
        tables=list(problem.tables(history)),
        identity=problem.identity(),
        verdict=verdict,
        intervals=dict(problem.intervals(history)),
        next_steps=_next_steps(run, verdict),
    )


def command_line(words: Sequence[str], run: Path | None, here: Path | None = None) -> str:
    """The words as they are typed in a shell, where the run and its data are now."""
    prefix = "" if here is None or here == started_in() else f"{here}{os.sep}"
    placed = (word.replace(RUN, str(run), 1) if word.startswith(RUN) else word for word in words)
    return shlex.join(word.replace(HERE, prefix) for word in placed)


def resume_words(run: Run) -> tuple[str, ...]:
    """The command line that resumes the run; empty if it needs objects that were made in Python."""
    sections = (run.recipe.get(section) for section in ("problem", "solver", "backend"))
    if not all(isinstance(section, Mapping) and "name" in section for section in sections):
        return ()
    program, *rest = run.problem.resumed_by
    count, here = world_size(), local_world_size()
    if count == 1 or program != "bilevel":
        return run.problem.resumed_by
    nodes = ("--nnodes", str(-(-count // here))) if here is not None and here < count else ()
    return ("torchrun", *nodes, "--nproc-per-node", str(here or count), "-m", "bilevel", *rest)


def ends_by_verdict(run: Run) -> bool:
    """Whether the recipe lets the run end as soon as the verdict is to use its result."""
    settings = run.recipe.get("run")
    return isinstance(settings, Mapping) and settings.get("steps") == "auto"


def in_words(seconds: float) -> str:
    """A duration, rounded as far as an estimate is good for: "40 seconds", "3 minutes", "2.5 hours"."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 1.95 * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 and unit != "minutes" else f"{amount:.0f} {unit}"
    return f"{max(seconds, 1):.0f} second{'s' if round(max(seconds, 1)) != 1 else ''}"


def _next_steps(run: Run, verdict: Verdict | None) -> list[NextStep]:
    if run.output is None:
        return []
    done, resumed = len(run.history), resume_words(run)
    steps = []
    if resumed and verdict is not None and verdict.decision == "run longer" and (verdict.steps or 0) > done:
        key = "at_most" if ends_by_verdict(run) else "steps"
        total = max(verdict.steps or 0, run.steps)
        longer = () if total == run.steps else ("--set", f"run.{key}={total}")
        steps.append(NextStep(f"run longer, to {total} steps{_time(run, total)}", (*resumed, *longer)))
    elif resumed and verdict is None and done < run.steps:
        steps.append(NextStep(f"go on, to {run.steps} steps{_time(run, run.steps)}", resumed))
    return [*steps, *run.problem.next_steps(run.history), REPORT]


def _time(run: Run, total: int) -> str:
    seconds = pace(run.history)
    return "" if seconds is None else f" (about {in_words((total - len(run.history)) * seconds)} more)"
