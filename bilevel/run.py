"""A run as plugins see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel.active import Active
from bilevel.backend import Backend
from bilevel.history import History
from bilevel.problem import Problem
from bilevel.solver import Solver


@dataclass
class Run:
    """A run as plugins see it: its parts, and what has happened so far.

    start: steps that were done before, by the run that this one resumes.
    history: one record a step, from step 0.
    output: the run directory; None if nothing is written.
    """

    problem: Problem[Any]
    solver: Solver[Any]
    backend: Backend
    active: Active
    steps: int
    seed: int
    output: Path | None
    recipe: Mapping[str, Any]
    start: int = 0
    history: History = field(default_factory=History)
