"""BOME's KKT residual falls at least as K^(-1/4), and x comes to the solution itself: there is no bias of a penalty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel.solvers.bome import BOME
from bilevel.testing.session import NotApplicable, Session, configure
from bilevel.verify.claims import Check, Reading, agreement, exponent
from bilevel_problems.quadratic import Quadratic
from bilevel_theory.instances import noisy_forms
from bilevel_theory.penalties import QuadraticPenalty, upper_gradient

FASTEST = 4 / 3
"""The step at which gradient descent on a lower level with curvature ½ … 1 is fastest."""


class BOMERate(Check):
    """Runs of several lengths K, each with the step that belongs to its length; residuals in closed form.

    The residual is min ‖∇f + λ∇q‖² + q over λ ≥ 0, with the exact gap q = g - g* in place of the solver's own. With a
    constant step it does not vanish: near the end λ is large, y overshoots by the order of the step, and q stays at the
    order of its square. Shorter steps for longer runs are therefore part of the claim.
    """

    statement = (
        "min over k ≤ K of (min_λ ‖∇f + λ∇q‖² + q) = O(K^(-1/4)); ‖x_K - x*‖ = O(K^(-1/2)), where Φ is strongly convex"
    )
    hypotheses = "g strongly convex in y; exact gradients; step K^(-1/2); T so large that exp(-bT) does not count"
    source = "Liu, Ye, Wright, Stone, Liu 2022 (2209.08709); K^(-1/4) as remembered, not compared with the paper"
    standing = "derived"

    def readings(self) -> Iterator[Reading]:
        """Measure the best residual, the distance of x from the solution and the violation for several K."""
        chosen: Any = self.solver or BOME
        if not issubclass(chosen, BOME):
            raise NotApplicable(f"{chosen.__name__} is not BOME")
        reached, exact = self._twenty_steps(chosen)
        yield agreement(
            "(x, y) after 20 steps", reached, exact, 1e-9,
            "the same updates, written from the paper; λ divides by ‖∇q‖², which loses digits",
        )  # fmt: skip
        Ks = [40, 80, 160, 320] if self.quick else [40, 80, 160, 320, 480]
        runs = [self._run(chosen, K) for K in Ks]
        because = "an upper bound: on an instance with a strongly convex Φ a faster fall is right"
        yield exponent(
            "best KKT residual", "K", Ks, [residual for residual, _, _ in runs], -1 / 4, 0.0, because, at_most=True
        )
        yield exponent("‖x_K - x*‖", "K", Ks, [distance for _, distance, _ in runs], -1 / 2, 0.0, because, at_most=True)
        yield exponent(
            "g - g* at the end", "K", Ks, [gap for _, _, gap in runs], -1, 0.35,
            "q is of the order of the squared step, 1/K, with a factor that depends on where the last overshoot was",
        )  # fmt: skip

    def _run(self, chosen: type[BOME], K: int) -> tuple[float, float, float]:
        """The best KKT residual of a run of K steps, and its last ‖x - x*‖ and g - g*."""
        forms, gap = noisy_forms(), QuadraticPenalty.value_gap(noisy_forms())
        start = forms.solution() + 1.0
        residuals = []
        solver = configure(chosen, lr_x=K**-0.5, eta=0.5, lr_z=FASTEST, lower_steps=4)
        with Session(Quadratic.of(forms, x=start, y=forms.lower_solution(start)), solver) as session:
            for _ in range(K):
                session.step()
                x, y = session.values("x"), session.values("y")
                grad_f, grad_q = torch.cat(upper_gradient(forms, x, y)), torch.cat(gap.gradient(x, y))
                λ = max(-float(grad_f @ grad_q) / float(grad_q @ grad_q), 0.0)
                residuals.append(float((grad_f + λ * grad_q).square().sum()) + gap.value(x, y))
        return min(residuals), float((x - forms.solution()).norm()), gap.value(x, y)

    def _twenty_steps(self, chosen: type[BOME]) -> tuple[Tensor, Tensor]:
        """(x, y) after 20 steps of the solver, and after 20 steps of the published updates in closed form."""
        forms, η, ξ, T = noisy_forms(), 0.5, 0.1, 3
        x = forms.solution() + 1.0
        y = forms.lower_solution(x)
        with Session(Quadratic.of(forms, x=x, y=y), configure(chosen, lr_x=ξ, eta=η, lr_z=0.5, lower_steps=T)) as session:
            session.step(20)
            reached = torch.cat([session.values("x"), session.values("y")])
        shrink = torch.linalg.matrix_power(torch.eye(2).double() - 0.5 * forms.A, T)
        for _ in range(20):
            away = y - forms.lower_solution(x)
            grad_f = upper_gradient(forms, x, y)
            grad_q = forms.C.T @ (away - shrink @ away), forms.A @ away
            f_q, q_q = (float(sum(u @ v for u, v in zip(a, grad_q, strict=True))) for a in (grad_f, grad_q))
            λ = max(η - f_q / q_q, 0.0) if q_q > 0 else 0.0
            x, y = x - ξ * (grad_f[0] + λ * grad_q[0]), y - ξ * (grad_f[1] + λ * grad_q[1])
        return reached, torch.cat([x, y])
