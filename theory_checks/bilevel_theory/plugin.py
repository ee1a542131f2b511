"""Registers the theory checks."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_checks(register: Register) -> None:
    """Register the claims, in the order in which they build on each other."""
    register("closed-forms", "bilevel_theory.closed_forms:ClosedForms")
    register("penalty-bias", "bilevel_theory.penalty_bias:PenaltyBias")
    register("lower-distance", "bilevel_theory.lower_distance:LowerDistance")
    register("higher-order", "bilevel_theory.higher_order:HigherOrder")
    register("implicit-agreement", "bilevel_theory.implicit_agreement:ImplicitAgreement")
    register("condition-number", "bilevel_theory.condition_number:ConditionNumber")
    register("fixed-penalty", "bilevel_theory.fixed_penalty:FixedPenalty")
    register("linear-rate", "bilevel_theory.linear_rate:LinearRate")
    register("nonconvex-rate", "bilevel_theory.nonconvex_rate:NonconvexRate")
    register("pbgd-rate", "bilevel_theory.pbgd_rate:PBGDRate")
    register("bome-rate", "bilevel_theory.bome_rate:BOMERate")
    register("meha-rate", "bilevel_theory.meha_rate:MEHARate")
    register("f2sa-rate", "bilevel_theory.f2sa_rate:F2SARate")
    register("f3sa-rate", "bilevel_theory.f3sa_rate:F3SARate")
    register("finite-horizon", "bilevel_theory.finite_horizon:FiniteHorizon")
    register("sfo-exponent", "bilevel_theory.sfo_exponent:SFOExponent")
    register("shared-minibatch", "bilevel_theory.shared_minibatch:SharedMinibatch")
    register("stable-step", "bilevel_theory.stable_step:StableStep")
    register("block-sampling", "bilevel_theory.block_sampling:BlockSampling")
    register("optimal-weights", "bilevel_theory.optimal_weights:OptimalWeights")
    register("interior-weights", "bilevel_theory.interior_weights:InteriorWeights")
