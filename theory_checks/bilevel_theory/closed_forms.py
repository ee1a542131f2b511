"""The closed forms by which the other claims are measured, compared with their definitions as minima and derivatives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bilevel.solvers.f2sa_p import difference
from bilevel.testing.hypergradient import hypergradient, minimize
from bilevel.verify.claims import Check, Reading, agreement
from bilevel_problems.cubic_bias import CubicBias
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms
from bilevel_problems.ridge_reweighting import RidgeReweighting
from bilevel_theory.instances import random_x

PRECISE = "float64, of which at most four digits are lost"
DIFFERENCED = "central differences of step 1e-4: their error is 1e-8, and rounding 1e-12 over 1e-4"


class ClosedForms(Check):
    """No solver is involved: if this fails, no other measurement means anything."""

    statement = "y*, y*_α, Φ, ∇Φ, L_α, ∇L_α - ∇Φ, the bias of order p and the shift of x* are what their definitions say"
    hypotheses = "the synthetic problems of this package"
    source = "linear algebra"
    standing = "derived"
    specific = "about the closed forms of a problem, not a solver"

    def readings(self) -> Iterator[Reading]:
        """Compare both sides of each identity."""
        forms = QuadraticForms.random(5, 8, 10.0, seed=0, rho=1.0)
        x, α = random_x(5), 30.0
        zero = torch.zeros(8, dtype=torch.float64)

        def lowest(at: Tensor, tilt: float) -> Tensor:
            """argmin_y g + tilt f."""
            return minimize(lambda y: forms.g(at, y) + tilt * forms.f(at, y), zero, tolerance=1e-12)

        def path(at: Tensor, tilt: float) -> Tensor:
            """min_y g + tilt f."""
            y = lowest(at, tilt)
            return forms.g(at, y) + tilt * forms.f(at, y)

        def penalized(at: Tensor) -> Tensor:
            return α * (path(at, 1 / α) - path(at, 0.0))

        truth = forms.grad_phi(x)
        yield agreement("y*", forms.lower_solution(x), lowest(x, 0.0), 1e-11, PRECISE)
        yield agreement("y*_α", forms.penalized_solution(x, α), lowest(x, 1 / α), 1e-11, PRECISE)
        yield agreement("Φ", forms.phi(x), forms.f(x, lowest(x, 0.0)), 1e-11, PRECISE)
        implicit = hypergradient(Quadratic.of(forms, x=x)).value["value"]
        yield agreement("∇Φ, implicit", truth, implicit, 1e-11, PRECISE)
        yield agreement("∇Φ, differences", truth, _gradient(forms.phi, x), 1e-7, DIFFERENCED)
        yield agreement("L_α", forms.penalized_phi(x, α), penalized(x), 1e-10, PRECISE)
        yield agreement("∇L_α", truth + forms.bias(x, α), _gradient(penalized, x), 1e-7, DIFFERENCED)
        for p in (1, 2, 3, 4):
            weights = {j: float(c) for j, c in difference(p).items()}

            def combined(at: Tensor, weights: dict[int, float] = weights) -> Tensor:
                return α * torch.stack([c * path(at, j / α) for j, c in weights.items()]).sum()

            found = truth + forms.difference_bias(x, α, weights)
            yield agreement(f"order {p}", found, _gradient(combined, x), 1e-7, DIFFERENCED)
        yield agreement("g(y*_α) - g(y*)", forms.value_gap(x, α), forms.g(x, lowest(x, 1 / α)) - path(x, 0.0), 1e-9, PRECISE)
        plain = QuadraticForms.random(5, 8, 10.0, seed=0)
        rest = plain.solution() + plain.penalized_shift(α)
        scale = plain.grad_phi(rest)
        yield agreement("∇Φ + bias = 0 at x_α", scale, -plain.bias(rest, α), 1e-9, PRECISE)

        logistic = LogisticRegularization(rows=40, d=5)
        found_ = hypergradient(logistic)
        start = torch.full((5,), logistic.start, dtype=torch.float64)
        yield agreement(
            "∇Φ, logistic-regularization", logistic.grad_phi(start, found_.y["value"]), found_.value["value"], 1e-11, PRECISE
        )
        ridge = RidgeReweighting()
        logits = 0.3 * random_x(5)
        implicit = hypergradient(ridge, x={"logits": logits}).value["logits"]
        exact = torch.func.grad(ridge.phi)(logits)
        yield agreement("∇Φ, ridge-reweighting", exact, implicit, 1e-11, PRECISE)
        p_ = torch.softmax(logits, 0)
        gap = ridge.source_losses(ridge.penalized_solution(logits, α)) - ridge.source_losses(ridge.lower_solution(logits))
        by_hand = α * p_ * (gap - p_ @ gap)
        value = torch.func.grad(lambda at: ridge.penalized_phi(at, α))(logits)
        yield agreement("∇L_α, ridge-reweighting", by_hand, value, 1e-9, PRECISE)
        cubic, curved = CubicBias(mu=0.2), torch.tensor([0.2], dtype=torch.float64)
        implicit = hypergradient(cubic).value["value"]
        yield agreement("∇Φ, cubic-bias", cubic.grad_phi(cubic.slope(curved)), implicit, 1e-9, PRECISE)


def _gradient(function, x: Tensor, h: float = 1e-4) -> Tensor:  # type: ignore[no-untyped-def]
    """Central differences."""
    steps = h * torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(function(x + step) - function(x - step)) / (2 * h) for step in steps])
