"""BOME: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach"
(NeurIPS 2022, arXiv 2209.08709).

    q(x, y) = g(x, y) - g(x, z),  z = T gradient steps on g from y, a constant in what follows
    λ = max{η - <∇f, ∇q> / ‖∇q‖², 0}
    (x, y) <- (x, y) - ξ (∇f + λ ∇q)

λ is the smallest multiplier for which q descends at least at the rate η ‖∇q‖², so that there is no penalty to choose. x is
biased because z is not the lower optimum; the bias falls exponentially with T.
"""

from dataclasses import dataclass, field
from typing import Any

from bilevel.backend import Backend
from bilevel.optimizer import SGD, Optimizer
from bilevel.per_run import at_least
from bilevel.problem import Problem
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import lower_step, place, report, require_positive


@dataclass(frozen=True)
class BOME(Solver[State]):
    """A penalty that adapts itself: the step descends on the value gap first, and on f besides.

    eta: η. Larger keeps y closer to the lower optimum; smaller follows f longer.
    lr_x: ξ for x.
    lr_y: ξ for y; None takes lr_x, as in the paper.
    lr_z: step of the inner loop.
    lower_steps: T.

    Near the optimum ∇q vanishes and λ becomes a quotient of small numbers: use shrinking steps, and expect noise in the
    gradients to be amplified there.
    """

    eta: float = 0.5
    lr_x: Schedule = 0.05
    lr_y: Schedule | None = None
    lr_z: Schedule = 0.1
    lower_steps: int = 10
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        require_positive("eta", self.eta)
        require_positive("lower_steps", self.lower_steps)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, y and z."""
        return place(problem, backend, ("y", "z"), self.optimizer_x, self.optimizer_z)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """T steps from y to z, then one of x and y."""
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        f, g = problem.upper_loss, problem.lower_loss
        backend.assign(z, y)
        last = (self.lower_steps + 1) * (t + 1) - 1
        for k in range(last - self.lower_steps, last):
            lower_step(problem, backend, x, z, k, lr=at(self.lr_z, t))

        ζ, ξ = problem.lower_batch(last, backend.shard), problem.upper_batch(last, backend.shard)
        g_z = backend.backward(lambda b: g(x, z, b), ζ, wrt={x: -1})
        g_y = backend.backward(lambda b: g(x, y, b), ζ, wrt={x: 1, y: 1})
        grad_q = {v: backend.take_gradient(v) for v in (x, y)}
        f_y = backend.backward(lambda b: f(x, y, b), ξ, wrt={x: 1, y: 1})
        grad_f = {v: backend.take_gradient(v) for v in (x, y)}

        f_q = sum(backend.dot(grad_f[v], grad_q[v]) for v in (x, y))
        q_q = sum(backend.dot(grad_q[v], grad_q[v]) for v in (x, y))
        λ = at_least(0.0, self.eta - f_q / q_q) if q_q > 0 else 0.0
        for v in (x, y):
            backend.add_gradient(v, grad_f[v])
            backend.add_gradient(v, grad_q[v], λ)
        lr_x = at(self.lr_x, t)
        backend.step(y, lr=lr_x if self.lr_y is None else at(self.lr_y, t))
        norm = backend.step(x, lr=lr_x)
        return report(upper=f_y, lower=g_z, gap=g_y - g_z, penalty=λ, grad_norm_x=norm)

    def step_size(self, variable: str, t: int) -> tuple[str, float] | None:
        """y moves with lr_x unless it has a step size of its own."""
        return super().step_size("x" if variable == "y" and self.lr_y is None else variable, t)

    def workload(self) -> Workload:
        """T passes for z, two for y, one for x; the gradients of f and of q in y are held beside their combination."""
        replicas = {name: self.optimizer_z for name in ("y", "z")}
        return Workload(replicas, lower_passes=self.lower_steps + 1, upper_passes=1, lower_forwards=1, vectors=3)
