"""MEHA: Liu, Liu, Yao, Zeng, Zhang, "Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-loop and Hessian-free
Solution Strategy" (ICML 2024, arXiv 2405.09927).

The lower level is replaced by g(x, y) - v(x, y) <= 0, where v(x, y) = min_z g(x, z) + ‖z - y‖²/(2γ) is its Moreau envelope:

    z <- z - η (∇_y g(x, z) + (z - y)/γ)
    y <- y - β (∇_y f(x, y)/c_k + ∇_y g(x, y) - (y - z)/γ)
    x <- x - α (∇_x f(x, y)/c_k + ∇_x g(x, y) - ∇_x g(x, z))
"""

from dataclasses import dataclass, field
from typing import Any

from bilevel.backend import Backend
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Power, Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import place, report, require_positive


@dataclass(frozen=True)
class MEHA(Solver[State]):
    """A single-loop first-order method for lower levels that need not be convex: only g + ‖· - y‖²/(2γ) must be.

    penalty: c_k, of the form c (k + 1)^p with p in [0, 1/2): a larger p ends closer to the lower level and takes longer.
    gamma: γ, which must be small for a nonconvex g. In the limit a large γ gives the value gap, and a small one a multiple
        of the squared gradient norm.
    lr_x: α, on f/c_k + g - v as in the paper (other solvers step x on the penalty times that).
    lr_y: β; None takes lr_z.
    lr_z: η.

    y and x move from the same point, at the new z, so that the two share their gradients.
    """

    penalty: Schedule = field(default_factory=lambda: Power(10.0, 1 / 4))
    gamma: float = 1.0
    lr_x: Schedule = 0.05
    lr_y: Schedule | None = None
    lr_z: Schedule = 0.1
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        require_positive("penalty", self.penalty)
        require_positive("gamma", self.gamma)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, y and z."""
        return place(problem, backend, ("y", "z"), self.optimizer_x, self.optimizer_z)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """One step of z towards the proximal point of y, then one of y and x."""
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        f, g = problem.upper_loss, problem.lower_loss
        c, lr_z = at(self.penalty, t), at(self.lr_z, t)
        ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)

        backend.backward(lambda b: g(x, z, b), ζ, wrt={z: 1})
        backend.add_gradient(z, backend.read(z) - backend.read(y), 1 / self.gamma)
        backend.step(z, lr=lr_z)

        g_z = backend.backward(lambda b: g(x, z, b), ζ, wrt={x: -1})
        g_y = backend.backward(lambda b: g(x, y, b), ζ, wrt={x: 1, y: 1})
        f_y = backend.backward(lambda b: f(x, y, b), ξ, wrt={x: 1 / c, y: 1 / c})
        backend.add_gradient(y, backend.read(y) - backend.read(z), -1 / self.gamma)
        backend.step(y, lr=lr_z if self.lr_y is None else at(self.lr_y, t))
        norm = backend.step(x, lr=at(self.lr_x, t))
        return report(upper=f_y, lower=g_z, gap=g_y - g_z, penalty=c, grad_norm_x=norm)

    def workload(self) -> Workload:
        """One pass for z, two for y, one for x; beside a gradient, z - y is held with what it was computed from."""
        replicas = {name: self.optimizer_z for name in ("y", "z")}
        return Workload(replicas, lower_passes=2, upper_passes=1, lower_forwards=1, vectors=3)
