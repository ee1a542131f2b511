"""A plugin of bilevel. This module only registers the problem; its class is imported when somebody names it."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_problems(register: Register) -> None:
    register("calibration", "bilevel_calibration.problem:Calibration")
