"""Rounds: ScaleBiO's comparison of two replicas with the weights held, from the same start, again and again.

    min_q Φ_K(q),   Φ_K(q) = f(u_K(q)),   u_K(q) = K steps of training on g(q, ·), from given weights u_0

Pan et al. ("ScaleBiO", ACL 2025, arXiv 2406.19976) move x, y and z in one loop. There x outruns y and z, which still carry
the mixes of earlier steps, so that x passes an optimum inside the simplex and ends in a corner. Here x waits for a round:

    y = z = u_0;   for k < K:  z steps on g(q, z),  y on g(q, y) + f(y)/α     (same minibatches, optimizers and blocks)
    s_i = -α Σ_k ω_k [g_i(y_k) - g_i(z_k)],   ω_k ~ k²,   g_i = ∂g/∂q_i
    q <- the minimizer of a quadratic model of Φ_K, fitted to the signals s of all rounds   (`bilevel.response`)

Why s is minus the gradient of Φ_K, to first order in 1/α: y differs from z by -η/α Σ_s A^(k-1-s) ∇f(z_s), where A = I - ηH
is how a step carries a difference on (for AdamW, with its preconditioner); a change of q_i shifts u_K by
-η Σ_k A^(K-1-k) ∇g_i. The inner product with ∇g_i, or with ∇f, is the same sum, with f acting before g_i instead of after
it. The two agree where the gradients change little over the memory of A; late steps count most for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bilevel.backend import Backend, Variable, Vector
from bilevel.distribution import Distribution
from bilevel.errors import InputError
from bilevel.optimizer import SGD, AdamW, Optimizer
from bilevel.problem import Problem
from bilevel.response import next_distribution
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import report, require_positive


@dataclass(frozen=True)
class Rounds(Solver[State]):
    """Finds the weights that serve K steps of training best. Needs an upper variable that is a `Distribution`.

    It differs from ScaleBiO in four ways: x is held during a round; y and z start every round from the same weights; x moves
    to the minimum of a model of all rounds so far, within a trust region, instead of along the last gradient; and the answer
    is drawn to the prior where the signals are within their noise.

    horizon: K, the steps of a round. The answer is the best mix for that many steps of training from the start, so choose as
        many as change the model noticeably; 20 to 100 for a language model. `run.steps` should be a multiple of it: 8 rounds
        or more give standard errors, 12 a good answer.
    penalty: α. Large enough for y to stay close to z, and so small that their difference is not lost in rounding.
    lr_z: the step size of y and z at step k of a round; that of the training which the weights are for.
    optimizer_z: their optimizer. It starts afresh in every round.
    trust: the most that the logarithm of the odds of two weights changes from one round to the next, divided by 2. It only
        decides how fast an answer can be reached.
    pull: how strongly the answer is drawn to the prior of the distribution, as a share of the largest signals: a source that
        promises a twentieth of what the best one does is not told from the others. To this comes one standard error, so that
        an answer is not made of noise (`bilevel.response.pull_of`).
    folds: into how many folds the data are dealt; round r sees fold r mod folds. Fewer folds are less certain; more have
        fewer rows each.
    """

    horizon: int = 40
    penalty: float = 10.0
    lr_z: Schedule = 1e-5
    optimizer_z: Optimizer = field(default_factory=AdamW)
    trust: float = 1.0
    pull: float = 0.05
    folds: int = 8

    def __post_init__(self) -> None:
        require_positive("penalty", self.penalty)
        require_positive("trust", self.trust)
        if self.horizon < 2:
            raise ValueError(f"horizon must be at least 2 steps, not {self.horizon}: y and z differ only after the first")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, not {self.folds}: what is measured on one fold alone has no error")
        if self.pull < 0:
            raise ValueError(f"pull must be at least 0, not {self.pull}")

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, z, and y as a replica of z. What z is now is where every round starts.

        Raises `InputError` for an upper variable that is no `Distribution`, or has a constraint beside being one.
        """
        if problem.upper_constraint is not None:
            raise InputError(
                "rounds moves the weights of a `bilevel.Distribution` without gradient steps, and knows no "
                "upper_constraint; leave it out (a Distribution is on the simplex as it is), or use scalebio or f2sa"
            )
        x = backend.place("x", problem.upper, SGD(), sharded=False)
        self._distribution(x, backend)
        z = backend.place("z", problem.lower, self.optimizer_z, sharded=True, blocks=problem.blocks)
        y = backend.replicate(z, "y")
        backend.mark(z)
        return State(x, {"y": y, "z": z}, {"tried": [], "signals": [], "signal": None})

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """One step of y and z; after the last one of a round, x moves."""
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        f, g, α = problem.upper_loss, problem.lower_loss, self.penalty
        r, k = divmod(t, self.horizon)
        if k == 0:
            backend.rewind(z)
            backend.assign(y, z)

        index = r // self.folds * self.horizon + k
        shard = replace(backend.shard, fold=(r % self.folds, self.folds))
        ζ, ξ = problem.lower_batch(index, shard), problem.upper_batch(index, shard)
        ω = self.weight(k)
        if k == 0:  # y is still z, and what x gets is not counted yet: one pass gives the gradients of both
            g_y = g_z = backend.backward(lambda b: g(x, z, b), ζ, wrt={z: 1})
            grad_g = backend.take_gradient(z)
            backend.add_gradient(z, grad_g)
            backend.add_gradient(y, grad_g)
            f_y = backend.backward(lambda b: f(x, y, b), ξ, wrt={y: 1 / α})
        else:
            g_z = backend.backward(lambda b: g(x, z, b), ζ, wrt={x: -α * ω, z: 1})
            g_y = backend.backward(lambda b: g(x, y, b), ζ, wrt={x: α * ω, y: 1})
            f_y = backend.backward(lambda b: f(x, y, b), ξ, wrt={x: ω, y: 1 / α})
        lr = at(self.lr_z, k)
        norm_z = backend.step(z, lr=lr)
        backend.step(y, lr=lr)

        found = dict(report(upper=f_y, lower=g_z, gap=g_y - g_z, penalty=α))
        found |= {"grad_norm_z": norm_z, "round": r, "round_step": k, "held": 1.0}
        distribution = self._distribution(x, backend)
        if k > 0:
            seen = distribution.signal(backend.take_gradient(x).parts["logits"]).tolist()
            before = state.memory["signal"] or [0.0] * len(seen)
            state.memory["signal"] = [a + b for a, b in zip(before, seen, strict=True)]
        if k + 1 == self.horizon:
            found |= self._move(state, distribution, backend)
        with torch.no_grad():
            found["average"] = dict(zip(distribution.names, distribution().tolist(), strict=True))
        return found

    def weight(self, k: int) -> float:
        """ω_k: what step k of a round adds to its signal; these sum to 1."""
        K = self.horizon
        return k**2 / ((K - 1) * K * (2 * K - 1) / 6)

    def workload(self) -> Workload:
        """Two replicas; g(z), g(y) and f(y) once a step, at most; beside them, the start of what is active in a round."""
        replicas: dict[str, SGD | AdamW] = {"y": self.optimizer_z, "z": self.optimizer_z}
        return Workload(replicas, lower_passes=2, upper_passes=1, marked=self.horizon)

    def _move(self, state: State, distribution: Distribution, backend: Backend) -> dict[str, Any]:
        """Move x to where the signals of all rounds say that Φ_K is smallest."""
        memory, names = state.memory, distribution.names
        log_q = torch.log_softmax(distribution.logits.detach(), 0).cpu().numpy()
        signal = np.array(memory["signal"])
        memory["tried"].append(np.exp(log_q).tolist())
        memory["signals"].append((signal - signal.mean()).tolist())
        memory["signal"] = None
        following = next_distribution(
            log_q,
            np.array(memory["tried"]),
            np.array(memory["signals"]),
            distribution.prior.cpu().numpy(),
            self.pull,
            self.trust,
        )
        logits = torch.from_numpy(following - following.mean())
        backend.write(state.x, Vector({"logits": logits.to(distribution.logits)}, whole=True))
        return {
            "held": 0.0,
            "tried": dict(zip(names, memory["tried"][-1], strict=True)),
            "signal": dict(zip(names, memory["signals"][-1], strict=True)),
            "prior": dict(zip(names, distribution.prior.tolist(), strict=True)),
            "folds": self.folds,
            "pull": self.pull,
            "floor": distribution.floor,
        }

    def _distribution(self, x: Variable, backend: Backend) -> Distribution:
        module = backend.whole_module(x)
        if isinstance(module, Distribution):
            return module
        raise InputError(
            f"rounds needs an upper variable that is a `bilevel.Distribution`, the weights of named things, not a "
            f"{type(module).__name__}; for weights of rows, and other upper variables, use scalebio or f2sa"
        )
