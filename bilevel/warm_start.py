"""Begin a run from the last state of another one: the variables of that which fit, and no others."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bilevel import checkpoint
from bilevel.agreement import on_first
from bilevel.errors import InputError
from bilevel.record import read_records
from bilevel.run import Run
from bilevel.run_directory import RunDirectory
from bilevel.solver import State

log = logging.getLogger("bilevel")


@dataclass(frozen=True)
class _Found:
    """The state to begin from: a checkpoint, the steps done, its variables, those that are rewound, and the names of x."""

    where: Path
    steps: int
    variables: list[str]
    names: list[str]
    rewound: list[str]


def begin_from(source: Path, run: Run, state: State) -> None:
    """Give the variables of a new run the weights that they had at the end of another, and say which were taken over.

    Optimizers start afresh. All processes call it. x is taken over if its entries have the same names; a lower variable if
    there is one of its name and of the same parameters, in the same precision. Where a solver rewinds its lower variables
    again and again (`rounds`), they are part of no result and are not taken over.

    Raises `InputError` if there is no such run, if it has no whole checkpoint, and if nothing can be taken over.
    """
    found = on_first(run.backend, lambda: _find(source))
    rewinds = False
    with suppress(InputError):  # a solver need not say what its steps take
        rewinds = run.solver.workload().marked > 0
    taken, left = [], []
    for variable in state.variables:
        name = variable.name
        reason = _mismatch(run, state, found, name, rewinds)
        if reason is None:
            try:
                run.backend.load_weights(found.where, [variable])
                taken.append(name)
                continue
            except InputError as error:
                reason = str(error)
        left.append(f"{name} is not, {reason}")
    if not taken:
        raise InputError(f"nothing of {source} can be taken over: {'; '.join(left)}; start without it")
    every = " and ".join(filter(None, (", ".join(taken[:-1]), taken[-1])))
    words = f"{every} {'is' if len(taken) == 1 else 'are'} taken over"
    log.info("begins from %s, as it was after %d steps: %s", source, found.steps, "; ".join([words, *left]))


def _find(source: Path) -> _Found:
    directory = RunDirectory(source)
    if not directory.recipe_file.is_file():
        raise InputError(f"there is no run in {source} to begin from (no {directory.recipe_file.name} there)")
    reasons = []
    for steps, where in reversed(directory.saved().items()):
        if (reason := checkpoint.damage(where)) is None:
            records = read_records(directory.metrics_file, steps)
            variables = checkpoint.saved_variables(where)
            rewound = [name for name in variables if checkpoint.SavedVariable(where, name).facts.marked]
            return _Found(where, steps, variables, list(records[-1].upper) if records else [], rewound)
        reasons.append(reason)
    why = reasons[0] if reasons else "it has no checkpoint"
    raise InputError(f"the run in {source} cannot be begun from: {why}")


def _mismatch(run: Run, state: State, found: _Found, name: str, rewinds: bool) -> str | None:
    """Why a variable cannot be taken over, as far as that is known before it is read."""
    if name not in found.variables:
        return f"as there is none among {', '.join(found.variables)}"
    if name == state.x.name:
        names = list(run.problem.summary(state.x))
        return None if names == found.names else f"as its entries are {', '.join(found.names)} there, in this order"
    if rewinds or (found.rewound and name in state.replicas):
        return "as it begins every round anew"
    return None
