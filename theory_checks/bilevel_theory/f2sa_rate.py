"""F2SA's schedules give E‖∇Φ‖² ~ K^(-2/7), K^(-2/5), K^(-2/3) for noise in both levels, in the upper one, in none."""

from bilevel.solvers.f2sa import F2SA
from bilevel_theory.scheduled_rate import ScheduledRate


class F2SARate(ScheduledRate):
    """One lower step for each step of x, which moves at the new y and z."""

    statement = "E‖∇Φ(x_K)‖² ~ K^(-2/7), K^(-2/5), K^(-2/3) with noise in both levels, in the upper one, in none"
    hypotheses = "f smooth, g strongly convex; unbiased gradients of bounded variance; one loop, one sample a step"
    source = "Kwon et al. 2023 (2301.10945), abstract: ε^(-7/2), ε^(-5/2), ε^(-3/2) for E‖∇Φ‖² ≤ ε; steps by balance"
    standing = "proved"

    scheduled = F2SA
    order = "lower first"
    regimes = (("both", 0.03, 0.03, -2 / 7), ("upper", 0.1, 0.0, -2 / 5), ("none", 0.0, 0.0, -2 / 3))
    sampled_steps = 300
