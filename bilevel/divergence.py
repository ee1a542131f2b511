"""What to say when a number is no longer finite: which variable has grown, and which step size to lower."""

from __future__ import annotations

import math
from typing import Any

from bilevel.backend import Backend, Variable
from bilevel.errors import NonFiniteError
from bilevel.solver import Solver, State

GROWN = 100.0
"""A variable whose largest entry is that many times what it was at the start (at least 1) has grown: steps of a suitable
size move it by a few times its size. Below that, the data of the step are the likelier reason."""
LARGEST = 2**20
"""Larger variables are not measured: they would be copied."""


class Sizes:
    """The largest magnitude of the entries of each variable at the start, to be compared with what they are later.

    What is split over processes is left out, as the error is raised in each of them and none of them may wait for others.
    """

    def __init__(self, solver: Solver[Any], backend: Backend, state: State) -> None:
        self.solver = solver
        self.backend = backend
        self.start = {variable.name: self._largest(variable) for variable in state.variables}

    def explain(self, error: NonFiniteError, t: int, state: State) -> str:
        """What happened in step t, the likely reason, and what to change."""
        if not error.moved:
            return (
                f"step {t}: {error}, before any variable has moved; check the data of this step, and the values that x and "
                "y start from"
            )
        lower = [v for v in state.replicas.values() if error.variable in (v.name, "x", None)]
        concerned = [v for v in (state.x, *lower) if v.name == error.variable or self.solver.step_size(v.name, t)]
        now = {variable.name: self._largest(variable) for variable in concerned}
        known = {name: size for name, size in now.items() if size is not None}
        growth = {name: _ratio(size, self.start.get(name)) for name, size in known.items()}
        sizes = ", ".join(f"{name} has entries up to {size:.3g}" for name, size in known.items())
        happened = f"step {t}: {error}" + (f" ({sizes})" if sizes else "")
        if len(known) == len(now) and max(growth.values(), default=0.0) <= GROWN:
            return f"{happened}, though no variable has grown much; check the data of this step"
        suspect = max(growth, key=lambda name: growth[name], default="x")
        if growth.get(suspect, 0.0) <= GROWN:  # not what is known: what is too large to be measured
            suspect = error.variable or next(name for name in now if name not in known)
        found = self.solver.step_size(suspect, t)
        if found is None:
            return f"{happened}; lower the step size of {suspect}, or clip its gradient"
        setting, value = found
        return f"{happened}; {suspect} has {setting} = {value:g}: lower it, or clip the gradient of {suspect}"

    def _largest(self, variable: Variable) -> float | None:
        backend = self.backend
        if backend.numel(variable) > LARGEST:
            return None
        vector = backend.read(variable)
        if not vector.whole and backend.shard.world_size > 1:
            return None
        return max((float(part.detach().abs().max()) for part in vector.parts.values() if part.numel()), default=0.0)


def _ratio(now: float, start: float | None) -> float:
    if not math.isfinite(now):
        return math.inf
    return now / max(1.0, start or 0.0)
