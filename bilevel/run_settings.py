"""The section `run` of a recipe: how long, where to, and how often to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bilevel.active import Active
from bilevel.backend import Backend
from bilevel.logger import Logger
from bilevel.loop import Result, fit
from bilevel.observer import Observer
from bilevel.plain import RECIPE_RULES
from bilevel.problem import Problem
from bilevel.ranges import Count, Seed
from bilevel.solver import Solver


@dataclass(frozen=True)
class RunSettings:
    """The section `run` of a recipe; `bilevel.fit` explains each setting.

    steps: the total number of steps; "auto" ends the run when the problem's verdict is to use the result.
    output: the directory of the run, which must be new or empty, unless the run is resumed.
    seed: the seed of all random numbers.
    checkpoint_every: steps between checkpoints. None: one at the end, and one when interrupted.
    keep_checkpoints: the number of checkpoints to keep.
    checkpoint_in_background: write checkpoints while the next steps are taken, from a copy in the CPU's memory.
    warm_start: the directory of another run, from whose last state this one begins, as far as its variables fit.
    at_most: the number of steps after which a run with `steps: auto` ends in any case.
    loggers: where else the run is logged, such as wandb: a name, a mapping with a name and settings, or a list of these.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    steps: Count | Literal["auto"]
    output: str | None = None
    seed: Seed = 0
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
    checkpoint_in_background: bool = True
    at_most: Count = 600
    warm_start: str | None = None
    loggers: Sequence[Logger] = ()

    @property
    def limit(self) -> int:
        """The largest number of steps."""
        return self.at_most if self.steps == "auto" else self.steps

    def fit(
        self,
        problem: Problem[Any],
        solver: Solver[Any],
        backend: Backend,
        *,
        active: Active,
        resume: bool = False,
        recipe: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
    ) -> Result:
        """Run a solver with these settings; see `bilevel.fit`."""
        return fit(
            problem,
            solver,
            backend,
            active=active,
            steps=self.limit,
            until_usable=self.steps == "auto",
            seed=self.seed,
            output=self.output,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            checkpoint_in_background=self.checkpoint_in_background,
            resume=resume,
            warm_start=self.warm_start,
            recipe=recipe,
            observer=observer,
            loggers=self.loggers,
        )
