"""On a nonconvex Φ the mean of ‖∇Φ‖² over K steps falls as 1/K, down to a floor O(1/α²); ‖∇Φ‖ ≤ ε takes O(ε⁻²) steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.problem import Forward, Problem, Shard
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, bound, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms
from bilevel_problems.variables import ParameterVector
from bilevel_theory.instances import default_forms


@dataclass
class SlowTail(Problem[Tensor]):
    """g = ½(y - x)², f = h (1 + y²)^(-q/2): Φ(x) = h (1 + x²)^(-q/2) is so flat far from 0 that descent takes long.

    Gradient descent needs ε^(-(q + 2)/(q + 1)) steps to |Φ'| ≤ ε: as q falls, the worst case of all smooth functions, ε⁻².
    """

    q: float
    start: float = 5.0
    height: float = 1.0

    def upper(self) -> nn.Module:
        """The variable x."""
        return ParameterVector(torch.tensor([self.start]))

    def lower(self) -> nn.Module:
        """The variable y, which starts at y*(x)."""
        return ParameterVector(torch.tensor([self.start]))

    def upper_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        """f."""
        return self.height * ((1 + y() ** 2) ** (-self.q / 2)).sum()

    def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        """g."""
        return 0.5 * ((y() - x()) ** 2).sum()

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        """One empty batch: the losses need no data."""
        return [torch.empty(0)]

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        """One empty batch: the losses need no data."""
        return [torch.empty(0)]

    def slope(self, x: Tensor) -> Tensor:
        """Φ'(x)."""
        return -self.height * self.q * x * (1 + x * x) ** (-self.q / 2 - 1)


class NonconvexRate(Check):
    """A quadratic with a cosine in x, and a function with a slow tail."""

    statement = "(1/K) Σ ‖∇Φ(x_k)‖² = O(1/K) + O(1/α²); ‖∇Φ‖ ≤ ε within O(ε⁻²) steps of x"
    hypotheses = "Φ smooth and bounded below; exact gradients; α fixed, step of x independent of α; y and z keep up"
    source = "Chen, Ma, Zhang 2025 (2306.14853): O~(ε⁻²) gradients, ‖∇Φ‖ ≤ ε"
    standing = "proved"

    def readings(self) -> Iterator[Reading]:
        """Measure the rate in K, in α and in ε."""
        forms = dataclasses.replace(default_forms(), rho=6.0, omega=3.0)
        η = 1 / (float(torch.linalg.eigvalsh(forms.H)[-1]) + forms.rho * forms.omega**2)
        horizon = 200 if self.quick else 400
        penalties = [1e2, 1e3, 1e4]
        paths = self._trajectories(forms, penalties, η, horizon)
        xs = paths[:, -1]
        squares = forms.grad_phi(xs).square().sum(-1)
        counts = [float(k) for k in np.geomspace(25, horizon, 5).round()]
        means = [float(squares[: int(k)].mean()) for k in counts]
        yield exponent(
            "mean ‖∇Φ‖²", "K", counts, means, -1, 0.05,
            "almost all of the sum is in its first steps; the floor is 1e-4 of the smallest mean",
        )  # fmt: skip
        lowest = dataclasses.replace(forms, rho=0.0)
        descent = float(forms.phi(xs[0]) - lowest.phi(lowest.solution()))
        yield bound(
            "mean ‖∇Φ‖² over its bound 2 (Φ(x_0) - min Φ) / (ηK)", means[-1] * η * horizon / (2 * descent), 0.0, 1.0,
            "the bound itself, for a step η ≤ 1/L; min Φ is bounded by that of its quadratic part",
        )  # fmt: skip

        ends = paths[-1]
        yield exponent(
            "‖∇Φ(x_K)‖²", "α", penalties, [float(forms.grad_phi(x).square().sum()) for x in ends], -2, 0.05,
            "the next term of the expansion is 1/α³",
            exact=[float(forms.bias(x, α).square().sum()) for x, α in zip(ends, penalties, strict=True)], allowed=1e-2,
        )  # fmt: skip

        for q, step in ((0.5, 20.0), (0.1, 60.0)) if not self.quick else ((0.5, 20.0),):
            yield self._iterations(q, step)

    def _trajectories(self, forms: QuadraticForms, penalties: Sequence[float], η: float, count: int) -> Tensor:
        """x_0 … x_{count-1} for each penalty. Shape: (count, penalties, m)."""
        solvers = [
            configure(self.solver or ScaleBiO, needs=("penalty", "lr_x"), penalty=α, lr_x=η, lr_z=1.0, lower_steps=2)
            for α in penalties
        ]
        start = torch.full((5,), 2.0, dtype=torch.float64)
        with Session.of_many(Quadratic.of(forms, x=start, y=forms.lower_solution(start)), solvers) as session:
            return torch.stack([_after(session, k > 0) for k in range(count)])

    def _iterations(self, q: float, step: float) -> Reading:
        problem = SlowTail(q)
        solver = configure(self.solver or ScaleBiO, penalty=1e4, lr_x=step, lr_z=1.0)
        with Session(problem, solver) as session:
            slopes = np.array([abs(float(problem.slope(_after(session, k > 0)))) for k in range(1200)])
        targets = np.geomspace(slopes[200], slopes[-1], 8)
        return exponent(
            f"steps to ‖∇Φ‖ ≤ ε, q = {q}", "ε", list(targets), [float(np.argmax(slopes <= ε)) + 1 for ε in targets],
            -(q + 2) / (q + 1), 0.05, "steps count from x = 5, and discrete steps lag behind the flow by log k",
        )  # fmt: skip


def _after(session: Session, move: bool) -> Any:
    if move:
        session.step()
    return session.values("x")
