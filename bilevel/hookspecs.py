"""The hooks that a plugin may implement.

A plugin is a module, named under the entry-point group `bilevel`, with functions marked `@hookimpl`. Hooks that take
`register` each stand for a kind of parts: `bilevel_solvers` registers solvers. A part is registered by its name and its
import path, so that nothing is imported before it is used. The hooks named `bilevel_run_*` and `bilevel_step_end` follow a
run. A plugin may bring hooks, and with them kinds of parts, of its own: see `bilevel_kinds`.
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
def bilevel_kinds() -> str:  # type: ignore[empty-body]
    """Return the name of a module with hooks of your own, marked `@hookspec`.

    Each `bilevel_<kind>(register)` in it adds a kind of parts, which every plugin can then register. `<kind>` is a plural
    that ends in s. The module is imported whenever plugins are loaded, so it must be light.
    """


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
def bilevel_checks(register: Register) -> None:
    """Register theory checks: subclasses of `bilevel.verify.claims.Check`."""


@hookspec
def bilevel_loggers(register: Register) -> None:
    """Register subclasses of `bilevel.Logger`, which a recipe names under `run.loggers`. Their hooks are those of a run."""


@hookspec
def bilevel_commands(register: Register) -> None:
    """Register subcommands of `bilevel`: functions whose annotated arguments are options, as typer reads them.

    The function's docstring is its help. `bilevel --help` imports its module, so heavy imports belong in the function.
    """


@hookspec
def bilevel_functions(register: Register) -> None:
    """Register what Python users find as `bilevel.NAME`: functions or classes. The module is imported at the first use."""


@hookspec
def bilevel_templates(register: Register) -> None:
    """Register what `bilevel new` writes for a kind of part: instances of `bilevel.new.template.Template`.

    The name is that of the kind, in the singular: register("baseline", "package.templates:BASELINE").
    """


@hookspec
def bilevel_run_start(run: Run) -> None:
    """A run starts, or is resumed after `run.start` steps. Everything is loaded and checked; no step has been done."""


@hookspec
def bilevel_step_end(run: Run, record: Record) -> None:
    """A step is done; `record` is the last entry of `run.history`."""


@hookspec
def bilevel_run_end(run: Run, error: BaseException | None) -> None:
    """The run is over: it is complete (error is None), was interrupted or failed. Everything is saved already."""
