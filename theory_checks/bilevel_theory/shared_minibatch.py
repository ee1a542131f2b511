"""If y and z share their minibatch, the noise of x's gradient does not grow with the penalty; otherwise it grows as α²."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.solver import Solver
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, exponent
from bilevel_problems.ridge_reweighting import RidgeReweighting


class SharedMinibatch(Check):
    """y and z are at their solutions, and x is at its start; only the minibatch differs from step to step."""

    statement = "Var[α (∇_x g(y; ζ) - ∇_x g(z; ζ'))] is O(1) in α for ζ' = ζ, and O(α²) for independent ζ, ζ'"
    hypotheses = "∇_x g(·; ζ) Lipschitz in y for every sample, not only on average; ‖y - z‖ = O(1/α)"
    source = "role of stochastic smoothness in Kwon, Kwon, Lyu 2024 (2402.07101): ε⁻⁴ with it, ε⁻⁶ without"
    standing = "derived"
    any_solver = True

    def readings(self) -> Iterator[Reading]:
        """Measure the variance of the solver's own step of x over minibatches, for several penalties."""
        penalties = [10.0, 100.0, 1000.0, 10000.0]
        count = 50 if self.quick else 200
        solver = self.solver or ScaleBiO
        gradients = [self._gradients(solver, α, count) for α in penalties]
        yield exponent(
            "variance of the solver's x-gradient", "α", penalties, [_variance(g) for g in gradients], 0, 0.1,
            "y - z is 1/α up to 1/α², which counts at α = 10", at_most=self.general,
        )  # fmt: skip
        if self.general:
            return
        apart = [self._independent(α, count) for α in penalties]
        yield exponent(
            "with independent minibatches", "α", penalties, apart, 2, 0.1, "the solver's own noise counts at α = 10"
        )

    def _gradients(self, solver: type[Solver[Any]], α: float, count: int) -> Sequence[Tensor]:
        problem = RidgeReweighting(batch_size=20)
        x = torch.zeros(len(problem.names), dtype=torch.float64)
        chosen = configure(solver, needs=("penalty", "lr_x", "lr_z"), penalty=α, lr_x=1.0, lr_z=0.0, lr_y=0.0, lower_steps=1)
        gradients = []
        with Session(problem, chosen, seed=self.seed) as session:
            session.put("y", {"value": problem.penalized_solution(x, α)})
            session.put("z", {"value": problem.lower_solution(x)})
            for _ in range(count):
                session.put("x", {"logits": x})
                session.step()
                gradients.append(x - session.values("x"))
        return gradients

    def _independent(self, α: float, count: int) -> float:
        """The variance of the same gradient with one minibatch for y and another for z."""
        problem = RidgeReweighting(batch_size=20)
        gradients = []
        with Session(problem, configure(ScaleBiO, penalty=α), seed=self.seed) as session:
            backend, state = session.backend, session.state
            x, y, z = state.x, state.replicas["y"], state.replicas["z"]
            start = session.values("x")
            session.put("y", {"value": problem.penalized_solution(start, α)})
            session.put("z", {"value": problem.lower_solution(start)})
            for k in range(count):
                ζ, other = (problem.lower_batch(index, backend.shard) for index in (k, k + count))
                backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={x: α})
                backend.backward(lambda b: problem.lower_loss(x, z, b), other, wrt={x: -α})
                gradients.append(backend.take_gradient(x).parts["logits"])
        return _variance(gradients)


def _variance(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack(list(gradients)).var(0).sum())
