"""Training a random part of the blocks at a time takes blocks/active times as many steps, and changes no result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bilevel.active import LISA, Active, All
from bilevel.solvers.scalebio import ScaleBiO
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, exponent, number
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms
from bilevel_theory.instances import mild_forms

BLOCKS = 8


class BlockSampling(Check):
    """Lower steps to a given accuracy, with x held; and the point where the method ends with half of the blocks active."""

    statement = "with q of B blocks active, lower steps grow by B/q; fixed points and their O(1/α) distance from x* stay"
    hypotheses = "g strongly convex; blocks drawn uniformly, the same for y and z; steps small against 1/λ"
    source = "E‖e‖² contracts by 1 - (q/B)(1 - (1 - ηλ)²) a step; the sampling is that of LISA (2403.17919)"
    standing = "derived"
    specific = "about steps that keep pace with block sampling"

    def readings(self) -> Iterator[Reading]:
        """The increase in steps for 4, 2 and 1 of 8 blocks, and the end points for half of the blocks."""
        seeds = 1 if self.quick else 3
        full = self._lower_steps(All(), [0])
        for q in (4, 2, 1):
            steps = self._lower_steps(LISA(blocks=q, period=1), range(seeds))
            exact = math.log(1 - SHRINK) / math.log(1 - q / BLOCKS * SHRINK)
            yield number(
                f"lower steps, {q} of {BLOCKS} blocks over all", steps / full, exact, 0.25 if self.quick else 0.15,
                f"{seeds} draws of the masks: the error is 3 % where one block is active at a time, and more in few draws",
            )  # fmt: skip

        forms = mild_forms()
        solution = forms.solution()
        curvature = float(torch.linalg.eigvalsh(forms.H)[-1])
        penalties = [1e2, 1e3, 1e4]
        ends = self._ends(forms, solution, penalties, 0.4 / curvature)
        yield exponent(
            "‖x_∞ - x*‖, 2 of 4 blocks", "α", penalties, [float((x - solution).norm()) for x in ends], -1, 0.05,
            "the next term of the expansion is 1/α²",
            exact=[float(forms.penalized_shift(α).norm()) for α in penalties], allowed=1e-3,
        )  # fmt: skip

    def _lower_steps(self, active: Active, seeds: range | list[int]) -> float:
        """The steps until the root mean square error over seeds is a hundredth of that at the start. Only z trains."""
        errors = torch.stack([self._errors(active, seed) for seed in seeds]).mean(0)
        below = (errors <= 1e-4 * errors[0]).nonzero()
        if len(below) == 0:
            raise ValueError(f"after {len(errors) - 1} steps with {active} the lower level is not solved")
        return float(below[0])

    def _errors(self, active: Active, seed: int) -> Tensor:
        identity = torch.eye(BLOCKS, dtype=torch.float64)
        zero = torch.zeros(BLOCKS, dtype=torch.float64)
        forms = QuadraticForms(
            A=identity, B=identity, C=identity, D=identity, E=identity, Q=identity, b=zero, d=zero, q=zero, t=zero
        )  # fmt: skip
        solver = configure(self.solver or ScaleBiO, lr_z=RATE, lr_x=0.0, warmup=10**9)
        problem = Quadratic.of(forms, x=zero, y=torch.ones(BLOCKS).double(), split=BLOCKS)
        errors = [torch.tensor(float(BLOCKS)).double()]
        share = getattr(active, "blocks", BLOCKS) / BLOCKS
        with Session(problem, solver, seed=seed, active=active) as session:
            for _ in range(round(60 / share)):
                session.step()
                errors.append(session.values("z").square().sum())
        return torch.stack(errors)

    def _ends(self, forms: QuadraticForms, solution: Tensor, penalties: Sequence[float], lr_x: float) -> Tensor:
        solvers = [
            configure(self.solver or ScaleBiO, penalty=α, lr_x=lr_x, lr_z=1.0, lower_steps=2) for α in penalties
        ]  # fmt: skip
        problem = Quadratic.of(forms, x=solution, y=forms.lower_solution(solution), split=4)
        with Session.of_many(problem, solvers, active=LISA(blocks=2, period=1)) as session:
            session.step(300)
            return session.values("x")


RATE = 0.1
SHRINK = 1 - (1 - RATE) ** 2
"""Every curvature is 1: a step reduces an active block's squared error by this share of it."""
