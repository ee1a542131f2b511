"""F2SA-p: Chen, Li, Chayti, Zhang, "Faster Gradient Methods for Highly-smooth Stochastic Bilevel Optimization"
(ICLR 2026, arXiv 2509.02937).

With ℓ_ν(x) = min_y ν f(x, y) + g(x, y), the hypergradient is d/dν ∇ℓ_ν(x) at ν = 0. F2SA takes the forward difference of
ν = 0 and ν = 1/λ; this solver a p-th order difference over the nodes jν, whose bias is O(ν^p):

    y_j <- y_j - η_y ∇_y (j ν f + g)(x, y_j)                     K times, for every node j
    x   <- x - η_x Φ / ‖Φ‖,   Φ = Σ_j c_j (j ∇_x f(x, y_j) + ∇_x g(x, y_j) / ν)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from bilevel.backend import Backend, Evaluation
from bilevel.errors import InputError
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import lower_step, place, report, require_positive, require_traits


def difference(p: int) -> dict[int, Fraction]:
    """Node j -> coefficient c_j of the p-th order difference: Σ c_j h(jν) = ν h'(0) + O(ν^(p+1)).

    Nodes are -p/2..p/2 for even p, -(p-1)/2..(p+1)/2 for odd p; those with coefficient 0 are left out. The coefficient is
    the derivative at 0 of the Lagrange polynomial of the node.
    """
    nodes = range(-(p // 2), (p + 1) // 2 + 1)
    c = {}
    for j in (node for node in nodes if node):
        others = [i for i in nodes if i != j]
        c[j] = Fraction(math.prod(-i for i in others if i), math.prod(j - i for i in others))
    c[0] = -sum(c.values(), Fraction(0))
    return {j: c[j] for j in nodes if c[j]}


@dataclass(frozen=True)
class F2SAp(Solver[State]):
    """A p-th order finite difference of the penalty path; p = 1 is F2SA with another step of x.

    p: the order. An odd p needs p + 1 lower variables, an even one p: p = 2 costs what F2SA costs and has bias
        O(1/penalty²).
    penalty: 1/ν. For p > 1 some nodes are negative: g - f * floor(p/2) / penalty must still be convex in y, which takes a
        penalty above floor(p/2) * (curvature of f) / (curvature of g). Below that the lower variables diverge.
    lr_z: step η_y of every lower variable y_j, on g + (j/penalty) f.
    lr_x: η_x.
    lower_steps: K, each on a minibatch of its own that all y_j share.
    normalized: divide the gradient of x by its norm, as in the paper. Off by default: a normalized step of constant length
        never settles.
    """

    p: int = 2
    penalty: Schedule = 10.0
    lr_z: Schedule = 0.1
    lr_x: Schedule = 0.05
    lower_steps: int = 10
    normalized: bool = False
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        for name in ("p", "penalty", "lower_steps"):
            require_positive(name, getattr(self, name))

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x and the y_j. Raises `InputError` if rounding drowns the order p or the problem lacks what it needs."""
        if self.p > 1:  # nodes with j < 0 subtract f from g, and the order p needs as many derivatives
            require_traits(f"f2sa-p with p = {self.p}", problem, smooth=True, strongly_convex=True)
        state = place(problem, backend, [_name(j) for j in difference(self.p)], self.optimizer_x, self.optimizer_z)
        self._check_precision(max(torch.finfo(part.dtype).eps for part in backend.read(state.x).parts.values()))
        return state

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """K steps of every y_j, then one of x, with minibatches of its own."""
        x, λ = state.x, at(self.penalty, t)
        c = {j: float(coefficient) for j, coefficient in difference(self.p).items()}
        last = (self.lower_steps + 1) * (t + 1) - 1
        ζ, ξ = problem.lower_batch(last, backend.shard), problem.upper_batch(last, backend.shard)

        uppers, lowers = [], []
        for j in c:
            y = state.replicas[_name(j)]
            for k in range(last - self.lower_steps, last):
                lower_step(problem, backend, x, y, k, lr=at(self.lr_z, t), tilt=j / λ if j else None)
            lowers.append(backend.backward(partial(problem.lower_loss, x, y), ζ, wrt={x: c[j] * λ}))
            if j:
                uppers.append(backend.backward(partial(problem.upper_loss, x, y), ξ, wrt={x: c[j] * j}))
        if self.normalized:
            Φ = backend.take_gradient(x)
            backend.add_gradient(x, Φ, (backend.dot(Φ, Φ) or 1.0) ** -0.5)
        norm = backend.step(x, lr=at(self.lr_x, t))
        return report(
            upper=_sum([j * c[j] for j in c if j], uppers),
            lower=Evaluation.mean(lowers),
            gap=_sum(list(c.values()), lowers),
            penalty=λ,
            grad_norm_x=norm,
        )

    def workload(self) -> Workload:
        """T passes of g for each y_j and, but for j = 0, of f; then one of each for x. One y_j at a time has a gradient."""
        nodes = difference(self.p)
        replicas = {_name(j): self.optimizer_z for j in nodes}
        tilted = sum(j != 0 for j in nodes)
        return Workload(
            replicas,
            lower_passes=self.lower_steps * len(nodes),
            upper_passes=self.lower_steps * tilted,
            lower_forwards=len(nodes),
            upper_forwards=tilted,
            vectors=1,
            savings=("a lower order (solver.p)",) if self.p > 2 else (),
        )

    def _check_precision(self, eps: float) -> None:
        """The error of order p - 1, about penalty^-(p-1), must still be above the rounding error, penalty * eps * Σ|c_j|."""
        λ, total = at(self.penalty, 0), float(sum(map(abs, difference(self.p).values())))
        highest = (eps * total) ** (-1 / self.p)
        if λ > highest:
            raise InputError(
                f"f2sa-p, p = {self.p}, penalty {λ:g}: a difference of that order drowns in rounding errors of {eps:.1e}; "
                f"lower the penalty to at most {highest:.2g}, lower p, or use float64"
            )


def _name(j: int) -> str:
    return f"y{j:+d}"


def _sum(weights: Sequence[float], evaluations: Sequence[Evaluation]) -> Evaluation:
    pairs = list(zip(weights, evaluations, strict=True))
    parts = {key: sum(w * e.parts[key] for w, e in pairs) for key in evaluations[0].parts}
    return Evaluation(sum(w * e.value for w, e in pairs), parts)
