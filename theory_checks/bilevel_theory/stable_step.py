"""The largest stable step of x: it is independent of α if y and z move alike, and O(1/α) if they do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.active import LISA, Active, All
from bilevel.backend import Backend
from bilevel.problem import Problem
from bilevel.solver import Metrics, Solver, State
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms

LIMIT = 1e8


class ManySteps(Quadratic):
    """Copies that differ only in their step of x: copy r uses x = scale_r · x', so that its step is scale_r² lr_x."""

    scale: Tensor

    def upper(self) -> nn.Module:
        """The scaled variable x'."""
        return _Scaled(self.start_x, self.scale)


class _Scaled(nn.Module):
    def __init__(self, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale
        self.value = nn.Parameter(start / scale)

    def forward(self) -> Tensor:
        return self.scale * self.value


class StableStep(Check):
    """Forty copies of one problem with steps from small to large: which still come nearer to the solution?"""

    statement = (
        "the largest stable step of x does not depend on α if y and z share start, step and block mask; else it is O(1/α)"
    )
    hypotheses = "one lower step for each step of x; effective steps: that of y on g + f/α is that of z on g"
    source = "consistent with the uniform smoothness of L_α in Chen, Ma, Zhang 2025 (2306.14853)"
    standing = "derived"

    def readings(self) -> Iterator[Reading]:
        """Measure the largest stable step as a function of α, for equal and unequal steps, and shared and separate masks."""
        penalties = [1e2, 1e3, 1e4]
        solver = self.solver or ScaleBiO
        because = "the grid of steps has a factor 1.2 between neighbors"
        equal = [largest_stable_step(solver, α, lr_y=1.0) for α in penalties]
        yield exponent("equal steps", "α", penalties, equal, 0, 0.1, because)
        half = [largest_stable_step(solver, α, lr_y=0.5) for α in penalties]
        yield exponent("half the step for y", "α", penalties, half, -1, 0.1, because)
        steps = 100 if self.quick else 200
        because = f"{because}, and the masks are random"
        mask = LISA(blocks=4, period=1)
        shared = [largest_stable_step(solver, α, lr_y=1.0, active=mask, steps=steps) for α in penalties]
        yield exponent("equal steps, 4 of 8 blocks, one mask", "α", penalties, shared, 0, 0.2, because)
        own = [largest_stable_step(OwnMasks, α, lr_y=1.0, active=mask, steps=steps) for α in penalties]
        yield exponent("equal steps, 4 of 8 blocks, a mask for each", "α", penalties, own, -1, 0.2, because)


@dataclass(frozen=True)
class OwnMasks(ScaleBiO):
    """ScaleBiO whose z trains different blocks from y."""

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Draw other blocks for z, then do a step of ScaleBiO."""
        z = state.replicas["z"]
        if z.blocks.repeated:
            backend.activate(z, LISA(blocks=4, period=1).at(t, z.blocks, seed=12345))
        return super().step(t, state, problem, backend)


def largest_stable_step(
    solver: type[Solver[Any]], α: float, *, lr_y: float, active: Active | None = None, steps: int = 120
) -> float:
    """The largest stable step times the curvature of Φ, for condition number 10; 0 if none is stable."""
    forms = QuadraticForms.random(3, 8, 10.0, seed=0)
    grid = torch.from_numpy(1.2 ** np.arange(24, -50, -1.0))[:, None]  # from 80 down to 1e-4
    rest = forms.solution() + forms.penalized_shift(α)
    at_rest = {"x": rest, "y": forms.penalized_solution(rest, α), "z": forms.lower_solution(rest)}
    problem = ManySteps.of(forms, copies=len(grid), split=8 if active else 1)
    assert isinstance(problem, ManySteps)
    problem.scale = grid.sqrt()
    curvature = float(torch.linalg.eigvalsh(forms.H)[-1])
    chosen = configure(solver, needs=("penalty", "lr_x", "lr_z", "lr_y"), penalty=α, lr_x=1 / curvature, lr_z=1.0, lr_y=lr_y)
    lost = torch.zeros(len(grid), dtype=torch.bool)
    with Session(problem, chosen, active=active or All()) as session:
        _put(session, ~lost, {**at_rest, "x": rest + 1 / len(rest) ** 0.5}, problem.scale)
        for _ in range(steps // 5):
            session.step(5)
            away = (problem.scale * session.values("x") - rest).norm(dim=-1)
            lost |= away > LIMIT
            if bool(lost.any()):
                _put(session, lost, at_rest, problem.scale)
        stable = ~lost & (away < 1.0)
    ordered = [bool(value) for value in stable.flip(0)]  # from the smallest step on
    count = ordered.index(False) if False in ordered else len(ordered)
    return float(grid.flip(0)[count - 1]) if count else 0.0


def _put(session: Session, copies: Tensor, point: dict[str, Tensor], scale: Tensor) -> None:
    """Move these copies to a point. Copies that diverge are moved to the fixed point before they overflow."""
    for name, value in point.items():
        parts = session.backend.weights(session.variable(name))
        wanted = [value / scale] if name == "x" else value.expand(len(copies), -1).chunk(len(parts), dim=-1)
        new = {part: torch.where(copies[:, None], v, parts[part]) for part, v in zip(parts, wanted, strict=True)}
        session.put(name, new)
