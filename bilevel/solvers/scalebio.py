"""ScaleBiO: Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting" (ACL 2025, 2406.19976).

    min_{x, y} max_z  f(x, y) + penalty * [g(x, y) - g(x, z)]

y minimizes penalty * g + f, z minimizes g, and x follows the difference of the two: for large penalties its gradient is
that of f(x, y*(x)). The form is that of F2SA (Kwon et al., ICML 2023, arXiv 2301.10945); gradients only, no Hessians.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bilevel.backend import Backend, Evaluation
from bilevel.optimizer import AdamW, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import report, require_positive


@dataclass(frozen=True)
class Flattening:
    """A warm-up that holds x until the lower loss has flattened.

    The warm-up ends when the mean lower loss of the last `window` steps is no longer below the mean of the `window`
    steps before by more than its standard error, and after `at_most` steps in any case.
    """

    window: int = 10
    at_most: int = 50

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be at least 2, not {self.window}")

    def over(self, losses: list[float]) -> bool:
        """Whether the lower losses seen so far end the warm-up."""
        if len(losses) >= self.at_most:
            return True
        if len(losses) < 2 * self.window:
            return False
        before, last = np.array(losses[-2 * self.window : -self.window]), np.array(losses[-self.window :])
        standard_error = np.sqrt((before.var(ddof=1) + last.var(ddof=1)) / self.window)
        return bool(before.mean() - last.mean() <= standard_error)


@dataclass(frozen=True)
class ScaleBiO(Solver[State]):
    """A single-loop first-order method: every step moves z, y and x once.

    penalty: the multiplier of the lower-level gap. A larger one is less biased (the bias is O(1/penalty)) and noisier.
    lr_x, lr_z: step sizes.
    lr_y: step size of y; None takes lr_z. The gradient of y is that of g + f/penalty, so that y and z move with the
        same effective step: then the largest stable lr_x does not shrink as the penalty grows.
    optimizer_x, optimizer_z: how a gradient becomes a step, and whether it is clipped. That of x has a large eps by default,
        so that its steps are in proportion to the gradient up to about 0.01 (nats, for a language model) and bounded by
        lr_x beyond. With the usual eps, AdamW would make full steps of the noise just after the warm-up, when y and z
        still agree, and would drive sources down at the same pace however differently they hurt.
    optimizer_y: None takes that of z, for the same reason as the step size.
    lower_steps: steps of y and z for each step of x, each on a minibatch of its own; the gradient of x is the mean over
        them, which costs nothing more.
    warmup: hold x for this many steps, or until the lower loss has flattened. At the start all sources teach the same
        things (the format, the domain), and the noisiest have the largest gradients; the hypergradient is defined at
        the lower-level optimum, where that shared part has vanished. A warm-up step is one pass instead of three.

    y and z share their start, minibatch, active blocks and optimizer settings, so that what they have in common cancels in
    g(x, y) - g(x, z), which the penalty multiplies.
    """

    penalty: Schedule = 10.0
    lr_x: Schedule = 0.05
    lr_z: Schedule = 1e-5
    lr_y: Schedule | None = None
    optimizer_x: Optimizer = field(default_factory=lambda: AdamW(betas=(0.9, 0.99), eps=1e-2))
    optimizer_z: Optimizer = field(default_factory=AdamW)
    optimizer_y: Optimizer | None = None
    lower_steps: int = 1
    warmup: int | Flattening = field(default_factory=Flattening)

    def __post_init__(self) -> None:
        require_positive("penalty", self.penalty)
        require_positive("lower_steps", self.lower_steps)
        if isinstance(self.warmup, int) and self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, not {self.warmup}")

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, z, and y as a replica of z."""
        x = backend.place("x", problem.upper, self.optimizer_x, sharded=False)
        z = backend.place("z", problem.lower, self.optimizer_z, sharded=True, blocks=problem.blocks)
        y = backend.replicate(z, "y", self.optimizer_y)
        return State(x, {"y": y, "z": z}, {"warm": self.warmup == 0, "warmup_losses": []})

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Move z, y and x, all gradients taken at the same x."""
        if not state.memory["warm"]:
            return self._warm_up(t, state, problem, backend)
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        f, g = problem.upper_loss, problem.lower_loss
        α, lr_z, T = at(self.penalty, t), at(self.lr_z, t), self.lower_steps
        lr_y = lr_z if self.lr_y is None else at(self.lr_y, t)

        gaps, lowers, uppers = [], [], []
        for k in range(T * t, T * (t + 1)):
            ζ, ξ = problem.lower_batch(k, backend.shard), problem.upper_batch(k, backend.shard)
            g_z = backend.backward(lambda b: g(x, z, b), ζ, wrt={x: -α / T, z: 1})
            g_y = backend.backward(lambda b: g(x, y, b), ζ, wrt={x: α / T, y: 1})
            f_y = backend.backward(lambda b: f(x, y, b), ξ, wrt={x: 1 / T, y: 1 / α})
            backend.step(z, lr=lr_z)
            backend.step(y, lr=lr_y)
            gaps.append(g_y - g_z)
            lowers.append(g_z)
            uppers.append(f_y)
        norm_x = backend.step(x, lr=at(self.lr_x, t))

        return report(
            upper=Evaluation.mean(uppers),
            lower=Evaluation.mean(lowers),
            gap=Evaluation.mean(gaps),
            penalty=α,
            grad_norm_x=norm_x,
        )

    def workload(self) -> Workload:
        """Two replicas; g(z), g(y) and f(y) once for each lower step. A step of the warm-up takes a third of that."""
        replicas = {"y": self.optimizer_y or self.optimizer_z, "z": self.optimizer_z}
        return Workload(replicas, lower_passes=2 * self.lower_steps, upper_passes=self.lower_steps)

    def _warm_up(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Train z alone. When the warm-up is over, y starts where z is."""
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        lowers = []
        for k in range(self.lower_steps * t, self.lower_steps * (t + 1)):
            ζ = problem.lower_batch(k, backend.shard)
            lowers.append(backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={z: 1}))
            backend.step(z, lr=at(self.lr_z, t))
        lower = Evaluation.mean(lowers)
        losses = [*state.memory["warmup_losses"], lower.value]
        warm = self.warmup.over(losses) if isinstance(self.warmup, Flattening) else len(losses) >= self.warmup
        if warm:
            backend.assign(y, z)
        state.memory = {"warm": warm, "warmup_losses": [] if warm else losses}
        return {"lower_loss": lower.value, "held": 1.0, "lower_parts": lower.parts}
