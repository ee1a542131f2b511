"""The largest stable step of x: it is independent of α if y and z move alike, and O(1/α) if they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.active import LISA, Active
from bilevel.backend import Backend
from bilevel.problem import Problem
from bilevel.solver import Metrics, Solver, State
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms


class StableStep(Check):
    """Runs side by side with steps from small to large: which still come nearer to the solution?"""

    statement = (
        "the largest stable step of x does not depend on α if y and z share start, step and block mask; else it is O(1/α)"
    )
    hypotheses = "one lower step for each step of x; effective steps: that of y on g + f/α is that of z on g"
    source = "consistent with the uniform smoothness of L_α in Chen, Ma, Zhang 2025 (2306.14853)"
    standing = "derived"
    specific = "about steps that y and z share"

    def readings(self) -> Iterator[Reading]:
        """Measure the largest stable step as a function of α, for equal and unequal steps, and shared and separate masks."""
        penalties = [1e2, 1e3, 1e4]
        solver = self.solver or ScaleBiO
        because = "the grid of steps has a factor 1.2 between neighbors"
        equal = largest_stable_steps(solver, penalties, lr_y=1.0)
        yield exponent("equal steps", "α", penalties, equal, 0, 0.1, because)
        half = largest_stable_steps(solver, penalties, lr_y=0.5)
        yield exponent("half the step for y", "α", penalties, half, -1, 0.1, because)
        steps = 100 if self.quick else 200
        because = f"{because}, and the masks are random"
        mask = LISA(blocks=4, period=1)
        shared = largest_stable_steps(solver, penalties, lr_y=1.0, active=mask, steps=steps)
        yield exponent("equal steps, 4 of 8 blocks, one mask", "α", penalties, shared, 0, 0.2, because)
        own = largest_stable_steps(OwnMasks, penalties, lr_y=1.0, active=mask, steps=steps)
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


def largest_stable_steps(
    solver: type[Solver[Any]], penalties: Sequence[float], *, lr_y: float, active: Active | None = None, steps: int = 120
) -> list[float]:
    """For each penalty the largest stable step times the curvature of Φ, for condition number 10; 0 if none is stable.

    The solver starts near its fixed point with every step of a grid, and must come nearer in all that it does.
    """
    forms = QuadraticForms.random(3, 8, 10.0, seed=0)
    grid = 1.2 ** np.arange(-49, 25.0)  # from 1e-4 up to 80
    curvature = float(torch.linalg.eigvalsh(forms.H)[-1])
    solvers = [
        configure(
            solver, needs=("penalty", "lr_x", "lr_z", "lr_y"), penalty=α, lr_x=η / curvature, lr_z=1.0, lr_y=lr_y
        )
        for α in penalties
        for η in grid
    ]  # fmt: skip
    rests = torch.stack([forms.solution() + forms.penalized_shift(α) for α in penalties])
    start = {
        "x": rests + 1 / forms.C.shape[1] ** 0.5,
        "y": torch.stack([forms.penalized_solution(rest, α) for rest, α in zip(rests, penalties, strict=True)]),
        "z": torch.stack([forms.lower_solution(rest) for rest in rests]),
    }
    problem = Quadratic.of(forms, x=rests[0], y=start["z"][0], split=8 if active else 1)
    every = len(grid)
    with Session.of_many(problem, solvers, active=active) as session:
        for name, value in start.items():
            names = list(session.backend.weights(session.variable(name)))
            parts = value.repeat_interleave(every, 0).chunk(len(names), dim=-1)
            session.put(name, dict(zip(names, parts, strict=True)))
        session.step(steps)
        away = (session.values("x") - rests.repeat_interleave(every, 0)).norm(dim=-1).view(len(penalties), every)
    stable = away < 1.0  # and not NaN, which a diverging run arrives at
    return [float(grid[count - 1]) if count else 0.0 for count in stable.long().cumprod(1).sum(1).tolist()]
