"""F2BA: Chen, Ma, Zhang, "Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order Oracles"
(JMLR 26(109), 2025, arXiv 2306.14853).

    z <- z - 1/L ∇_y g(x, z)                                     K times
    y <- y - 1/(2 λ L) (∇_y f(x, y) + λ ∇_y g(x, y))             K times
    x <- x - η (∇_x f(x, y) + λ (∇_x g(x, y) - ∇_x g(x, z)))

The step of F2SA, at a fixed large λ and on two time scales: y and z keep up with x, so the step of x need not shrink with λ.
"""

from dataclasses import dataclass, field
from typing import Any

from bilevel.backend import Backend
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Schedule
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.shared import require_positive


@dataclass(frozen=True)
class F2BA(Solver[State]):
    """A fixed large penalty; y and z, warm-started, take many steps for each step of x.

    penalty: λ. The bias of the gradient of x is O(κ³/λ), κ being the condition number of g in y.
    lr_z: 1/L, where L bounds the curvature of g in y.
    lr_y: step of y on g + f/λ; None takes lr_z / 2, which is the step 1/(2 λ L) on λ g + f.
    lr_x: η, of the order 1/κ³ in the worst case.
    lower_steps: K, of the order κ log(λ κ). λ multiplies the remaining errors of y and z: too few steps bias x.
    """

    penalty: Schedule = 20.0
    lr_z: Schedule = 0.1
    lr_y: Schedule | None = None
    lr_x: Schedule = 0.05
    lower_steps: int = 30
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        require_positive("penalty", self.penalty)
        require_positive("lower_steps", self.lower_steps)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, y and z."""
        return self._steps().init(problem, backend)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """K steps of z and y, then one of x."""
        return self._steps().step(t, state, problem, backend)

    def workload(self) -> Workload:
        """The workload of F2SA."""
        return self._steps().workload()

    def _steps(self) -> F2SA:
        return F2SA(
            penalty=self.penalty,
            lr_z=self.lr_z,
            lr_y=self.lr_y,
            lr_x=self.lr_x,
            lower_steps=self.lower_steps,
            optimizer_x=self.optimizer_x,
            optimizer_z=self.optimizer_z,
        )
