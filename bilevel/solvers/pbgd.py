"""PBGD: Shen, Chen, "On Penalty-based Bilevel Gradient Descent Method" (ICML 2023, arXiv 2302.05185).

Gradient descent on f(x, y) + γ p(x, y) in x and y together, where the penalty p is

    V-PBGD   the value gap  g(x, y) - g(x, z),  z <- z - β ∇_y g(x, z)  T times
    G-PBGD   the squared gradient norm  ‖∇_y g(x, y)‖²
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from bilevel.backend import Backend, Evaluation
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import (
    lower_step,
    place,
    report,
    require_all_active,
    require_positive,
    require_second_order,
    require_traits,
)


@dataclass(frozen=True)
class PBGD(Solver[State]):
    """One step of x and y together; z follows x in an inner loop.

    penalty: γ. For a violation δ of the lower level the value gap needs γ of the order δ^(-1/2).
    kind: "value-gap", or "gradient-norm", which has no z but needs second derivatives (hence a backend that has them and all
        blocks active), and whose bias is larger where g is badly conditioned.
    lr_x: step of x on f + γ p. x and y descend together, so that it must be of the order 1/γ.
    lr_y: step of y on p + f/γ, so that it need not shrink as γ grows; None takes lr_z.
    lr_z: β.
    lower_steps: T.
    """

    penalty: Schedule = 10.0
    kind: Literal["value-gap", "gradient-norm"] = "value-gap"
    lr_x: Schedule = 0.05
    lr_z: Schedule = 0.1
    lr_y: Schedule | None = None
    lower_steps: int = 5
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        require_positive("penalty", self.penalty)
        require_positive("lower_steps", self.lower_steps)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, y and, for the value gap, z."""
        if self.kind == "gradient-norm":
            require_second_order("pbgd with kind = gradient-norm", backend)
            require_traits("pbgd with kind = gradient-norm", problem, smooth=True)
            return place(problem, backend, ("y",), self.optimizer_x, self.optimizer_z)
        return place(problem, backend, ("y", "z"), self.optimizer_x, self.optimizer_z)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """T steps of z, then one of x and y at the same point."""
        x, y, γ = state.x, state.replicas["y"], at(self.penalty, t)
        penalize = self._value_gap if self.kind == "value-gap" else self._gradient_norm
        last, lower, gap = penalize(t, γ, state, problem, backend)
        ξ = problem.upper_batch(last, backend.shard)
        f_y = backend.backward(lambda b: problem.upper_loss(x, y, b), ξ, wrt={x: 1, y: 1 / γ})
        backend.step(y, lr=at(self.lr_z if self.lr_y is None else self.lr_y, t))
        norm = backend.step(x, lr=at(self.lr_x, t))
        return report(upper=f_y, lower=lower, gap=gap, penalty=γ, grad_norm_x=norm)

    def workload(self) -> Workload:
        """Value gap: T passes for z, two for y, one for x. Gradient norm: a pass of each level, and one product."""
        if self.kind == "gradient-norm":
            return Workload({"y": self.optimizer_z}, lower_passes=1, upper_passes=1, products=1, vectors=1)
        replicas = {name: self.optimizer_z for name in ("y", "z")}
        return Workload(replicas, lower_passes=self.lower_steps + 1, upper_passes=1, lower_forwards=1, vectors=1)

    def _value_gap(
        self, t: int, γ: float, state: State, problem: Problem[Any], backend: Backend
    ) -> tuple[int, Evaluation, Evaluation]:
        """Move z; then add the gradients of γ (g(x, y) - g(x, z)) in x, and of g(x, y) - g(x, z) in y."""
        x, y, z, g = state.x, state.replicas["y"], state.replicas["z"], problem.lower_loss
        last = (self.lower_steps + 1) * (t + 1) - 1
        for k in range(last - self.lower_steps, last):
            lower_step(problem, backend, x, z, k, lr=at(self.lr_z, t))
        ζ = problem.lower_batch(last, backend.shard)
        g_z = backend.backward(lambda b: g(x, z, b), ζ, wrt={x: -γ})
        g_y = backend.backward(lambda b: g(x, y, b), ζ, wrt={x: γ, y: 1})
        return last, g_z, g_y - g_z

    def _gradient_norm(
        self, t: int, γ: float, state: State, problem: Problem[Any], backend: Backend
    ) -> tuple[int, Evaluation, Evaluation]:
        """Add the gradients of γ ‖∇_y g‖² in x, and of ‖∇_y g‖² in y.

        The two factors of the square come from different minibatches: with one, the variance of the gradient would be
        minimized as well.
        """
        x, y, g = state.x, state.replicas["y"], problem.lower_loss
        require_all_active("pbgd with kind = gradient-norm", y)
        ζ, ζ2 = (problem.lower_batch(k, backend.shard) for k in (2 * t, 2 * t + 1))
        lower = backend.backward(lambda b: g(x, y, b), ζ, wrt={y: 1})
        v = backend.take_gradient(y)
        squared_norm = backend.backward_along(lambda b: g(x, y, b), ζ2, y, v, wrt={x: 2 * γ, y: 2})
        return 2 * t + 1, lower, Evaluation(squared_norm)
