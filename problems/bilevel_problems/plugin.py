"""Registers the synthetic problems."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_problems(register: Register) -> None:
    """Register the problems of this package."""
    register("dialects", "bilevel_problems.dialects:Dialects")
    register("quadratic", "bilevel_problems.quadratic:Quadratic")
    register("cubic-bias", "bilevel_problems.cubic_bias:CubicBias")
    register("logistic-regularization", "bilevel_problems.logistic_regularization:LogisticRegularization")
    register("ridge-reweighting", "bilevel_problems.ridge_reweighting:RidgeReweighting")
    register("hyper-cleaning", "bilevel_problems.hyper_cleaning:HyperCleaning")
