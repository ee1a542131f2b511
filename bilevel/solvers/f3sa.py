"""F3SA: F2SA with momentum; Kwon, Kwon, Wright, Nowak (ICML 2023, arXiv 2301.10945), same paper as F2SA.

Every gradient that F2SA uses is replaced by a running estimate (STORM momentum), for example that of ∇_y g(x, z)

    h_k = ∇_y g(x_k, z_k; ζ_k) + (1 - η_k) (h_{k-1} - ∇_y g(x_{k-1}, z_{k-1}; ζ_k))

with the same minibatch at the new and the old point: what has been averaged so far is carried along as the point moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bilevel.backend import Backend, Evaluation, Variable, Vector
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Power, Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import place, report, require_positive

EXPONENTS = {"both": (3 / 5, 2 / 5), "upper": (1 / 2, 1 / 4), "none": (1 / 3, 0.0)}
OF_LOWER = ("h_gz", "h_gy", "h_fy")
OF_X = ("h_gx", "h_fx")


@dataclass
class Remembered(State):
    """The state of F3SA, with the previous points and the gradient estimates.

    copies: variables that are replicas of x: its previous value and the estimates of its gradients.
    """

    copies: dict[str, Variable] = field(default_factory=dict)

    @property
    def variables(self) -> list[Variable]:
        """x, the replicas and the copies of x."""
        return [*super().variables, *self.copies.values()]


@dataclass(frozen=True)
class F3SA(Solver[Remembered]):
    """F2SA with variance-reduced gradients; a single loop.

    penalty: λ_k.
    lr_z: γ_k.
    lr_y: step of y on g + f/λ_k; None takes γ_k / 2.
    lr_x: None takes α_k = lr_y / λ_k.
    momentum: η_k, the weight of the new gradient; 1 means no momentum.

    f and g have separate estimates, since λ_k changes. When the active blocks change, all estimates start afresh.
    The defaults are for noise in both levels: α_k ~ k^-a, γ_k ~ k^-c, λ_k ~ k^(a-c), η_k ~ k^-2c with a = 3/5, c = 2/5, the
    exponents for which bias² and noise fall alike, as K^(-2/5) (F2SA: K^(-2/7)); see `for_noise`. All three move from the
    same point with the same minibatch, so that a step is three gradients there and three at the point before.
    """

    penalty: Schedule = field(default_factory=lambda: Power(10.0, 1 / 5, scale=100.0))
    lr_z: Schedule = field(default_factory=lambda: Power(0.1, -2 / 5, scale=100.0))
    lr_y: Schedule | None = None
    lr_x: Schedule | None = None
    momentum: Schedule = field(default_factory=lambda: Power(1.0, -4 / 5, scale=100.0))
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
    ) -> F3SA:
        """The schedule for noise in both levels, in f alone, or in none; arguments as for `F2SA.for_noise`."""
        a, c = EXPONENTS[noise]
        return cls(
            penalty=Power(penalty, a - c, scale),
            lr_z=Power(lr_z, -c, scale),
            lr_x=Power(xi * lr_z / (2 * penalty), -a, scale),
            momentum=Power(1.0, -2 * c, scale),
        )

    def __post_init__(self) -> None:
        require_positive("penalty", self.penalty)
        if at(self.momentum, 0) > 1:
            raise ValueError(f"momentum must be at most 1, not {self.momentum}")

    def init(self, problem: Problem[Any], backend: Backend) -> Remembered:
        """Place x, y and z, their previous values, and the estimates."""
        state = place(problem, backend, ("y", "z", "y_before", "z_before"), self.optimizer_x, self.optimizer_z)
        y, x = state.replicas["y"], state.x
        estimates = {name: backend.replicate(y, name, SGD()) for name in OF_LOWER}
        copies = {"x_before": backend.replicate(x, "x_before"), **{h: backend.replicate(x, h, SGD()) for h in OF_X}}
        for copy in copies.values():
            backend.activate(copy, x.active)
        return Remembered(x, state.replicas | estimates, {"active": []}, copies)

    def step(self, t: int, state: Remembered, problem: Problem[Any], backend: Backend) -> Metrics:
        """Update the estimates at (x, y, z), then move all three."""
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        before = state.copies["x_before"], state.replicas["y_before"], state.replicas["z_before"]
        λ, γ, η = at(self.penalty, t), at(self.lr_z, t), at(self.momentum, t)
        lr_y = γ / 2 if self.lr_y is None else at(self.lr_y, t)
        lr_x = lr_y / λ if self.lr_x is None else at(self.lr_x, t)

        h, (f_y, g_y, g_z) = _gradients(t, x, y, z, problem, backend)
        held = {**state.replicas, **state.copies}
        if state.memory["active"] == sorted(y.active):
            old, _ = _gradients(t, *before, problem, backend)
            h = {name: h[name] + (1 - η) * (backend.read(held[name]) - old[name]) for name in h}
        for name in h:
            backend.write(held[name], h[name])
        for previous, current in zip(before, (x, y, z), strict=True):
            backend.assign(previous, current)
        state.memory = {"active": sorted(y.active)}

        backend.add_gradient(z, h["h_gz"])
        backend.add_gradient(y, h["h_gy"] + 1 / λ * h["h_fy"])
        backend.add_gradient(x, h["h_fx"] + λ * h["h_gx"])
        backend.step(z, lr=γ)
        backend.step(y, lr=lr_y)
        norm = backend.step(x, lr=lr_x)
        return report(upper=f_y, lower=g_z, gap=g_y - g_z, penalty=λ, grad_norm_x=norm)

    def step_size(self, variable: str, t: int) -> tuple[str, float] | None:
        """Estimates and earlier points have none: they are written."""
        return super().step_size(variable, t) if variable in ("x", "y", "z") else None

    def workload(self) -> Workload:
        """Three gradients at the new point and three at the old one, which are held together with the renewed estimates."""
        replicas = {name: self.optimizer_z for name in ("y", "z", "y_before", "z_before")}
        estimates = {name: SGD() for name in OF_LOWER}
        return Workload(
            replicas | estimates,
            lower_passes=4,
            upper_passes=2,
            vectors=9,
            savings=("a solver without momentum (f2sa), which holds two lower variables in place of seven",),
        )


def _gradients(
    t: int, x: Variable, y: Variable, z: Variable, problem: Problem[Any], backend: Backend
) -> tuple[dict[str, Vector], tuple[Evaluation, Evaluation, Evaluation]]:
    """The gradients of f(x, y), g(x, y) and g(x, z), and their values, with the minibatches of step t."""
    ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)
    g_z = backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={x: -1, z: 1})
    g_y = backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={x: 1, y: 1})
    h = {"h_gz": backend.take_gradient(z), "h_gy": backend.take_gradient(y), "h_gx": backend.take_gradient(x)}
    f_y = backend.backward(lambda b: problem.upper_loss(x, y, b), ξ, wrt={x: 1, y: 1})
    h |= {"h_fy": backend.take_gradient(y), "h_fx": backend.take_gradient(x)}
    return h, (f_y, g_y, g_z)
