"""F2SA: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization" (ICML 2023, 2301.10945).

    z <- z - γ_k ∇_y g(x, z)                                     T times
    y <- y - α_k (∇_y f(x, y) + λ_k ∇_y g(x, y))                 T times
    x <- x - ξ α_k (∇_x f(x, y) + λ_k (∇_x g(x, y) - ∇_x g(x, z)))

λ_k = γ_k / (2 α_k) grows slowly while the steps shrink: the bias O(1/λ) and the noise, which λ multiplies, vanish together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bilevel.backend import Backend
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Power, Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import lower_step, place, report, require_positive

EXPONENTS = {"both": (5 / 7, 4 / 7), "upper": (3 / 5, 2 / 5), "none": (1 / 3, 0.0)}


@dataclass(frozen=True)
class F2SA(Solver[State]):
    """A growing penalty and shrinking steps; with lower_steps = 1 a single loop.

    penalty: λ_k.
    lr_z: γ_k.
    lr_y: step of y on g + f/λ_k, which is λ_k α_k; None takes γ_k / 2, the paper's choice.
    lr_x: None takes α_k = lr_y / λ_k (ξ = 1).
    lower_steps: T, each on a minibatch of its own; y and z share it, so that their common noise cancels.

    The defaults are the schedule for noise in both levels: α_k ~ k^-a, γ_k ~ k^-c, λ_k ~ k^(a-c) with a = 5/7, c = 4/7, the
    exponents for which bias² and noise fall alike, as K^(-2/7). Where only f is noisy a = 3/5, c = 2/5 give K^(-2/5), and
    without noise a = 1/3, c = 0 give K^(-2/3); see `for_noise`. Under noise a penalty that grows faster does not converge.
    """

    penalty: Schedule = field(default_factory=lambda: Power(10.0, 1 / 7, scale=100.0))
    lr_z: Schedule = field(default_factory=lambda: Power(0.1, -4 / 7, scale=100.0))
    lr_y: Schedule | None = None
    lr_x: Schedule | None = None
    lower_steps: int = 1
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    @classmethod
    def for_noise(
        cls,
        noise: Literal["both", "upper", "none"],
        *,
        penalty: float = 10.0,
        lr_z: float = 0.1,
        xi: float = 1.0,
        scale: float = 100.0,
        lower_steps: int = 1,
    ) -> F2SA:
        """The schedule for noise in both levels, in f alone, or in none.

        penalty, lr_z: λ and γ at step 0.
        xi: ξ, the ratio of the step of x to α_k.
        scale: the number of steps after which the powers set in.
        """
        a, c = EXPONENTS[noise]
        return cls(
            penalty=Power(penalty, a - c, scale),
            lr_z=Power(lr_z, -c, scale),
            lr_x=Power(xi * lr_z / (2 * penalty), -a, scale),
            lower_steps=lower_steps,
        )

    def __post_init__(self) -> None:
        require_positive("penalty", self.penalty)
        require_positive("lower_steps", self.lower_steps)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, y and z."""
        return place(problem, backend, ("y", "z"), self.optimizer_x, self.optimizer_z)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """T steps of z and y, then one of x at the new z and y, with minibatches of its own."""
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        f, g = problem.upper_loss, problem.lower_loss
        λ, γ = at(self.penalty, t), at(self.lr_z, t)
        lr_y = γ / 2 if self.lr_y is None else at(self.lr_y, t)
        lr_x = lr_y / λ if self.lr_x is None else at(self.lr_x, t)

        last = (self.lower_steps + 1) * (t + 1) - 1
        for k in range(last - self.lower_steps, last):
            lower_step(problem, backend, x, z, k, lr=γ)
            lower_step(problem, backend, x, y, k, lr=lr_y, tilt=1 / λ)

        ζ, ξ = problem.lower_batch(last, backend.shard), problem.upper_batch(last, backend.shard)
        g_z = backend.backward(lambda b: g(x, z, b), ζ, wrt={x: -λ})
        g_y = backend.backward(lambda b: g(x, y, b), ζ, wrt={x: λ})
        f_y = backend.backward(lambda b: f(x, y, b), ξ, wrt={x: 1})
        norm = backend.step(x, lr=lr_x)
        return report(upper=f_y, lower=g_z, gap=g_y - g_z, penalty=λ, grad_norm_x=norm)

    def workload(self) -> Workload:
        """T passes for z and 2 T for y, of which one at a time has a gradient; then three for x."""
        replicas = {name: self.optimizer_z for name in ("y", "z")}
        T = self.lower_steps
        return Workload(replicas, lower_passes=2 * T, upper_passes=T, lower_forwards=2, upper_forwards=1, vectors=1)
