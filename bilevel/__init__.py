"""Bilevel optimization with first-order penalty methods, from toy problems to data reweighting of LLMs.

The names below, and the functions that plugins register (`bilevel.reweight`), are loaded when they are first used, so that
`import bilevel` is quick.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel.account import Finding, Labels, Table
    from bilevel.active import LISA, Active, All
    from bilevel.backend import Backend, Evaluation, Variable, Vector
    from bilevel.blocks import Blocks, find_blocks
    from bilevel.constraint import Box, Constraint, NonNegative, Simplex
    from bilevel.data import Stratified
    from bilevel.distribution import Distribution
    from bilevel.errors import BilevelError, InputError, NonFiniteError, RunError
    from bilevel.hookspecs import hookimpl
    from bilevel.logger import Logger
    from bilevel.loop import Interrupted, Result, fit
    from bilevel.many import Runs, fit_many
    from bilevel.optimizer import SGD, AdamW
    from bilevel.problem import Forward, Loss, Problem, Shard
    from bilevel.record import Record
    from bilevel.regularizer import Proximity, WeightDecay
    from bilevel.run import Run
    from bilevel.schedule import Cosine, Linear, Power
    from bilevel.solver import Metrics, Solver, State, Workload
    from bilevel.solvers.aid import AID
    from bilevel.solvers.bome import BOME
    from bilevel.solvers.descent import Descent
    from bilevel.solvers.f2ba import F2BA
    from bilevel.solvers.f2sa import F2SA
    from bilevel.solvers.f2sa_p import F2SAp
    from bilevel.solvers.f3sa import F3SA
    from bilevel.solvers.meha import MEHA
    from bilevel.solvers.pbgd import PBGD
    from bilevel.solvers.rounds import Rounds
    from bilevel.solvers.scalebio import ScaleBiO
    from bilevel.solvers.soba import SOBA

_HOMES = {
    "account": ("Finding", "Labels", "Table"),
    "active": ("LISA", "Active", "All"),
    "backend": ("Backend", "Evaluation", "Variable", "Vector"),
    "blocks": ("Blocks", "find_blocks"),
    "constraint": ("Box", "Constraint", "NonNegative", "Simplex"),
    "data": ("Stratified",),
    "distribution": ("Distribution",),
    "errors": ("BilevelError", "InputError", "NonFiniteError", "RunError"),
    "hookspecs": ("hookimpl",),
    "logger": ("Logger",),
    "loop": ("Interrupted", "Result", "fit"),
    "many": ("Runs", "fit_many"),
    "optimizer": ("SGD", "AdamW"),
    "problem": ("Forward", "Loss", "Problem", "Shard"),
    "record": ("Record",),
    "regularizer": ("Proximity", "WeightDecay"),
    "run": ("Run",),
    "schedule": ("Cosine", "Linear", "Power"),
    "solver": ("Metrics", "Solver", "State", "Workload"),
    "solvers.aid": ("AID",),
    "solvers.bome": ("BOME",),
    "solvers.descent": ("Descent",),
    "solvers.f2ba": ("F2BA",),
    "solvers.f2sa": ("F2SA",),
    "solvers.f2sa_p": ("F2SAp",),
    "solvers.f3sa": ("F3SA",),
    "solvers.meha": ("MEHA",),
    "solvers.pbgd": ("PBGD",),
    "solvers.rounds": ("Rounds",),
    "solvers.scalebio": ("ScaleBiO",),
    "solvers.soba": ("SOBA",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AID", "BOME", "F2BA", "F2SA", "F3SA", "LISA", "MEHA", "PBGD", "SGD", "SOBA", "Active", "AdamW", "All", "Backend",
    "BilevelError", "Blocks", "Box", "Constraint", "Cosine", "Descent", "Distribution", "Evaluation", "F2SAp", "Finding",
    "Forward", "InputError", "Interrupted", "Labels", "Linear", "Logger", "Loss", "Metrics", "NonFiniteError",
    "NonNegative", "Power", "Problem", "Proximity", "Record", "Result", "Rounds", "Run", "RunError", "Runs", "ScaleBiO",
    "Shard", "Simplex", "Solver", "State", "Stratified", "Table", "Variable", "Vector", "WeightDecay", "Workload",
    "find_blocks", "fit", "fit_many", "hookimpl",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"bilevel.{_HOME[name]}"), name)
    else:  # plugins are not asked for a module that is no attribute yet
        known = {} if name.startswith("_") or find_spec(f"bilevel.{name}") else _functions()
        if name not in known:
            raise AttributeError(f"module 'bilevel' has no attribute {name!r}")
        value = known[name].load()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_functions()})


def _functions() -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = import_module("bilevel.plugins").load_plugins().parts
    return parts["functions"]
