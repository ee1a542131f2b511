"""What the claims about noise and schedules have in common: exponents of exact moments, and the solver against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bilevel.solver import Solver
from bilevel.testing.session import Session
from bilevel.verify.claims import Reading, agreement, exponent, number
from bilevel_problems.quadratic import Quadratic
from bilevel_theory.instances import noisy_forms
from bilevel_theory.linear_system import LinearSystem, Moments, StepSizes

Schedule = Callable[[int], StepSizes]


def moments_at(system: LinearSystem, schedule: Schedule, counts: Sequence[int], start: Any = None) -> list[Moments]:
    """The exact moments after these numbers of steps. The default start is the fixed point for the first penalty."""
    start = system.equilibrium(schedule(0).penalty) if start is None else start
    wanted = set(counts)
    run = system.run(start, map(schedule, range(max(counts))))
    return [moments for k, moments in enumerate(run, start=1) if k in wanted]


def rate_readings(
    case: str, system: LinearSystem, schedule: Schedule, *, rate: float, first: int, last: int, noise: float | None
) -> Iterator[Reading]:
    """Exponents in k of E‖∇Φ‖², of its bias, and of λ² Var(y - y*_λ).

    noise: the exponent predicted for λ² Var(y - y*_λ); None where there is no noise.
    """
    counts = [int(k) for k in np.unique(np.geomspace(first, last, 12).round())]
    moments = moments_at(system, schedule, counts)
    yield exponent(
        f"{case}: E‖∇Φ(x_k)‖²", "k", counts, [m.squared_gradient() for m in moments], rate, 0.1,
        "x's own variance falls faster than the bias and still counts at these k: the exponent reads too steep",
    )  # fmt: skip
    yield exponent(
        f"{case}: ‖∇L_λ - ∇Φ‖²", "k", counts, [m.squared_bias() for m in moments], rate, 0.05,
        "exact moments; the bias is 1/λ² up to 1/λ³",
    )  # fmt: skip
    if noise is not None:
        yield exponent(
            f"{case}: λ² Var(y_k - y*_λ)", "k", counts, [m.scaled_variance() for m in moments], noise, 0.1,
            "exact moments; the motion of x adds variance that falls faster and still counts at these k",
        )  # fmt: skip


def solver_readings(
    solver: Solver[Any], system: LinearSystem, schedule: Schedule, *,
    upper_noise: float, lower_noise: float, steps: int, copies: int, seed: int,
) -> Iterator[Reading]:  # fmt: skip
    """Compare the solver without noise with the mean, and many copies of it with noise with the moments."""
    forms = noisy_forms()
    start_x = forms.solution() + forms.penalized_shift(schedule(0).penalty)
    start_y = forms.lower_solution(start_x)
    start = np.concatenate([start_x, start_y, start_y])
    few = min(steps, 100)
    with Session(Quadratic.of(forms, x=start_x, y=start_y), solver) as session:
        session.step(few)
        reached = torch.cat([session.values(name) for name in ("x", "y", "z")])
    mean = moments_at(system, schedule, [few], start)[0].mean
    yield agreement(
        f"(x, y, z) after {few} steps without noise", reached, torch.from_numpy(mean), 1e-10,
        "both are the same affine maps, computed in another order",
    )  # fmt: skip

    noisy = Quadratic.of(
        forms, x=start_x.expand(copies, -1), y=start_y.expand(copies, -1),
        copies=copies, upper_noise=upper_noise, lower_noise=lower_noise,
    )  # fmt: skip
    counts = [int(k) for k in np.linspace(steps / 8, steps, 8)]
    gradients, variances, gaps = [], [], []
    with Session(noisy, solver, seed=seed) as session:
        for before, count in zip([0, *counts[:-1]], counts, strict=True):
            session.step(count - before)
            gradients.append(float(forms.grad_phi(session.values("x")).square().sum(-1).mean()))
            λ = schedule(count - 1).penalty
            away = session.values("y") - forms.penalized_solution(session.values("x"), λ)
            variances.append(λ**2 * float(away.var(0).sum()))
            gaps.append(float((session.values("y") - session.values("z")).var(0).sum()))
    exact = moments_at(system, schedule, counts, start)
    because = f"{copies} copies at 8 times: a sampling error of about 3 %"
    ratio = np.mean([g / m.squared_gradient() for g, m in zip(gradients, exact, strict=True)])
    yield number("E‖∇Φ‖², sampled over exact", float(ratio), 1.0, 0.1, because)
    ratio = np.mean([v / m.scaled_variance() for v, m in zip(variances, exact, strict=True)])
    yield number("Var(y - y*_λ), sampled over exact", float(ratio), 1.0, 0.1, because)
    ratio = np.mean([v / m.variance_of_gap() for v, m in zip(gaps, exact, strict=True)])
    yield number("Var(y - z), sampled over exact", float(ratio), 1.0, 0.1, because)
