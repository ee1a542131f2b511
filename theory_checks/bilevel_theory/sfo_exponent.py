"""Samples to ‖∇Φ‖ ≤ ε: ε^-(4 + 2/p) for a p-th order difference, from what one x-gradient costs in bias and noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bilevel.data import Stream, generator
from bilevel.problem import Forward
from bilevel.solvers.f2sa_p import F2SAp, difference
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, exponent, number
from bilevel_problems.quadratic import Noise, Quadratic
from bilevel_theory.instances import default_forms, random_x

SAMPLES = 4
"""S in the runs of the solver."""

RANGES = {1: (400.0, 6000.0), 2: (100.0, 900.0), 4: (35.0, 160.0)}
"""p -> penalties between which the best one lies for 1e8 to 1e11 samples."""


@dataclass
class FreshNoise(Quadratic):
    """The quadratic problem with noise that is drawn anew at every evaluation of a loss.

    Bounded variance, which is all that the claim assumes, says nothing about how the gradients of one sample at two points
    are related. Independent draws are the case in which nothing cancels between the nodes of a difference.

    draws: the seed of the noise.
    """

    draws: int = 0
    evaluations: int = field(default=0, init=False)

    def upper_loss(self, x: Forward, y: Forward, batch: Noise) -> Tensor:
        """f, with noise of its own."""
        return super().upper_loss(x, y, self._fresh(batch, self.upper_noise))

    def lower_loss(self, x: Forward, y: Forward, batch: Noise) -> Tensor:
        """g, with noise of its own."""
        return super().lower_loss(x, y, self._fresh(batch, self.lower_noise))

    def _fresh(self, batch: Noise, deviation: float) -> Noise:
        self.evaluations += 1
        random = generator(self.draws, Stream.NOISE, self.evaluations)
        return self._noise(deviation * random.standard_normal((batch.size, *self._shape(self.m + self.n))))


class SFOExponent(Check):
    """With S samples for each node the best ν balances bias² ~ ν^2p and variance ~ 1/(ν² S): error² ~ S^(-p/(p+1)).

    The solver takes steps of x at the exact solutions of its lower problems. The bias and the variance of the x-gradient
    that it uses are measured at every penalty, and compared with their formulas; that of the variance is
    (1/S) Σ_j c_j² (j² + α²) a coordinate, for noise of variance 1. The rest is a calculation from these
    measured values: the variance with S samples is 1/S of that with one, the best penalty is searched on the grid, and an
    error ε, which takes S ~ ε^(-2(p+1)/p) samples, has to be reached at each of the ε⁻² steps of x. That number of steps is
    not measured here, and neither are the samples that the lower problems take.
    """

    statement = "O~(ε^-(4 + 2/p)) stochastic gradients to ‖∇Φ‖ ≤ ε: 6, 5, 4.5 for p = 1, 2, 4"
    hypotheses = "g strongly convex; p + 2 Lipschitz derivatives in y; independent samples of bounded variance at each node"
    source = "Chen, Li, Chayti, Zhang 2026 (2509.02937), Theorem 3.1"
    standing = "proved"
    specific = "about the order p of f2sa-p"

    def readings(self) -> Iterator[Reading]:
        """Measure bias and variance of the solver's x-gradient, and calculate the best error for numbers of samples."""
        forms, x = default_forms(), random_x(5)
        samples = np.geomspace(1e8, 1e11, 5)
        copies = 400 if self.quick else 800
        for p in (1, 2, 4):
            c = {j: float(weight) for j, weight in difference(p).items()}
            penalties = [float(α) for α in np.geomspace(*RANGES[p], 12 if self.quick else 24)]
            biases = self._gradients(Quadratic.of(forms, x=x), p, penalties)[:, 0] - forms.grad_phi(x)
            exact = torch.stack([forms.difference_bias(x, α, c) for α in penalties])
            yield Reading(
                f"bias of the solver's x-gradient, p = {p}",
                deviation=float(((biases - exact).norm(dim=-1) / exact.norm(dim=-1)).max()),
                allowed=1e-3,
                because="rounding errors of 1e-16 are multiplied by α and compared with a bias of O(α^-p)",
            )
            noisy = FreshNoise.of(
                forms, x=x.expand(copies, -1), y=torch.zeros(copies, 8).double(), copies=copies,
                upper_noise=1.0, lower_noise=1.0, batch_size=SAMPLES, draws=self.seed,
            )  # fmt: skip
            variances = SAMPLES * self._gradients(noisy, p, penalties).var(1).sum(-1)
            formula = [len(x) * sum((j * w) ** 2 + (α * w) ** 2 for j, w in c.items()) for α in penalties]
            yield number(
                f"variance of the solver's x-gradient over its formula, p = {p}",
                float((variances / torch.tensor(formula)).mean()), 1.0, 0.05,
                f"{copies} copies at {len(penalties)} penalties: a sampling error of about 1 %",
            )  # fmt: skip
            squares = biases.square().sum(-1)
            best = [float((squares + variances / S).min()) for S in samples]
            reading = exponent(
                f"best squared error, p = {p}", "S", list(samples), best, -p / (p + 1), 0.03,
                "calculated from the measured bias and variance; the best of a grid of ν, with a sampling error of 1 %",
            )  # fmt: skip
            yield reading
            assert reading.measured is not None
            yield number(
                f"exponent of 1/ε, p = {p}", 2 - 2 / reading.measured, 4 + 2 / p, 0.03, "follows from the exponent above"
            )

    def _gradients(self, problem: Quadratic, p: int, penalties: Sequence[float]) -> Tensor:
        """The solver's gradient of x at the exact lower solutions, for every penalty and copy."""
        chosen = configure(
            self.solver or F2SAp,
            needs=("p", "penalty"),
            p=p,
            penalty=lambda t: penalties[t],
            lr_x=1.0,
            lr_z=0.0,
            lower_steps=1,
        )
        forms, x, gradients = problem.forms, problem.start_x, []
        with Session(problem, chosen, seed=self.seed) as session:
            for α in penalties:
                session.put("x", {"value": x})
                for j in difference(p):
                    y = forms.penalized_solution(x, α / j) if j else forms.lower_solution(x)
                    session.put(f"y{j:+d}", {"value": y})
                session.step()
                gradients.append(x - session.values("x"))
        return torch.stack(gradients).reshape(len(penalties), -1, x.shape[-1])
