"""The hooks a plugin may implement.

A plugin is a module, named under the entry-point group `bilevel`, with functions marked `@hookimpl`. The first six hooks
register parts by name and by import path, so that nothing is imported before it is used; the others follow a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:  # pluggy reads the names of the arguments alone; torch is not needed to list what is installed
    from bilevel.record import Record
    from bilevel.run import Run

PROJECT = "bilevel"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Register = Callable[[str, str], None]
"""register("name-in-a-recipe", "package.module:Class")"""


@hookspec
def bilevel_problems(register: Register) -> None:
    """Register subclasses of `bilevel.Problem`."""


@hookspec
def bilevel_solvers(register: Register) -> None:
    """Register subclasses of `bilevel.Solver`."""


@hookspec
def bilevel_backends(register: Register) -> None:
    """Register subclasses of `bilevel.Backend`."""


@hookspec
def bilevel_weightings(register: Register) -> None:
    """Register ways to weigh or select training data: subclasses of `bilevel_llm.baselines.base.Weighting`."""


@hookspec
def bilevel_checks(register: Register) -> None:
    """Register theory checks."""


@hookspec
def bilevel_features(register: Register) -> None:
    """Register functions that describe rows of text by numbers, for a scorer of rows (see `llm-reweighting`)."""


@hookspec
def bilevel_commands(register: Register) -> None:
    """Register subcommands of `bilevel`: functions whose annotated arguments are options, as typer reads them.

    The function's docstring is its help. `bilevel --help` imports its module, so heavy imports belong into the function.
    """


@hookspec
def bilevel_run_start(run: Run) -> None:
    """A run begins, or goes on after `run.start` steps. All is loaded and checked; no step has been done."""


@hookspec
def bilevel_step_end(run: Run, record: Record) -> None:
    """A step is done; `record` is the last entry of `run.history`."""


@hookspec
def bilevel_run_end(run: Run, error: BaseException | None) -> None:
    """The run is over: complete (error is None), interrupted or failed. Everything is saved already."""
