"""A solver that a plugin registers is in the grid of tests, with nothing written for it."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest

from bilevel import Backend, Metrics, Problem, Solver, State, Workload, hookimpl
from bilevel.hookspecs import Register
from bilevel.optimizer import SGD, Optimizer
from bilevel.plugins import load_plugins
from bilevel.solvers.shared import lower_step, place, report
from bilevel.testing.contract import ContractError
from bilevel.testing.workload import check_workload
from tests.bilevel.solvers import test_every_solver
from tests.bilevel.solvers.grid import Case, find_cases, small


@dataclass(frozen=True)
class Tiny(Solver[State]):
    """F2SA with one lower step, in as few lines as a solver takes."""

    penalty: float = 10.0
    lr_x: float = 0.05
    lr_z: float = 0.1
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        return place(problem, backend, ("y", "z"), self.optimizer_x, self.optimizer_z)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        g_z = lower_step(problem, backend, x, z, t, lr=self.lr_z)
        lower_step(problem, backend, x, y, t, lr=self.lr_z, tilt=1 / self.penalty)
        ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)
        backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={x: -self.penalty})
        g_y = backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={x: self.penalty})
        f_y = backend.backward(lambda b: problem.upper_loss(x, y, b), ξ, wrt={x: 1})
        norm = backend.step(x, lr=self.lr_x)
        return report(upper=f_y, lower=g_z, gap=g_y - g_z, penalty=self.penalty, grad_norm_x=norm)

    def workload(self) -> Workload:
        return Workload(
            {"y": self.optimizer_z, "z": self.optimizer_z},
            lower_passes=2,
            upper_passes=1,
            lower_forwards=2,
            upper_forwards=1,
            vectors=1,
        )


class Miscounted(Tiny):
    def workload(self) -> Workload:
        return dataclasses.replace(super().workload(), lower_passes=3)


@hookimpl
def bilevel_solvers(register: Register) -> None:
    register("tiny", f"{__name__}:Tiny")
    register("miscounted", f"{__name__}:Miscounted")


@pytest.fixture
def found() -> dict[str, Case]:
    own = [point for point in entry_points(group="bilevel") if point.name.startswith("bilevel")]
    plugins = load_plugins([*own, EntryPoint("third-party", __name__, "bilevel")])
    return {case.name: case for case in find_cases(plugins)}


def test_a_registered_solver_is_in_the_grid(found: dict[str, Case]) -> None:
    assert type(found["tiny"].solver) is Tiny
    assert found["tiny"].solver.penalty == 20  # of the settings that solvers share, those that it has


GRID = [
    f
    for name, f in vars(test_every_solver).items()
    if name.startswith("test") and [*inspect.signature(f).parameters] == ["case"]
]


@pytest.mark.parametrize("test", GRID, ids=lambda test: test.__name__)
def test_what_holds_for_every_solver_is_asked_of_it(test: Callable[[Case], None], found: dict[str, Case]) -> None:
    test(found["tiny"])


def test_it_must_lower_the_true_objective_too(found: dict[str, Case]) -> None:
    test_every_solver.test_every_solver_lowers_the_true_objective_of_every_problem(found["tiny"], "quadratic", "sgd")


def test_its_workload_is_compared_with_its_steps(found: dict[str, Case]) -> None:
    check_workload(found["tiny"].solver, small())
    with pytest.raises(ContractError, match="lower_passes is 3, and a step has 2"):
        check_workload(found["miscounted"].solver, small())
