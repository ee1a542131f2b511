"""Whether a run has hardly moved because its steps are too small: a toy problem with the step size of a language model.

A variable whose steps are too small to matter goes along a straight line at a steady pace: over the whole run, its gradient
stays what it was. One that converges slows down; one that started at the solution wanders about. So the path of a variable
is cut into `PIECES` of equally many steps. It has stood still if each piece points where the one before it did (cosine at
least `STRAIGHT`), if the shortest is at least `STEADY` times as long as the longest and the last at least `SLOWING` times
as long as the first, and if all of them together are at most `LITTLE` of the size of the variable at the start, or of 1
where that is less (both as root mean squares over entries).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from bilevel.backend import Variable
from bilevel.run import Run
from bilevel.solver import State

PIECES = 8
STRAIGHT = 0.5
STEADY = 0.5
SLOWING = 0.8
LITTLE = 0.01
LARGEST = 2**20
"""Larger variables are not followed: copies of them would take memory."""


class Standstill:
    """Follows x and the lower variables through a run. What is split over processes, or large, is left out."""

    def __init__(self, run: Run, state: State) -> None:
        self.run = run
        steps = run.steps - run.start
        self.due = {run.start + k * steps // PIECES for k in range(PIECES + 1)} if steps >= 2 * PIECES else set()
        alone = run.backend.shard.world_size == 1
        followed = [state.x, *(state.replicas.values() if alone else ())]
        self.followed = [v for v in followed if self.due and run.backend.numel(v) <= LARGEST]
        self.points: dict[str, list[Tensor]] = {v.name: [] for v in self.followed}
        self.after(run.start)

    def after(self, steps: int) -> None:
        """Note where the variables are after so many steps, if it is time."""
        if steps in self.due:
            for variable in self.followed:
                self.points[variable.name].append(self._values(variable))

    def sentence(self) -> str | None:
        """What to tell the user at the end, if anything stood still."""
        still: dict[tuple[str, float], dict[str, float]] = {}
        for name, points in self.points.items():
            setting = self.run.solver.step_size(name, self.run.steps - 1)
            if setting is not None and (moved := stood_still(points)) is not None:
                still.setdefault(setting, {})[name] = moved
        if not still:
            return None
        how = "; ".join(
            f"{' and '.join(moved)} by {max(moved.values()):.1g} an entry with {setting} = {value:g}"
            for (setting, value), moved in still.items()
        )
        return (
            f"these variables have hardly moved in {self.run.steps - self.run.start} steps, in a straight line and without "
            f"slowing down: {how}. Raise {' and '.join(dict.fromkeys(setting for setting, _ in still))}, ten times at first"
        )

    def _values(self, variable: Variable) -> Tensor:
        parts = self.run.backend.read(variable).parts.values()
        return torch.cat([part.detach().flatten().double().cpu() for part in parts]) if parts else torch.zeros(0)


def stood_still(points: list[Tensor]) -> float | None:
    """How far a variable has moved (root mean square over entries), if it has stood still; see above. Otherwise None.

    points: where it was at the start and after each piece. At the beginning of the run it may have been held.
    """
    if len(points) != PIECES + 1 or len({point.shape for point in points}) > 1 or not points[0].numel():
        return None
    pieces = [b - a for a, b in pairwise(points)]
    lengths = [float(piece.norm()) for piece in pieces]
    held = next((k for k, length in enumerate(lengths) if length), PIECES)
    pieces, lengths = pieces[held:], lengths[held:]
    if len(pieces) < PIECES // 2 or not all(0 < length < math.inf for length in lengths):
        return None
    turns = [float(a @ b) / float(a.norm() * b.norm()) for a, b in pairwise(pieces)]
    root = math.sqrt(points[0].numel())
    moved, size = float((points[-1] - points[0]).norm()) / root, float(points[0].norm()) / root
    straight = min(turns) >= STRAIGHT
    steady = min(lengths) >= STEADY * max(lengths) and lengths[-1] >= SLOWING * lengths[0]
    return moved if straight and steady and moved <= LITTLE * max(1.0, size) else None
