"""Registers the solvers and loggers of the core, and what `bilevel new` writes."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_solvers(register: Register) -> None:
    """Register the solvers of this package."""
    register("rounds", "bilevel.solvers.rounds:Rounds")
    register("scalebio", "bilevel.solvers.scalebio:ScaleBiO")
    register("f2ba", "bilevel.solvers.f2ba:F2BA")
    register("f2sa", "bilevel.solvers.f2sa:F2SA")
    register("f2sa-p", "bilevel.solvers.f2sa_p:F2SAp")
    register("f3sa", "bilevel.solvers.f3sa:F3SA")
    register("aid", "bilevel.solvers.aid:AID")
    register("bome", "bilevel.solvers.bome:BOME")
    register("descent", "bilevel.solvers.descent:Descent")
    register("meha", "bilevel.solvers.meha:MEHA")
    register("pbgd", "bilevel.solvers.pbgd:PBGD")
    register("soba", "bilevel.solvers.soba:SOBA")


@hookimpl
def bilevel_loggers(register: Register) -> None:
    """Register the loggers that a recipe names. Those that show every run are plugins of their own."""
    register("wandb", "bilevel.loggers.wandb:Wandb")
    register("mlflow", "bilevel.loggers.mlflow:MLflow")
    register("trackio", "bilevel.loggers.trackio:Trackio")


@hookimpl
def bilevel_templates(register: Register) -> None:
    """Register the packages that `bilevel new` writes for the kinds of the core."""
    register("problem", "bilevel.new.template:PROBLEM")
    register("solver", "bilevel.new.template:SOLVER")
    register("check", "bilevel.new.template:CHECK")
