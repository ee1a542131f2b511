"""What the claims about noise and schedules have in common: exponents of exact moments, and the solver against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bilevel.solver import Solver
from bilevel.testing.session import Session
from bilevel.verify.claims import Reading, agreement, bound, exponent, number
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
    case: str, system: LinearSystem, schedule: Schedule, *, rate: float, first: int, last: int, noisy: bool
) -> Iterator[Reading]:
    """The exponent in k of E‖∇Φ‖² in a run, how near the run is to stationary, and the exponents at late steps."""
    counts = [int(k) for k in np.unique(np.geomspace(first, last, 12).round())]
    moments = moments_at(system, schedule, counts)
    yield exponent(
        f"{case}: E‖∇Φ(x_k)‖²", "k", counts, [m.squared_gradient() for m in moments], rate, 0.1,
        "x's own variance falls faster than the bias and still counts at these k: the exponent reads too steep",
    )  # fmt: skip
    held = system.stationary(schedule(last - 1))
    yield bound(
        f"{case}: E‖∇Φ(x_k)‖² over its value for settings held at those of step k",
        moments[-1].squared_gradient() / held.squared_gradient(), 0.95, 1.25,
        "x lags behind settings that change in proportion to 1/k, by a part that vanishes as k grows",
    )  # fmt: skip
    yield from balance_readings(case, system, schedule, rate=rate, noisy=noisy)


LATE = (1e10, 1e11, 1e12)
"""Steps so late that only the leading powers of k are left, and not so late that rounding errors count."""


def balance_readings(
    case: str, system: LinearSystem, schedule: Schedule, *, rate: float, noisy: bool, along: str = "k"
) -> Iterator[Reading]:
    """The terms that the rate balances, for settings held at those of late steps; each falls at the rate.

    They are the squared bias, λ² times the variance of y around y*_λ, and 1/(k η μ), the time that x takes relative to k,
    where 1 - ημ is the spectral radius of the step. With λ ~ k^(a - c), a step of x ~ k^-a and steps of y and z ~ k^-c, the
    three have the exponents -2(a - c), 2(a - c) - c (for noise in both levels) and a - 1. Only one pair (a, c) makes all of
    them equal to the rate.
    """
    settings = [schedule(int(k)) for k in LATE]
    held = [system.stationary(s) for s in settings]
    because = f"exact moments at {along} = 1e10 … 1e12, where the next powers of {along} still bend the line by up to .006"
    yield exponent(f"{case}: ‖∇L_λ - ∇Φ‖², late", along, LATE, [m.squared_bias() for m in held], rate, 0.01, because)
    if noisy:
        late = [m.scaled_variance() for m in held]
        yield exponent(f"{case}: λ² Var(y - y*_λ), late", along, LATE, late, rate, 0.01, because)
    times = [1 / (k * (1 - system.factor(s))) for k, s in zip(LATE, settings, strict=True)]
    yield exponent(f"{case}: 1/({along} η μ), late", along, LATE, times, rate, 0.01, because)
    late = [m.squared_gradient() for m in held]
    yield exponent(f"{case}: E‖∇Φ‖², late", along, LATE, late, rate, 0.01, because)


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
