"""`bilevel check`: check the contract of an installed part, given by its name, or of the problem of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel.config import load_config
from bilevel.errors import InputError
from bilevel.plugins import load_plugins
from bilevel.suggest import did_you_mean
from bilevel.testing.contract import check_backend, check_problem, check_solver
from bilevel.testing.session import configure

CHECKED = ("problems", "solvers", "backends")
SUITABLE: dict[str, Any] = {"penalty": 20.0, "lr_x": 0.05, "lr_z": 0.6, "lower_steps": 3, "warmup": 5}
"""Settings that suit `check_solver`'s problem; a solver takes those that it has and its defaults for the rest."""


def check(what: str, changes: Sequence[str] = ()) -> str:
    """Check a problem, solver or backend by its name, or the problem of a recipe file. Returns what was checked.

    changes: `key.path=value` for a recipe.

    Raises `InputError` for an unknown name or a problem that needs settings, and `ContractError` for a part that does not
    do what the others rely on.
    """
    plugins = load_plugins()
    if Path(what).suffix in (".yaml", ".yml", ".py"):
        problem = load_config(Path(what), plugins, changes=changes).problem
        check_problem(problem)
        return f"the problem of {what}"
    kinds = [kind for kind in CHECKED if what in plugins.parts[kind]]
    if not kinds:
        kinds = [kind for kind, parts in plugins.parts.items() if what in parts]
        if kinds:
            raise InputError(f"{what!r} is one of the {kinds[0]}; only {', '.join(CHECKED)} have a contract to check")
        known = sorted(name for kind in CHECKED for name in plugins.parts[kind])
        raise InputError(f"neither a recipe file nor an installed part is named {what!r}{did_you_mean(what, known)}")
    kind = kinds[0]
    cls = plugins.find(kind, what).load()
    if kind == "backends":
        check_backend(cls)
    elif kind == "solvers":
        check_solver(configure(cls, **SUITABLE))
    else:
        needed = [f.name for f in dataclasses.fields(cls) if _has_no_default(f)]
        if needed:
            raise InputError(
                f"the problem {what!r} needs {', '.join(needed)}; check it with a recipe: bilevel check recipe.yaml"
            )
        check_problem(cls())
    return f"the {kind[:-1]} {what}"


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing
