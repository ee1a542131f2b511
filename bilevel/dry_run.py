"""A rehearsal of a run: everything is loaded and checked, a few steps are taken in memory, and nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from bilevel.answer import in_words
from bilevel.config import Config
from bilevel.launch import rank
from bilevel.loop import fit
from bilevel.observer import check_loggers
from bilevel.record import pace
from bilevel.run_directory import RunDirectory

STEPS = 4
"""Steps that are taken. The first one is not counted: it sets up what the others find."""


@dataclass(frozen=True)
class Expectation:
    """What a run would do, which rich can print.

    steps, done: the largest number of steps, and how many were done before a resume.
    ends_early: whether it ends as soon as its verdict is to use the result.
    seconds: those of a step; None if only steps of a warm-up were taken, which are cheaper.
    units, unit: what goes through forward and backward in a step, and what it is counted in.
    memory: GB at the most: of the GPU, or else of this process; None where the system does not tell.
    output: the run directory. checkpoints: how many there will be.
    """

    steps: int
    done: int
    ends_early: bool
    seconds: float | None
    units: float
    unit: str
    memory: float | None
    device: str
    output: Path
    checkpoint_every: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        left = self.steps - self.done
        length = f"{'at most ' if self.ends_early else ''}{left} step{'s' if left != 1 else ''}"
        if left <= 0:
            yield Text(f"nothing was written; the run in {self.output} has done all of its {self.done} steps")
            return
        yield Text(f"nothing was written; a run would take {length}" + (f", from step {self.done}" if self.done else ""))
        if self.seconds is None:
            yield Text("time: not known, as the first steps are a warm-up, which is cheaper than what follows")
        else:
            most = "at most " if self.ends_early else ""
            yield Text(f"time: {most}about {in_words(left * self.seconds)}, at {self.seconds:.2g} s a step")
        if self.units:
            yield Text(f"a step: {self.units:,.0f} {self.unit} through forward and backward")
        if self.memory is not None:
            yield Text(f"memory: {self.memory:.1f} GB of {self.device}, before any checkpoint is written")
        when = f"every {self.checkpoint_every} steps, at the end" if self.checkpoint_every else "at the end"
        yield Text(f"written to {self.output}: recipe, records and results; a checkpoint {when} and when interrupted")


def rehearse(config: Config, *, resume: bool = False) -> Expectation:
    """Load and check everything that a run needs, take its first steps, and say what to expect.

    Caches are filled, as by a run; nothing else is written. With `resume`, the recipe must be that of the run in the
    directory, and the steps are the first ones all the same.

    Raises whatever `fit` raises.
    """
    run = config.run
    assert run.output is not None  # a recipe must say it
    directory = RunDirectory(Path(run.output))
    if rank() == 0:
        check_loggers(run.loggers)
    if resume:
        directory.check_same(config.recipe)
    elif rank() == 0:
        directory.check_free()
    done = max(directory.saved(), default=0) if resume else 0
    result = fit(
        config.problem,
        config.solver,
        config.backend,
        steps=min(run.limit, STEPS),
        seed=run.seed,
        active=config.active,
        warm_start=run.warm_start,
        recipe=config.recipe,
    )
    taken = result.history[1:] or result.history
    memory, device = _memory()
    return Expectation(
        run.limit,
        done,
        run.steps == "auto",
        pace(taken),
        sum(record.size for record in taken) / len(taken),
        config.problem.labels.unit,
        memory,
        device,
        directory.path,
        run.checkpoint_every,
    )


def _memory() -> tuple[float | None, str]:
    """The most memory that was taken so far, in GB, and of what."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved() / 1e9, "GPU memory"
    if sys.platform == "win32":
        return None, ""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, "memory of this process"
