"""Registers the solvers of the core."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_solvers(register: Register) -> None:
    """The solvers of this package."""
    register("scalebio", "bilevel.solvers.scalebio:ScaleBiO")
