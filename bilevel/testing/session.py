"""Run a solver on a problem step by step, with access to its variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.active import Active, All
from bilevel.backend import Backend, Variable, Vector
from bilevel.errors import InputError
from bilevel.many import side_by_side
from bilevel.optimizer import SGD
from bilevel.per_run import PerRun
from bilevel.plugins import Plugins, load_plugins
from bilevel.problem import Problem
from bilevel.solver import Metrics, Solver, begin


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
    """A run in progress, or several. Use it as a context manager; then call `step`, and read `values`.

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
        self.lead = 0

    @classmethod
    def of_many(
        cls,
        problem: Problem[Any],
        solvers: Sequence[Solver[Any]],
        seeds: Sequence[int] = (0,),
        *,
        active: Active | None = None,
    ) -> Self:
        """A session of several runs side by side: of every solver with every seed; see `bilevel.many`."""
        session = cls(*side_by_side(problem, solvers, default_backend(), seeds), active=active)
        session.lead = 1
        return session

    def __enter__(self) -> Self:
        self.problem.prepare()
        self.backend.start(self.seed)
        try:
            self.state = begin(self.solver, self.problem, self.backend)
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
        """The parameters of variable `name` in one tensor: as it is if there is one parameter, else flattened and joined.

        In a session of several runs it has a first dimension for them.
        """
        tensors = list(self.backend.weights(self.variable(name)).values())
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([tensor.flatten(self.lead) for tensor in tensors], -1)

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
    with Session(problem, _held(solver, hold, needs, settings)) as session:
        return _direction(session, hold)


def directions(
    problem: Problem[Any],
    solver: type[Solver[Any]],
    cases: Sequence[Mapping[str, Any]],
    *,
    hold: int,
    needs: tuple[str, ...] = (),
    **settings: Any,
) -> list[Direction]:
    """The same for several cases, whose own settings are added to the others. They run side by side where they can."""
    solvers = [_held(solver, hold, needs, {**settings, **case}) for case in cases]
    try:
        with Session.of_many(problem, solvers) as session:
            found = _direction(session, hold)
    except (InputError, TypeError):  # the solver takes plain numbers only, or the loss can be computed for one run alone
        return [direction(problem, solver, hold=hold, needs=needs, **settings, **case) for case in cases]
    return [
        Direction(
            found.gradient[k],
            {name: value[k] for name, value in found.lower.items()},
            {name: _of_run(value, k) for name, value in found.metrics.items()},
        )
        for k in range(len(cases))
    ]


def _held(solver: type[Solver[Any]], hold: int, needs: tuple[str, ...], settings: Mapping[str, Any]) -> Solver[Any]:
    return configure(solver, needs=("lr_x", *needs), **{"lr_x": After(hold, 1.0), **settings})


def _direction(session: Session, hold: int) -> Direction:
    session.step(hold)
    before, lower = session.values("x"), {name: session.values(name) for name in session.state.replicas}
    metrics = session.step()
    return Direction(before - session.values("x"), lower, metrics)


def _of_run(value: Any, k: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _of_run(part, k) for name, part in value.items()}
    return float(value.values[k]) if isinstance(value, PerRun) else value
