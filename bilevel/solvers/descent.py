"""Gradient descent on the lower level alone, with x held where it starts: plain training.

    z <- z - lr * ∇_z g(x, z)

This is the lower half of every solver here, so a model is fine-tuned with the same backends, blocks, data and checkpoints
with which its data was weighted. The upper loss is evaluated on the way, and moves nothing.
"""

from dataclasses import dataclass, field
from typing import Any

from bilevel.backend import Backend, Evaluation
from bilevel.optimizer import AdamW, Optimizer
from bilevel.problem import Problem, Shard
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import place, require_positive


@dataclass(frozen=True)
class Descent(Solver[State]):
    """Train the lower variable.

    lr: step size.
    optimizer: AdamW by default, with gradients clipped at norm 1, so that one unusual batch cannot ruin a tuned model.
    evaluate_every: steps between two evaluations of the upper loss; the first is before step 0. A problem without upper
        data (its upper batches are empty) is not evaluated.
    evaluation_batches: the number of upper batches in one evaluation, counted from batch 0: they are always the same, so
        that the points of the curve can be compared.
    """

    lr: Schedule = 1e-5
    optimizer: Optimizer = field(default_factory=lambda: AdamW(clip=1.0))
    evaluate_every: int = 50
    evaluation_batches: int = 8

    def __post_init__(self) -> None:
        require_positive("evaluate_every", self.evaluate_every)
        require_positive("evaluation_batches", self.evaluation_batches)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x and z."""
        return place(problem, backend, ("z",), self.optimizer, self.optimizer)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Evaluate the upper loss where that is due, then move z."""
        x, z, lr = state.x, state.replicas["z"], at(self.lr, t)
        evaluated = self._evaluate(state, problem, backend) if t % self.evaluate_every == 0 else {}
        ζ = problem.lower_batch(t, backend.shard)
        g = backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={z: 1})
        norm = backend.step(z, lr=lr)
        return {**evaluated, "held": 1.0, "lower_loss": g.value, "lower_parts": g.parts, "lr": lr, "grad_norm": norm}

    def workload(self) -> Workload:
        """One pass, and the evaluations, which are spread over the steps between them."""
        share = self.evaluation_batches / self.evaluate_every
        return Workload({"z": self.optimizer}, lower_passes=1, upper_forwards=share)

    def _evaluate(self, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        if not problem.upper_batch(0, Shard(backend.shard.seed)):  # the batch of all processes, which must agree on it
            return {}
        x, z = state.x, state.replicas["z"]
        upper = Evaluation.mean(
            [
                backend.evaluate(lambda b: problem.upper_loss(x, z, b), problem.upper_batch(k, backend.shard))
                for k in range(self.evaluation_batches)
            ]
        )
        return {"upper_loss": upper.value, "upper_parts": upper.parts}
