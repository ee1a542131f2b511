"""Run a solver on a problem step by step, with access to its variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.active import Active, All
from bilevel.backend import Backend, Variable, Vector
from bilevel.optimizer import SGD
from bilevel.plugins import Plugins, load_plugins
from bilevel.problem import Problem
from bilevel.solver import Metrics, Solver


class NotApplicable(Exception):
    """A solver does not have what a check needs. The message says what is missing."""


@cache
def plugins() -> Plugins:
    """The installed plugins."""
    return load_plugins()


def default_backend() -> Backend:
    """A `torch` backend as a recipe would get it: one process, on the CPU."""
    backend: Backend = plugins().find("backends", "torch").load()(device="cpu")
    return backend


def configure(solver: type[Solver[Any]], *, needs: tuple[str, ...] = (), **settings: Any) -> Solver[Any]:
    """Build a solver from those of the settings that it has, with plain gradient steps and no warm-up.

    Solvers share a vocabulary: penalty, lr_x, lr_y, lr_z, lower_steps, optimizer_x, optimizer_y, optimizer_z, warmup. A
    setting that a solver does not have is left out. Raises `NotApplicable` if one of `needs` is missing.
    """
    assert dataclasses.is_dataclass(solver)
    names = {field.name for field in dataclasses.fields(solver) if field.init}
    missing = [name for name in needs if name not in names]
    if missing:
        raise NotApplicable(f"{solver.__name__} has no setting named {', '.join(missing)}")
    plain = {name: SGD() for name in ("optimizer_x", "optimizer_y", "optimizer_z")}
    wanted: dict[str, Any] = {**plain, "warmup": 0, **settings}
    return solver(**{name: value for name, value in wanted.items() if name in names})


@dataclass(frozen=True)
class After:
    """A schedule that is 0 before step `start` and `value` from there on."""

    start: int
    value: float

    def __call__(self, t: int) -> float:
        """Value at step t."""
        return self.value if t >= self.start else 0.0


class Session:
    """A run in progress. Use it as a context manager; then call `step`, and read `values`.

    problem, solver: what to run.
    backend: a new torch backend by default.
    seed: the seed of all random numbers.
    active: which blocks train; all by default.
    """

    def __init__(
        self,
        problem: Problem[Any],
        solver: Solver[Any],
        backend: Backend | None = None,
        *,
        seed: int = 0,
        active: Active | None = None,
    ) -> None:
        self.problem = problem
        self.solver = solver
        self.backend = backend or default_backend()
        self.seed = seed
        self.active = active or All()
        self.t = 0

    def __enter__(self) -> Self:
        self.problem.prepare()
        self.backend.start(self.seed)
        try:
            self.state = self.solver.init(self.problem, self.backend)
            self.state.activate(self.active, self.t, self.seed, self.backend)
        except BaseException:
            self.backend.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.backend.close()

    def step(self, count: int = 1) -> Metrics:
        """Do the next steps. Returns the metrics of the last one."""
        metrics: Metrics = {}
        for _ in range(count):
            self.state.activate(self.active, self.t, self.seed, self.backend)
            metrics = self.solver.step(self.t, self.state, self.problem, self.backend)
            self.t += 1
        return metrics

    def values(self, name: str) -> Tensor:
        """The parameters of variable `name` in one tensor: as it is if there is one parameter, else flattened and joined."""
        tensors = list(self.backend.weights(self.variable(name)).values())
        return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])

    def put(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Set the parameters of variable `name` to these values, including frozen ones."""
        variable = self.variable(name)
        active = variable.active
        self.backend.activate(variable, variable.blocks.names)
        self.backend.write(variable, Vector(values, whole=True))
        self.backend.activate(variable, active)

    def variable(self, name: str) -> Variable:
        """x, or the replica of that name. Raises `NotApplicable` if the solver has none."""
        if name != "x" and name not in self.state.replicas:
            raise NotApplicable(f"{type(self.solver).__name__} has no lower variable named {name}")
        return self.state.x if name == "x" else self.state.replicas[name]


@dataclass(frozen=True)
class Direction:
    """A solver's gradient of x, and where it was computed.

    gradient: the gradient of x.
    lower: the lower variables, by name.
    metrics: the metrics of the step that moved x.
    """

    gradient: Tensor
    lower: Mapping[str, Tensor]
    metrics: Metrics


def direction(
    problem: Problem[Any], solver: type[Solver[Any]], *, hold: int, needs: tuple[str, ...] = (), **settings: Any
) -> Direction:
    """The gradient along which a solver moves x, after `hold` steps with x held in which the lower variables converge.

    It is derived from the move itself, with a step size of 1.
    """
    chosen = configure(solver, needs=("lr_x", *needs), **{"lr_x": After(hold, 1.0), **settings})
    with Session(problem, chosen) as session:
        session.step(hold)
        before, lower = session.values("x"), {name: session.values(name) for name in session.state.replicas}
        metrics = session.step()
        return Direction(before - session.values("x"), lower, metrics)
