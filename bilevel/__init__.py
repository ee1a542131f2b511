"""Bilevel optimization with first-order penalty methods, from toy problems to data reweighting of LLMs.

The names below are loaded when they are first used, so that `import bilevel` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel.active import LISA, Active, All
    from bilevel.backend import Backend, Evaluation, Variable
    from bilevel.blocks import Blocks, find_blocks
    from bilevel.data import Stratified
    from bilevel.errors import BilevelError, InputError, NonFiniteError, RunError
    from bilevel.hookspecs import hookimpl
    from bilevel.loop import Interrupted, Result, Run, fit
    from bilevel.optimizer import SGD, AdamW
    from bilevel.problem import Forward, Loss, Problem, Shard
    from bilevel.schedule import Cosine, Linear, Power
    from bilevel.solver import Metrics, Solver, State
    from bilevel.solvers.scalebio import ScaleBiO

_HOMES = {
    "active": ("LISA", "Active", "All"),
    "backend": ("Backend", "Evaluation", "Variable"),
    "blocks": ("Blocks", "find_blocks"),
    "data": ("Stratified",),
    "errors": ("BilevelError", "InputError", "NonFiniteError", "RunError"),
    "hookspecs": ("hookimpl",),
    "loop": ("Interrupted", "Result", "Run", "fit"),
    "optimizer": ("SGD", "AdamW"),
    "problem": ("Forward", "Loss", "Problem", "Shard"),
    "schedule": ("Cosine", "Linear", "Power"),
    "solver": ("Metrics", "Solver", "State"),
    "solvers.scalebio": ("ScaleBiO",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LISA", "SGD", "Active", "AdamW", "All", "Backend", "BilevelError", "Blocks", "Cosine", "Evaluation", "Forward",
    "InputError", "Interrupted", "Linear", "Loss", "Metrics", "NonFiniteError", "Power", "Problem", "Result", "Run",
    "RunError", "ScaleBiO", "Shard", "Solver", "State", "Stratified", "Variable", "find_blocks", "fit", "hookimpl",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bilevel' has no attribute {name!r}")
    module = import_module(f"bilevel.{_HOME[name]}")
    globals()[name] = value = getattr(module, name)
    return value
