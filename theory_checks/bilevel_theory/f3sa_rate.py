"""F3SA's momentum improves the rates to K^(-2/5), K^(-1/2), K^(-2/3)."""

from bilevel.solvers.f3sa import F3SA
from bilevel_theory.scheduled_rate import ScheduledRate


class F3SARate(ScheduledRate):
    """All three variables move from the same point, with the noise of the estimates instead of that of single gradients."""

    statement = "E‖∇Φ(x_K)‖² ~ K^(-2/5), K^(-1/2), K^(-2/3) with noise in both levels, in the upper one, in none"
    hypotheses = "as for F2SA; gradients of single samples smooth, which STORM momentum needs"
    source = "Kwon et al. 2023 (2301.10945), abstract: ε^(-5/2), ε^(-4/2), ε^(-3/2) for E‖∇Φ‖² ≤ ε; steps by balance"
    standing = "proved"

    scheduled = F3SA
    order = "together"
    regimes = (("both", 0.1, 0.1, -2 / 5), ("upper", 0.1, 0.0, -1 / 2), ("none", 0.0, 0.0, -2 / 3))
    sampled_steps = 250
