"""The section `run` of a recipe: how long, where to, and how often to save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bilevel.active import Active
from bilevel.backend import Backend
from bilevel.loop import Observer, Result, fit
from bilevel.problem import Problem
from bilevel.solver import Solver


@dataclass(frozen=True)
class RunSettings:
    """The section `run` of a recipe; `bilevel.fit` explains each setting."""

    steps: int
    output: str | None = None
    seed: int = 0
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "keep_checkpoints", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")

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
            steps=self.steps,
            seed=self.seed,
            output=self.output,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            resume=resume,
            recipe=recipe,
            observer=observer,
        )
